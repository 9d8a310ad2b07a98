"""A whole training step of FaRL: forward, backward, clipping and AdamW, on a synthetic batch already on the device.

Visual tokens are given, as from a token cache. Each contender's loss and gradients are first compared with those of the
float32 reference ops on a small batch. The peer is open_clip's model and loss with BEiT-style masked image modelling.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.contest import NOT_MEASURED, NotMeasuredError, check_ready, clean_up, compiled, leave_out, need, record
from bench.timing import CUDA, DEVICE, prepare, side_stream
from farl.flops import training_flops
from farl.masking import mask_sizes
from farl.model import MODELS, FaRL, MimConfig, ModelConfig, PackedText, TextConfig, VisionConfig
from farl.model.config import IMAGE_MEAN, IMAGE_STD
from farl.step import TextParts, TrainStep
from farl_engine.data import Batch
from farl_engine.distributed import World
from farl_engine.optim import parameter_groups
from farl_kernels import use_backend
from farl_kernels.dispatch import Op

SMALL = ModelConfig(
    embed_dim=256,
    vision=VisionConfig(112, 16, 192, 12, 3),
    text=TextConfig(192, 4, 3),
    mim=MimConfig(vocab_size=512),
)
CONFIG, SIZES = (MODELS["farl-b16"], (256, 640, 1024)) if CUDA else (SMALL, (64,))
PRECISIONS = ("bfloat16",) if CUDA else ("float32", "bfloat16")
CHECKED_PAIRS = 16
# Relative, of the loss and of all gradients together. Twelve blocks in bfloat16 are not closer than a few percent.
LIMITS = {"float32": (1e-4, 1e-3), "bfloat16": (2e-2, 0.15)}
START, END = 49_406, 49_407


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


def synthetic(config: ModelConfig, pairs: int) -> tuple[Batch, Tensor]:
    """A batch of random pictures and captions of 8 to 26 tokens, and the visual tokens of all patches."""
    g = torch.Generator().manual_seed(pairs)
    side = config.vision.image_size
    lengths = torch.randint(8, 27, (pairs,), generator=g)
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    words = torch.randint(1, START, (int(ends[-1]),), generator=g)
    words[ends[:-1]], words[ends[1:] - 1] = START, END
    text = PackedText(words, ends.int(), int(lengths.max()))
    batch = Batch(
        step=0,
        ids=torch.arange(pairs),
        used_ids=torch.arange(pairs),
        views=torch.zeros(pairs, dtype=torch.int64),
        images=torch.randint(0, 256, (pairs, side, side, 3), dtype=torch.uint8, generator=g),
        token_images=None,
        captions=[],
        text=TextParts((text,)),
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
    """A model in training: `loss` leaves gradients and returns the loss; calling it makes a whole step."""

    model: nn.Module
    loss: Callable[[], Tensor]
    context: Callable[[], contextlib.AbstractContextManager[None]]
    flop_per_pair: float

    def __post_init__(self) -> None:
        groups = parameter_groups(self.model, 0.05)
        self._optimizer = torch.optim.AdamW(groups, lr=1e-5, betas=(0.9, 0.98), eps=1e-6, fused=True, capturable=CUDA)
        self._parameters = list(self.model.parameters())

    def checked(self) -> tuple[float, dict[str, Tensor]]:
        with self.context():
            loss = self.loss().item()
        grads = {name: p.grad.double() for name, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad(set_to_none=True)
        return loss, grads

    def __call__(self) -> None:
        with self.context():
            self.loss()
        nn.utils.clip_grad_norm_(self._parameters, 1.0, foreach=True)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def fresh(config: ModelConfig) -> FaRL:
    torch.manual_seed(0)
    return FaRL(config).to(DEVICE)


def farl(config: ModelConfig, pairs: int, autocast: bool, context: Callable[[], Any]) -> Training:
    batch, tokens = synthetic(config, pairs)
    model = fresh(config)
    world = World(rank=0, size=1, device=DEVICE, control=None)
    assert config.mim is not None
    step = TrainStep(
        model,
        world,
        GivenTokens(tokens, config.mim.vocab_size),
        mim_weight=1.0,
        mask_ratio=75 / 196,
        seed=0,
        autocast=autocast,
    )
    return Training(model, lambda: step(batch)["loss"], context, flop_per_pair(config))


def peer(config: ModelConfig, pairs: int, autocast: bool, compile_it: bool) -> Training:
    need("open_clip")
    OpenClipBeit = need("bench.step_peer").OpenClipBeit

    batch, tokens = synthetic(config, pairs)
    model = OpenClipBeit.like(fresh(config))
    world = World(rank=0, size=1, device=DEVICE, control=None)
    assert config.mim is not None
    source = GivenTokens(tokens, config.mim.vocab_size)
    # Its masks, normalised pictures and padded captions are made beforehand: it pays for none of them.
    sampler = TrainStep(fresh(config), world, source, mim_weight=1.0, mask_ratio=75 / 196, seed=0, autocast=False)
    masks = sampler.sample_masks(batch)
    mean, std = (torch.tensor(x, device=DEVICE) for x in (IMAGE_MEAN, IMAGE_STD))
    images = ((batch.images / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
    packed = batch.text.parts[0]
    starts = packed.cu_seqlens.tolist()
    text = torch.zeros(pairs, config.text.context_length, dtype=torch.int64, device=DEVICE)
    for row, (start, end) in enumerate(itertools.pairwise(starts)):
        text[row, : end - start] = packed.tokens[start:end]
    training_loss = compiled(model.training_loss, fullgraph=False) if compile_it else model.training_loss

    def loss() -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            value = training_loss(images, text, masks.mask, masks.positions, masks.targets)
        value.backward()
        return value.detach()

    return Training(model, loss, contextlib.nullcontext, flop_per_pair(config))


def flop_per_pair(config: ModelConfig) -> float:
    """What a step needs, whoever makes it: see `farl.flops`."""
    return training_flops(config, masked=mask_sizes(config.vision.grid)[0], caption_tokens=17)


NAMES = ["farl"]
if CUDA:
    NAMES += ["farl, ops without Triton", "farl, reference ops"]
NAMES += ["open_clip + BEiT"]
if CUDA:
    NAMES += ["open_clip + BEiT, torch.compile", "farl, one CUDA graph"]


def built(name: str, config: ModelConfig, pairs: int, precision: str) -> Training:
    autocast = precision == "bfloat16"
    if name.startswith("open_clip"):
        return peer(config, pairs, autocast, name.endswith("compile"))
    contexts: dict[str, Callable[[], Any]] = {
        "farl, ops without Triton": without_triton,
        "farl, reference ops": lambda: use_backend("reference"),
    }
    return farl(config, pairs, autocast, contexts.get(name, contextlib.nullcontext))


@functools.cache
def truth() -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the reference ops in float32 on a small batch."""
    return farl(CONFIG, CHECKED_PAIRS, False, lambda: use_backend("reference")).checked()


@functools.cache
def checked(name: str, precision: str) -> dict[str, float]:
    """Relative errors of the loss and of the gradients; NotMeasuredError where they are too large."""
    loss, grads = built(name, CONFIG, CHECKED_PAIRS, precision).checked()
    right, exact = truth()
    missing = exact.keys() - grads.keys()
    if missing:
        raise NotMeasuredError(f"wrong result: no gradient for {sorted(missing)[0]}")
    squares = sum((grads[key] - exact[key]).square().sum().item() for key in exact)
    norm = sum(x.square().sum().item() for x in exact.values())
    errors = {"loss": abs(loss / right - 1), "gradients": (squares / norm) ** 0.5}
    for (what, error), limit in zip(errors.items(), LIMITS[precision], strict=True):
        if not error <= limit:
            raise NotMeasuredError(f"wrong result: relative error of the {what} is {error:.2g}, allowed {limit:.2g}")
    return errors


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pairs", SIZES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_step(benchmark: Any, precision: str, pairs: int, name: str) -> None:
    model = "farl-b16" if CUDA else "small FaRL (192 x 12, 112 px)"
    labels = {"op": "whole step", "shape": f"{model}, {pairs} pairs, {precision}", "mode": "both", "contender": name}
    benchmark.group = f"{labels['op']} | {labels['shape']}"
    benchmark.extra_info |= labels
    reason = None
    try:
        check_ready()
        errors = checked(name, precision)
        measure(benchmark, name, pairs, precision, errors)
    except NotMeasuredError as error:
        reason = str(error)
    except torch.OutOfMemoryError:
        reason = "out of memory"
    except ImportError as error:
        reason = f"import failed: {error}"
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:200]}"
        if not name.startswith("open_clip"):
            NOT_MEASURED.append(labels | {"reason": f"failed: {reason}"})
            raise
    finally:
        # After the except clauses: what they caught held the model and its activations.
        clean_up(f"{name}, {pairs} pairs")
    if reason is None:
        return
    if not name.startswith("open_clip") and "wrong result" in reason:
        NOT_MEASURED.append(labels | {"reason": reason})
        raise AssertionError(reason)
    leave_out(labels, reason)


def measure(benchmark: Any, name: str, pairs: int, precision: str, errors: dict[str, float]) -> None:
    with side_stream() if CUDA else contextlib.nullcontext():
        training = built(name, CONFIG, pairs, precision)
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        timed = prepare([training], capture=name.endswith("CUDA graph"), rounds=7 if CUDA else 3)
        if name.endswith("CUDA graph") and not timed.captured:
            raise NotMeasuredError(f"cannot be captured: {timed.failure}")
        benchmark.pedantic(timed, rounds=timed.rounds, warmup_rounds=1 if CUDA else 0)
    if not benchmark.enabled:
        return
    peak = torch.cuda.max_memory_allocated() if CUDA else None
    record(benchmark, timed, training.flop_per_pair * pairs, 0.0, errors=errors, peak_bytes=peak)
    benchmark.extra_info["pairs_per_second"] = pairs / benchmark.extra_info["seconds"]
