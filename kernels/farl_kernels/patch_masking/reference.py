"""Patch matrix, mask sampling and patch masking in plain PyTorch: the truth, on any device, without host sync."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from farl_kernels.patch_masking.block_plan import (
    ASPECT_SHIFT,
    ASPECT_TABLE,
    TRIES_PER_BLOCK,
    UNIFORM_BITS,
    BlockPlan,
    side_thresholds,
)
from farl_kernels.patch_masking.counter_random import draws, logical_right_shift, sample_keys
from farl_kernels.precision import accumulation_dtype


def patchify(
    images: Tensor,
    patch_size: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    dtype: torch.dtype,
) -> Tensor:
    """See :func:`farl_kernels.patch_masking.op.patchify`. Computes in fp32, or in float64 when that is asked for."""
    pixels = images.permute(0, 3, 1, 2) if images.dtype == torch.uint8 else images
    tiles = pixels.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # [B, channel, rows, p, columns, p]
    patches = tiles.permute(0, 2, 4, 1, 3, 5).flatten(1, 2).flatten(3)  # [B, P, channel, p * p]
    if images.dtype != torch.uint8:
        return patches.to(dtype).flatten(2)
    # Pixels move as bytes and their copy is normalised in place: 2-3 times faster on a CPU than a chain of tensors.
    values = patches.contiguous().to(torch.float64 if dtype == torch.float64 else torch.float32).div_(255)
    if mean is not None:
        values.sub_(_column(mean, values))
    if std is not None:
        values.div_(_column(std, values))
    return values.to(dtype).flatten(2)


def unpatchify(grad: Tensor, shape: Sequence[int], patch_size: int, dtype: torch.dtype) -> Tensor:
    """The gradient [B, P, channels * p * p] of a patch matrix -> that of float images `shape` [B, channels, Hi, Wi]."""
    batch, channels, height, width = shape
    tiles = grad.reshape(batch, height // patch_size, width // patch_size, channels, patch_size, patch_size)
    return tiles.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width).to(dtype)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """[channels, 1] filled on the device: a copy from the host would sync and could not be captured in a CUDA graph."""
    return torch.stack([torch.full((1,), float(v), dtype=like.dtype, device=like.device) for v in values])


def sample_block_masks(
    sample_ids: Tensor, views: Tensor, plan: BlockPlan, seed: int, mode: str
) -> tuple[Tensor, Tensor]:
    """See :func:`farl_kernels.patch_masking.op.sample_block_masks`."""
    keys = sample_keys(sample_ids, views, seed)
    if mode == "random":
        mask = _random_masks(keys, plan)
    else:
        mask = _block_masks(keys, plan)
    return mask, mask_positions(mask, plan.max_masked)


def _block_masks(keys: Tensor, plan: BlockPlan) -> Tensor:
    """One try of every sample at a time; a sample that is done only spins."""
    device = keys.device
    aspects = on_device(ASPECT_TABLE, device)
    thresholds = on_device(side_thresholds(max(plan.rows, plan.columns)), device)
    row = torch.arange(plan.rows, device=device)[None, :, None]
    column = torch.arange(plan.columns, device=device)[None, None, :]
    numbers = draws(keys, 0, 2 * plan.tries)
    first = logical_right_shift(numbers, 64 - UNIFORM_BITS)
    second = logical_right_shift(numbers, 64 - 2 * UNIFORM_BITS) & ((1 << UNIFORM_BITS) - 1)

    mask = torch.zeros(len(keys), plan.rows, plan.columns, dtype=torch.bool, device=device)
    left = torch.full_like(keys, plan.max_masked)
    failures = torch.zeros_like(keys)
    for step in range(plan.tries):
        area = (plan.min_block << UNIFORM_BITS) + first[:, 2 * step] * (left - plan.min_block)
        aspect = second[:, 2 * step] >> ASPECT_SHIFT
        height = torch.searchsorted(thresholds, 4 * area * aspects[aspect], right=True)
        width = torch.searchsorted(thresholds, 4 * area * aspects[len(aspects) - 1 - aspect], right=True)
        top = (first[:, 2 * step + 1] * (plan.rows - height + 1)) >> UNIFORM_BITS
        start = (second[:, 2 * step + 1] * (plan.columns - width + 1)) >> UNIFORM_BITS

        top, start = top[:, None, None], start[:, None, None]
        in_rows = (row >= top) & (row < top + height[:, None, None])
        in_columns = (column >= start) & (column < start + width[:, None, None])
        new = in_rows & in_columns & ~mask
        added = new.sum((1, 2))
        active = (failures < TRIES_PER_BLOCK) & (left > 0)
        fits = (height < plan.rows) & (width < plan.columns) & (added > 0) & (added <= left)
        accepted = active & fits
        mask = mask | (new & accepted[:, None, None])
        left = torch.where(accepted, left - added, left)
        failures = torch.where(accepted, 0, failures + active)
    return mask.flatten(1)


_tables: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}


def on_device(values: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 tensor of a constant table, copied to each device once: a later call neither syncs nor breaks a capture."""
    if not torch.compiler.is_compiling() and (values, device) in _tables:
        return _tables[values, device]
    table = torch.tensor(values, dtype=torch.int64, device=device)
    if type(table) is Tensor and not torch.compiler.is_compiling():  # a traced or fake tensor must not stay here
        _tables[values, device] = table
    return table


def _random_masks(keys: Tensor, plan: BlockPlan) -> Tensor:
    """Exactly `max_masked` patches, every set of them equally likely: those with the smallest random numbers."""
    patches = plan.rows * plan.columns
    # 40 random bits over the patch's index: no two are equal, so the set does not depend on how ties are sorted.
    order = (logical_right_shift(draws(keys, 0, patches), 24) << 18) | torch.arange(patches, device=keys.device)
    chosen = order.topk(plan.max_masked, largest=False, sorted=False).indices
    return torch.zeros_like(order, dtype=torch.bool).scatter_(1, chosen, True)


def mask_positions(mask: Tensor, count: int) -> Tensor:
    """bool [B, P] -> int32 [B, count]: the indices of the True entries, ascending, padded with -1.

    A static shape without a host sync. Entries past the first `count` of a row are left out.
    """
    patches = mask.shape[1]
    slot = mask.cumsum(1) - 1
    # Column `count` takes what is not wanted and is cut off; its value, which depends on the order, is never read.
    slot = torch.where(mask & (slot < count), slot, count)
    index = torch.arange(patches, dtype=torch.int32, device=mask.device).expand(mask.shape)
    positions = torch.full((mask.shape[0], count + 1), -1, dtype=torch.int32, device=mask.device)
    return positions.scatter_(1, slot, index)[:, :count].contiguous()


def mask_patches(
    embeddings: Tensor,
    mask: Tensor | None,
    mask_token: Tensor | None,
    class_token: Tensor,
    position_embedding: Tensor,
    mode: str,
    visible: Tensor | None,
) -> Tensor:
    """See :func:`farl_kernels.patch_masking.op.mask_patches`. Sums in the widest dtype given, rounds once."""
    class_row = class_token + position_embedding[0]
    patches = embeddings + position_embedding[1:]
    if mode == "gather":
        assert visible is not None
        index = visible.long().clamp(min=0)[:, :, None].expand(-1, -1, patches.shape[2])
        patches = torch.where(visible[:, :, None] >= 0, patches.gather(1, index), 0.0)
    elif mode != "plain":
        assert mask is not None and mask_token is not None
        masked = torch.where(mask[:, :, None], mask_token + position_embedding[1:], patches)
        patches = masked if mode == "mask" else torch.cat([patches, masked])
    sequences = torch.cat([class_row.expand(patches.shape[0], 1, -1), patches], dim=1)
    return sequences.to(embeddings.dtype)


def mask_patches_backward(
    grad: Tensor,
    mask: Tensor | None,
    visible: Tensor | None,
    patches: int,
    embeddings_dtype: torch.dtype | None,
    mask_token_dtype: torch.dtype | None,
    class_token_dtype: torch.dtype | None,
    position_dtype: torch.dtype | None,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of embeddings, mask token, class token and position embedding; of no elements where no dtype is given.

    Added up in fp32 at least, and rounded once.
    """
    accumulate = accumulation_dtype(grad.dtype)
    rows = grad.to(accumulate)
    if mode == "fork":
        clean, masked = rows.chunk(2)
        whole = clean + masked
    else:
        clean, masked, whole = torch.zeros_like(rows), rows, rows
    if visible is not None:
        # Row 0 takes the padding and is dropped.
        index = (visible.long() + 1).clamp(min=0)[:, :, None].expand(-1, -1, rows.shape[2])
        listed = rows.new_zeros(len(rows), patches + 1, rows.shape[2]).scatter_add(1, index, rows[:, 1:])
        whole = torch.cat([rows[:, :1], listed[:, 1:]], dim=1)
    position = whole.sum(0)
    mask_token = position.new_zeros(rows.shape[2])
    embeddings = whole[:, 1:]
    if mask is not None:
        embeddings = clean[:, 1:] + torch.where(mask[:, :, None], 0.0, masked[:, 1:])
        mask_token = torch.where(mask[:, :, None], masked[:, 1:], 0.0).sum((0, 1))

    def given(x: Tensor, dtype: torch.dtype | None) -> Tensor:
        return rows.new_empty(0, dtype=torch.float32) if dtype is None else x.to(dtype, copy=True).contiguous()

    return (
        given(embeddings, embeddings_dtype),
        given(mask_token, mask_token_dtype),
        given(position[0], class_token_dtype),
        given(position, position_dtype),
    )
