"""The numbers that every implementation of the block sampler shares.

BEiT (Bao et al. 2021, `beit/masking_generator.py` of microsoft/unilm) draws the area of a block uniformly from
[min_block, patches left to mask], its aspect ratio log-uniformly from [0.3, 1/0.3], and takes

    height = round(sqrt(area * aspect)),  width = round(sqrt(area / aspect)).

`exp`, `log` and `sqrt` differ in the last bit between devices, and a last bit can move a rounding. Here all of it is
integer arithmetic, the same everywhere:

- a uniform number is an integer u of 24 bits;
- area in units of 2^-24 is `(min_block << 24) + u * (left - min_block)`;
- the aspect ratio is one of 4,096 log-uniform values (neighbours differ by 0.06 %) in units of 2^-16, from a table.
  The table read backwards holds the inverse ratios;
- round(sqrt(x)) >= k exactly when 4 x >= (2 k - 1)^2, so the height is the number of thresholds that
  `4 * area * aspect`, in units of 2^-40, reaches;
- a position among n is `(u * n) >> 24`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

UNIFORM_BITS = 24
ASPECT_BITS = 16
ASPECT_COUNT = 4096
ASPECT_SHIFT = UNIFORM_BITS - 12  # a 24-bit uniform number -> an index of the table
MIN_ASPECT = 0.3
TRIES_PER_BLOCK = 10
# 4 * area * aspect must stay below 2^63: area < 2^18, aspect < 2^18, with 24 fractional bits.
MAX_PATCHES = 1 << 18


def _log_uniform_aspects() -> tuple[int, ...]:
    """Log-uniform aspect ratios, ascending, in units of 2^-16."""
    low, high = math.log(MIN_ASPECT), -math.log(MIN_ASPECT)
    step = (high - low) / ASPECT_COUNT
    return tuple(round(math.exp(low + (i + 0.5) * step) * (1 << ASPECT_BITS)) for i in range(ASPECT_COUNT))


ASPECT_TABLE = _log_uniform_aspects()


def side_thresholds(longest: int) -> tuple[int, ...]:
    """`4 * area * aspect` (units of 2^-40) from which the rounded side is at least 1, 2, .. `longest`."""
    return tuple((2 * k - 1) ** 2 << (UNIFORM_BITS + ASPECT_BITS) for k in range(1, longest + 1))


@dataclass(frozen=True)
class BlockPlan:
    """A validated request of block-wise masks: `rows` x `columns` patches, at most `max_masked` of them masked."""

    rows: int
    columns: int
    max_masked: int
    min_block: int
    tries: int

    @classmethod
    def build(cls, grid: tuple[int, int], max_masked: int, min_block: int) -> BlockPlan:
        """Adapt `min_block` to small grids and fix the number of tries.

        A block is lower and narrower than the grid, so the smallest area is lowered to `max_masked` and to that of the
        largest square which fits, (min(rows, columns) - 1)^2. BEiT tries for as long as blocks are added; a loop
        of fixed length serves all samples here. At 75 of 14 x 14 a sample needs 11 tries on average, 36 is the most
        seen in 3,000 samples, and 64 are made; above half of the patches (more rounds) it is 128.
        """
        rows, columns = grid
        fits = (min(rows, columns) - 1) ** 2
        tries = 64 if 2 * max_masked <= rows * columns else 128
        return cls(rows, columns, max_masked, min(min_block, max_masked, fits), tries)
