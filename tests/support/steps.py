"""Small training steps: on blanks, for tests that count work or memory, and on something to learn."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from farl.masking import MASK_RATIO
from farl.model import FaRL, ModelConfig, PackedText
from farl.step import TextParts, TrainStep, pack_parts
from farl_engine.data import Batch
from farl_engine.distributed import World


class NoTokenizer:
    """The batches bring their visual tokens."""

    token_image_size = None
    vocab_size = 1

    def __call__(self, images: Tensor, positions: Tensor | None = None) -> Tensor:
        raise AssertionError


def step_on_blanks(
    config: ModelConfig,
    device: torch.device,
    pairs: int,
    parts: int = 1,
    *,
    caption: int,
    contrast: bool = True,
    bf16: bool = False,
    change: Callable[[FaRL], object] | None = None,
) -> tuple[TrainStep, FaRL, Batch]:
    """A step, its model, and its batch of `parts` micro-batches of `pairs` black images.

    Args:
        caption: tokens in each caption.
        change: is done to the model before.
    """
    vision, share = config.vision, pairs * parts
    with device:
        torch.manual_seed(0)
        model = FaRL(config)
        starts = torch.arange(0, pairs * caption + 1, caption, dtype=torch.int32)
        text = PackedText(torch.ones(pairs * caption, dtype=torch.int64), starts, caption)
        batch = Batch(
            step=0,
            ids=torch.arange(share),
            used_ids=torch.arange(share),
            views=torch.zeros(share, dtype=torch.int64),
            images=torch.zeros(share, vision.image_size, vision.image_size, 3, dtype=torch.uint8),
            token_images=None,
            captions=[],
            text=TextParts((text,) * parts),
            visual_tokens=torch.zeros(share, vision.num_patches, dtype=torch.int32),
        )
    if not contrast:
        model.train_masked_branch_alone()
    if change is not None:
        change(model)
    step = TrainStep(
        model,
        World(rank=0, size=1, device=device, control=None),
        NoTokenizer() if config.mim is not None else None,
        mim_weight=1.0,
        contrastive_weight=float(contrast),
        mask_ratio=MASK_RATIO,
        seed=0,
        bf16=bf16,
    )
    return step, model, batch


class Brightness:
    """A stand-in tokenizer: the mean of a patch's pixels, in 16 levels."""

    vocab_size = 16
    token_image_size = None

    def __call__(self, images: Tensor, positions: Tensor | None = None) -> Tensor:
        assert positions is not None
        tokens = images.float().unfold(1, 8, 8).unfold(2, 8, 8).mean((3, 4, 5)).div(16).long().flatten(1)
        return tokens.gather(1, positions.long().clamp(min=0)).masked_fill(positions < 0, -1)


def coloured_batch(
    step: int, pairs: int, captions_of: Callable[[list[int]], list[str]], *, micro_batch: int = 0, pad: bool = False
) -> Batch:
    """Pictures of 32 pixels in one of four brightnesses, and captions of them: something to learn for farl-micro.

    Args:
        captions_of: a caption for each of the pictures' brightnesses, 0 to 3.
        micro_batch, pad: as of `pack_parts`.
    """
    generator = torch.Generator().manual_seed(step)
    kinds = torch.randint(0, 4, (pairs,), generator=generator)
    noise = torch.randint(0, 64, (pairs, 32, 32, 3), generator=generator)
    captions = captions_of(kinds.tolist())
    return Batch(
        step=step,
        ids=torch.arange(pairs) + step * pairs,
        used_ids=torch.arange(pairs),
        views=torch.zeros(pairs, dtype=torch.int64),
        images=(noise + 48 * kinds[:, None, None, None]).to(torch.uint8),
        token_images=None,
        captions=captions,
        text=pack_parts(captions, micro_batch, pad=pad),
    )
