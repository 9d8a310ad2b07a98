from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from farl.model import FaRL, MimConfig, ModelConfig, PackedText, TextConfig, VisionConfig

SMALL = ModelConfig(
    embed_dim=12,
    vision=VisionConfig(image_size=24, patch_size=8, width=16, layers=3, heads=2),
    text=TextConfig(width=16, layers=2, heads=4, context_length=11, vocab_size=50),
    mim=MimConfig(layers=1, vocab_size=14),
)


@dataclass
class Pairs:
    """A batch: three images of 3 x 3 patches and three captions, masks of unequal size."""

    images: torch.Tensor
    token_ids: torch.Tensor
    text: PackedText
    mask: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor


@pytest.fixture
def config() -> ModelConfig:
    return SMALL


@pytest.fixture
def make_model() -> Callable[..., FaRL]:
    def make(config: ModelConfig = SMALL, dtype: torch.dtype = torch.float64, **changes: object) -> FaRL:
        torch.manual_seed(0)
        model = FaRL(replace(config, **changes)).to(dtype)
        # Biases and LayerNorms at their initial 0 and 1 would hide a misplaced one.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        return model

    return make


@pytest.fixture
def pairs() -> Pairs:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (3, 24, 24, 3), dtype=torch.uint8, generator=generator)
    token_ids = torch.zeros(3, 11, dtype=torch.int64)
    for row, length in enumerate((5, 11, 2)):
        token_ids[row, 0] = 48
        token_ids[row, 1 : length - 1] = torch.randint(1, 48, (length - 2,), generator=generator)
        token_ids[row, length - 1] = 49
    positions = torch.tensor([[0, 4, 5, 8], [2, -1, -1, -1], [1, 2, 3, -1]], dtype=torch.int32)
    mask = torch.zeros(3, 9, dtype=torch.bool)
    for row, where in enumerate(positions):
        mask[row, where[where >= 0].long()] = True
    targets = torch.randint(0, 14, positions.shape, generator=generator).masked_fill(positions < 0, -1)
    return Pairs(images, token_ids, PackedText.from_padded(token_ids), mask, positions, targets)
