"""Whole training steps to compare: FaRL's own in several ways, and the same step from open_clip and BEiT-style masking.

All start from the same weights and take the same batch of random pictures, captions and visual tokens.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.contest import compiled, need, need_compiler
from bench.timing import CUDA, DEVICE
from farl.flops import encoder_flops, training_flops
from farl.masking import MASK_RATIO, mask_sizes
from farl.model import FaRL, MimConfig, ModelConfig, PackedText, TextConfig, VisionConfig
from farl.model.config import IMAGE_MEAN, IMAGE_STD
from farl.step import TextParts, TrainStep
from farl.tokens import DalleEncoder, VisualTokenizer
from farl_engine.data import Batch
from farl_engine.distributed import World
from farl_engine.optim import parameter_groups
from farl_engine.profiler import part
from farl_kernels import use_backend
from farl_kernels.dispatch import Op

SMALL = ModelConfig(
    embed_dim=256,
    vision=VisionConfig(112, 16, 192, 12, 3),
    text=TextConfig(192, 4, 3),
    mim=MimConfig(vocab_size=512),
)
START, END = 49_406, 49_407
CAPTION_TOKENS = 17  # the mean of `synthetic`
# In a micro-batch of the truth on a GPU.
TRUE_PAIRS = 32


@dataclass(frozen=True)
class GivenTokens:
    """Stands in for a cache of visual tokens: `tokens` int64 [n, P]."""

    tokens: Tensor
    vocab_size: int
    token_image_size: int | None = None

    def __call__(self, images: Tensor, positions: Tensor | None = None) -> Tensor:
        if positions is None:
            return self.tokens
        return self.tokens.gather(1, positions.long().clamp(min=0)).masked_fill(positions < 0, -1)


@dataclass(frozen=True)
class Case:
    """What is trained on: `model` is how the table calls it; `online` makes visual tokens in the step."""

    model: str
    config: ModelConfig
    pairs: int
    precision: str = "float32"
    online: bool = False

    @property
    def shape(self) -> str:
        online = ", visual tokens made in the step" if self.online else ""
        return f"{self.model}, {self.pairs} pairs, {self.precision}{online}"

    @property
    def in_full_precision(self) -> Case:
        return replace(self, precision="float32")

    @property
    def flop(self) -> float:
        """What a step needs, whoever makes it: see `farl.flops`."""
        found = flop_per_pair(self.config)
        if self.online:
            assert self.config.mim is not None
            side = token_side(self.config)
            masked = mask_sizes(self.config.vision.grid)[0]
            found += encoder_flops(masked=masked, image_size=side, vocab_size=self.config.mim.vocab_size)
        return self.pairs * found


def flop_per_pair(config: ModelConfig) -> float:
    """What a step with given visual tokens needs, whoever makes it."""
    return training_flops(config, masked=mask_sizes(config.vision.grid)[0], caption_tokens=CAPTION_TOKENS)


def token_side(config: ModelConfig) -> int:
    """Side in pixels of the images that DALL-E's encoder wants for one token a patch."""
    return 8 * config.vision.grid[0]


def synthetic(config: ModelConfig, pairs: int, micro_batch: int = 0) -> tuple[Batch, Tensor]:
    """A batch of random pictures and captions of 8 to 26 tokens, and the visual tokens of all patches."""
    g = torch.Generator().manual_seed(pairs)
    side, token = config.vision.image_size, token_side(config)
    lengths = torch.randint(8, 27, (pairs,), generator=g)
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    words = torch.randint(1, START, (int(ends[-1]),), generator=g)
    words[ends[:-1]], words[ends[1:] - 1] = START, END
    text = PackedText(words, ends.int(), int(lengths.max()))
    size = micro_batch or pairs
    batch = Batch(
        step=0,
        ids=torch.arange(pairs),
        used_ids=torch.arange(pairs),
        views=torch.zeros(pairs, dtype=torch.int64),
        images=torch.randint(0, 256, (pairs, side, side, 3), dtype=torch.uint8, generator=g),
        token_images=torch.randint(0, 256, (pairs, token, token, 3), dtype=torch.uint8, generator=g),
        captions=[],
        text=TextParts(tuple(text.part(slice(start, start + size)) for start in range(0, pairs, size))),
    )
    assert config.mim is not None
    tokens = torch.randint(0, config.mim.vocab_size, (pairs, config.vision.num_patches), generator=g)
    return batch.to(DEVICE), tokens.to(DEVICE)


@contextlib.contextmanager
def without_triton() -> Iterator[None]:
    """Every op takes what it would take if it had no Triton kernels."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("farl_kernels.")]
    ops = {id(value): value for module in modules for value in vars(module).values() if isinstance(value, Op)}
    before = {key: dict(op._backends) for key, op in ops.items()}
    try:
        for op in ops.values():
            if len(op._backends) > 1:
                op._backends.pop("triton", None)
        yield
    finally:
        for key, op in ops.items():
            op._backends.clear()
            op._backends.update(before[key])


@dataclass
class Training:
    """A model in training: `loss` leaves gradients and returns the loss; calling it makes a whole step.

    Args:
        update: False for a forward and a backward pass alone.
    """

    model: nn.Module
    loss: Callable[[], Tensor]
    context: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    update: bool = True

    def __post_init__(self) -> None:
        groups = parameter_groups(self.model, 0.05)
        self._optimizer = torch.optim.AdamW(groups, lr=1e-5, betas=(0.9, 0.98), eps=1e-6, fused=True, capturable=CUDA)
        self._parameters = list(self.model.parameters())

    def checked(self) -> tuple[float, dict[str, Tensor]]:
        """The loss, and the gradients on the host."""
        with self.context():
            loss = self.loss().item()
        grads = {name: p.grad.cpu() for name, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad(set_to_none=True)
        return loss, grads

    def __call__(self) -> None:
        with self.context():
            self.loss()
        if self.update:
            with part("clipping"):
                nn.utils.clip_grad_norm_(self._parameters, 1.0, foreach=True)
            with part("optimizer"):
                self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    @property
    def lasting_bytes(self) -> int:
        """Of weights and moments."""
        moments = [x for state in self._optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        return sum(x.nbytes for x in (*self._parameters, *moments))


def fresh(config: ModelConfig) -> FaRL:
    torch.manual_seed(0)
    return FaRL(config).to(DEVICE)


def tokenizer_of(case: Case, tokens: Tensor) -> VisualTokenizer:
    """Where the visual tokens come from: `tokens`, or DALL-E's encoder with random weights."""
    assert case.config.mim is not None
    if not case.online:
        return GivenTokens(tokens, case.config.mim.vocab_size)
    torch.manual_seed(1)
    return DalleEncoder(case.config.mim.vocab_size, token_image_size=token_side(case.config)).to(DEVICE)


def train_step(model: FaRL, tokenizer: VisualTokenizer, precision: str, engine: str = "fused") -> TrainStep:
    return TrainStep(
        model,
        World(rank=0, size=1, device=DEVICE, control=None),
        tokenizer,
        mim_weight=1.0,
        mask_ratio=MASK_RATIO,
        seed=0,
        bf16=precision == "bfloat16",
        engine=engine,
    )


def farl(
    case: Case,
    context: Callable[[], Any] = contextlib.nullcontext,
    *,
    engine: str = "fused",
    text_beside: bool = False,
    compile_encoder: bool = False,
    micro_batch: int = 0,
) -> Training:
    """FaRL's own step.

    Args:
        text_beside: run the text tower on a stream of its own.
        compile_encoder: have torch.compile make the kernels between the convolutions of DALL-E's encoder.
    """
    batch, tokens = synthetic(case.config, case.pairs, micro_batch)
    if engine == "compile" or compile_encoder:
        need_compiler()
        torch._dynamo.reset()
    model, tokenizer = fresh(case.config), tokenizer_of(case, tokens)
    if compile_encoder:
        assert isinstance(tokenizer, DalleEncoder)
        tokenizer.compile()
    step = train_step(model, tokenizer, case.precision, engine)
    if text_beside:
        run_text_beside(model, step)
    return Training(model, lambda: step(batch)["loss"], context)


def run_text_beside(model: FaRL, step: TrainStep) -> None:
    """Put the text tower, up to what the contrastive loss takes of it, on a CUDA stream beside the image tower.

    Autograd runs its backward pass on the same stream, and makes both streams wait for each other where they meet.
    """
    stream = torch.cuda.Stream()
    encode, send, contrast = model.encode_text_packed, step._send, step._contrast

    def encode_beside(text: PackedText) -> Tensor:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            return encode(text)

    def send_beside(features: Tensor) -> Any:
        with torch.cuda.stream(stream):
            return send(features)

    def contrast_after(image_features: Tensor, text: Any, logit_scale: Tensor) -> Any:
        current = torch.cuda.current_stream()
        current.wait_stream(stream)
        for x in vars(text).values():
            if isinstance(x, Tensor):
                # Freed, it must not be given to the text tower again while this stream still reads it.
                x.record_stream(current)
        return contrast(image_features, text, logit_scale)

    model.encode_text_packed = encode_beside  # type: ignore[method-assign]
    step._send = send_beside  # type: ignore[method-assign]
    step._contrast = contrast_after  # type: ignore[method-assign]


def peer(case: Case, *, compile_it: bool) -> Training:
    """The step from open_clip's model and loss, with BEiT-style masked image modelling."""
    need("open_clip")
    OpenClipBeit = need("bench.step_peer").OpenClipBeit

    config, pairs = case.config, case.pairs
    batch, tokens = synthetic(config, pairs)
    model = OpenClipBeit.like(fresh(config))
    # Its masks, normalised pictures and padded captions are made beforehand: it pays for none of them.
    masks = train_step(fresh(config), tokenizer_of(case, tokens), "float32").sample_masks(batch)
    images = normalised(batch.images)
    packed = batch.text.parts[0]
    starts = packed.cu_seqlens.tolist()
    text = torch.zeros(pairs, config.text.context_length, dtype=torch.int64, device=DEVICE)
    for row, (start, end) in enumerate(itertools.pairwise(starts)):
        text[row, : end - start] = packed.tokens[start:end]
    training_loss = model.training_loss
    if compile_it:
        training_loss = compiled(training_loss, fullgraph=False, whole_step=True)

    def loss() -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=case.precision == "bfloat16"):
            value = training_loss(images, text, masks.mask, masks.positions, masks.targets)
        value.backward()
        return value.detach()

    return Training(model, loss)


def normalised(images: Tensor) -> Tensor:
    """uint8 [n, H, W, 3] -> float32 [n, 3, H, W], contiguous."""
    mean, std = (torch.tensor(x, device=images.device) for x in (IMAGE_MEAN, IMAGE_STD))
    return ((images / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


PEER = "open_clip + BEiT"
COMPILED_ENCODER = "farl, encoder through torch.compile"
CONTENDERS: dict[str, Callable[[Case], Training]] = {
    "farl": farl,
    "farl, torch.compile": lambda case: farl(case, engine="compile"),
    "farl, one CUDA graph": farl,
    "farl, text on a side stream": lambda case: farl(case, text_beside=True),
    COMPILED_ENCODER: lambda case: farl(case, compile_encoder=True),
    "farl, ops without Triton": lambda case: farl(case, without_triton),
    "farl, reference ops": lambda case: farl(case, lambda: use_backend("reference")),
    PEER: lambda case: peer(case, compile_it=False),
    f"{PEER}, torch.compile": lambda case: peer(case, compile_it=True),
}
# The products of a compiled step are those of the plain one. The others have their own's twin counted once.
COUNTED = {
    "farl, torch.compile": "farl, reference ops",
    "farl, one CUDA graph": "farl",
    "farl, text on a side stream": "farl",
    COMPILED_ENCODER: "farl",
    f"{PEER}, torch.compile": PEER,
}


def truth(case: Case) -> Training:
    """The reference ops, on a GPU in micro-batches: without them float32 would take twice the memory of bfloat16."""
    return farl(case, lambda: use_backend("reference"), micro_batch=TRUE_PAIRS if CUDA else 0)
