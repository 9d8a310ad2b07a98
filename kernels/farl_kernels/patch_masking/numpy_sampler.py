"""`sample_block_masks` on a CPU: the same masks as the reference, bit for bit, with far less work.

A row of patches is kept as bits, so that a block is tested and added with a few operations on [B, rows] words, and
samples that are done leave the batch (a sample makes 11 tries on average, the slowest of a batch about 35).
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from farl_kernels.patch_masking.block_plan import (
    ASPECT_COUNT,
    ASPECT_SHIFT,
    ASPECT_TABLE,
    TRIES_PER_BLOCK,
    UNIFORM_BITS,
    BlockPlan,
    side_thresholds,
)
from farl_kernels.patch_masking.counter_random import draws_numpy, sample_keys_numpy

_WORD_BITS = 16
_TRIES_AT_ONCE = 16  # random numbers are drawn for this many tries ahead


def refuses(sample_ids: Tensor, *_: object) -> str | None:
    """Why this backend cannot serve a call: it needs real CPU tensors."""
    if sample_ids.device.type != "cpu":
        return f"it runs on CPU tensors, sample_ids are on {sample_ids.device}"
    if torch.compiler.is_compiling():
        return "it cannot be traced by torch.compile"
    return None


def sample_block_masks(
    sample_ids: Tensor, views: Tensor, plan: BlockPlan, seed: int, mode: str
) -> tuple[Tensor, Tensor]:
    """See :func:`farl_kernels.patch_masking.op.sample_block_masks`."""
    keys = sample_keys_numpy(sample_ids.numpy(), views.numpy(), seed)
    mask = _random_masks(keys, plan) if mode == "random" else _block_masks(keys, plan)
    sample, patch = np.nonzero(mask)
    count = mask.sum(1)
    slot = np.arange(len(sample)) - np.repeat(np.cumsum(count) - count, count)
    positions = np.full((len(keys), plan.max_masked), -1, dtype=np.int32)
    positions[sample, slot] = patch
    return torch.from_numpy(mask), torch.from_numpy(positions)


def _random_masks(keys: np.ndarray, plan: BlockPlan) -> np.ndarray:
    patches = plan.rows * plan.columns
    order = ((draws_numpy(keys, 0, patches) >> np.uint64(24)) << np.uint64(18)) | np.arange(patches, dtype=np.uint64)
    chosen = np.argpartition(order, plan.max_masked - 1, axis=1)[:, : plan.max_masked]
    mask = np.zeros((len(keys), patches), dtype=bool)
    np.put_along_axis(mask, chosen, True, axis=1)
    return mask


def _block_masks(keys: np.ndarray, plan: BlockPlan) -> np.ndarray:
    tables = _Tables.of(plan.rows, plan.columns)
    words = np.zeros((len(keys), plan.rows, tables.column_words.shape[-1]), dtype=np.uint16)
    # State of the samples that are still at work, and where they stand in the batch.
    sample = np.arange(len(keys))
    mask, left, failures = words.copy(), np.full(len(keys), plan.max_masked), np.zeros(len(keys), dtype=np.int64)
    numbers = np.empty((len(keys), 0, 2), dtype=np.uint64)
    for step in range(plan.tries):
        if step % _TRIES_AT_ONCE == 0:
            numbers = draws_numpy(keys[sample], 2 * step, 2 * _TRIES_AT_ONCE).reshape(-1, _TRIES_AT_ONCE, 2)
        number = numbers[:, step % _TRIES_AT_ONCE]
        first = (number >> np.uint64(64 - UNIFORM_BITS)).astype(np.int64)
        second = ((number >> np.uint64(64 - 2 * UNIFORM_BITS)) & np.uint64((1 << UNIFORM_BITS) - 1)).astype(np.int64)

        area = (plan.min_block << UNIFORM_BITS) + first[:, 0] * (left - plan.min_block)
        aspect = second[:, 0] >> ASPECT_SHIFT
        height = np.searchsorted(tables.thresholds, 4 * area * tables.aspects[aspect], side="right")
        width = np.searchsorted(tables.thresholds, 4 * area * tables.aspects[ASPECT_COUNT - 1 - aspect], side="right")
        # A block too large for the grid is refused below; until then it only has to index the tables.
        in_grid = (height < plan.rows) & (width < plan.columns)
        height, width = np.minimum(height, plan.rows), np.minimum(width, plan.columns)
        top = (first[:, 1] * (plan.rows - height + 1)) >> UNIFORM_BITS
        start = (second[:, 1] * (plan.columns - width + 1)) >> UNIFORM_BITS

        new = tables.row_words[height, top][:, :, None] & tables.column_words[width, start][:, None, :] & ~mask
        added = tables.bit_count[new].sum((1, 2), dtype=np.int64)
        accepted = in_grid & (added > 0) & (added <= left)
        mask[accepted] |= new[accepted]
        left -= added * accepted
        failures = np.where(accepted, 0, failures + 1)

        active = (left > 0) & (failures < TRIES_PER_BLOCK)
        if not active.all():
            words[sample[~active]] = mask[~active]
            sample, mask, left, failures = sample[active], mask[active], left[active], failures[active]
            numbers = numbers[active]
            if not len(sample):
                break
    words[sample] = mask
    bits = (words[..., None] >> np.arange(_WORD_BITS, dtype=np.uint16)) & np.uint16(1)
    return (
        bits.astype(bool)
        .reshape(len(keys), plan.rows, words.shape[2] * _WORD_BITS)[:, :, : plan.columns]
        .reshape(len(keys), plan.rows * plan.columns)
    )


class _Tables:
    """Constants of one grid: blocks as bits of rows and columns, and the integers of the block plan."""

    def __init__(self, rows: int, columns: int) -> None:
        self.aspects = np.array(ASPECT_TABLE, dtype=np.int64)
        self.thresholds = np.array(side_thresholds(max(rows, columns)), dtype=np.int64)
        self.bit_count = np.array([value.bit_count() for value in range(1 << _WORD_BITS)], dtype=np.uint8)
        # row_words[height, top]: all bits of the words in rows top .. top + height - 1.
        self.row_words = _intervals(rows).astype(np.uint16) * np.uint16(0xFFFF)
        # column_words[width, start]: bits start .. start + width - 1 over ceil(columns / 16) words.
        inside = _intervals(columns)
        inside = np.pad(inside, ((0, 0), (0, 0), (0, -columns % _WORD_BITS)))
        grouped = inside.reshape(columns + 1, columns + 1, -1, _WORD_BITS).astype(np.uint16)
        self.column_words = (grouped << np.arange(_WORD_BITS, dtype=np.uint16)).sum(-1, dtype=np.uint16)

    @staticmethod
    @functools.lru_cache(maxsize=16)
    def of(rows: int, columns: int) -> _Tables:
        return _Tables(rows, columns)


def _intervals(size: int) -> np.ndarray:
    """bool [size + 1, size + 1, size]: entry [length, start, i] tells whether start <= i < start + length."""
    length, start, index = np.ogrid[: size + 1, : size + 1, :size]
    return (index >= start) & (index < start + length)
