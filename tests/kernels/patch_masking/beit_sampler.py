"""BEiT's block-wise sampling in plain Python and floating point: what the vectorised integer sampler must resemble."""

from __future__ import annotations

import math
import random

import numpy as np


def one_try(
    mask: np.ndarray, left: int, min_block: int, rng: random.Random
) -> tuple[int, tuple[int, int, int, int] | None]:
    """One try to add a block to `mask` in place: patches added, and the block (top, start, height, width) if any."""
    rows, columns = mask.shape
    area = rng.uniform(min_block, left)
    aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
    height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if height >= rows or width >= columns:
        return 0, None
    top, start = rng.randint(0, rows - height), rng.randint(0, columns - width)
    block = mask[top : top + height, start : start + width]
    added = block.size - int(block.sum())
    if not 0 < added <= left:
        return 0, None
    block[:] = True
    return added, (top, start, height, width)


def sample(rows: int, columns: int, max_masked: int, min_block: int, rng: random.Random) -> np.ndarray:
    """bool [rows, columns]."""
    mask = np.zeros((rows, columns), dtype=bool)
    left = max_masked
    while left > 0:
        for _ in range(10):
            added, _block = one_try(mask, left, min_block, rng)
            if added:
                break
        else:
            break
        left -= added
    return mask
