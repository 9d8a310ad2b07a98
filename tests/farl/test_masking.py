from __future__ import annotations

import pytest
import torch

from farl.masking import MASK_RATIO, mask_sizes
from farl.model import MODELS
from farl_kernels import sample_block_masks


@pytest.mark.parametrize(
    ("grid", "ratio", "sizes"),
    [
        ((14, 14), MASK_RATIO, (75, 16)),  # BEiT's numbers
        ((16, 16), MASK_RATIO, (98, 21)),
        ((8, 8), MASK_RATIO, (24, 5)),
        ((4, 4), MASK_RATIO, (6, 1)),
        ((8, 8), 1.0, (64, 5)),
        ((4, 4), 1e-6, (1, 1)),
    ],
)
def test_shares_of_the_grid(grid: tuple[int, int], ratio: float, sizes: tuple[int, int]) -> None:
    assert mask_sizes(grid, ratio) == sizes


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ratio", [1e-6, MASK_RATIO, 1.0])
def test_every_model_can_be_masked_so(name: str, ratio: float) -> None:
    grid = MODELS[name].vision.grid
    most, smallest = mask_sizes(grid, ratio)
    ids = torch.arange(8)
    mask, _ = sample_block_masks(ids, ids, grid=grid, max_masked=most, min_block=smallest, seed=0)
    assert 1 <= int(mask.sum(1).max()) <= most
