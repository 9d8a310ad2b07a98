"""A training step whose figures mean nothing, for tests that count its work or its memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from farl.masking import MASK_RATIO
from farl.model import FaRL, ModelConfig, PackedText
from farl.step import TextParts, TrainStep
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
