"""How much of an image is masked."""

from __future__ import annotations

# BEiT masks at most 75 of 196 patches, in blocks of at least 16 (microsoft/unilm, beit/masking_generator.py).
MASK_RATIO = 75 / 196
BLOCK_RATIO = 16 / 196


def mask_sizes(grid: tuple[int, int], ratio: float = MASK_RATIO) -> tuple[int, int]:
    """The most patches to mask on a grid of (rows, columns), and the smallest block: BEiT's shares of it."""
    patches = grid[0] * grid[1]
    return max(1, round(patches * ratio)), max(1, round(patches * BLOCK_RATIO))
