"""Public functions of patch masking: validation of the arguments, then the backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from farl_kernels.checks import check_choice, check_device, describe
from farl_kernels.dispatch import Op
from farl_kernels.patch_masking import custom_ops, numpy_sampler, reference, torch_fused
from farl_kernels.patch_masking.block_plan import MAX_PATCHES, BlockPlan

# Backends in order of preference: the first that does not refuse a call serves it.
PATCHIFY = Op("patchify")
PATCHIFY.register("triton", custom_ops.patchify, custom_ops.patchify_refuses, custom_ops.patchify_declines)
PATCHIFY.register("reference", reference.patchify)

SAMPLE_BLOCK_MASKS = Op("sample_block_masks")
SAMPLE_BLOCK_MASKS.register(
    "triton", custom_ops.sample_block_masks, custom_ops.sample_refuses, custom_ops.sample_declines
)
SAMPLE_BLOCK_MASKS.register("numpy", numpy_sampler.sample_block_masks, numpy_sampler.refuses)
SAMPLE_BLOCK_MASKS.register("reference", reference.sample_block_masks)

MASK_PATCHES = Op("mask_patches")
MASK_PATCHES.register("triton", custom_ops.mask_patches, custom_ops.mask_refuses, custom_ops.mask_declines)
MASK_PATCHES.register("torch", torch_fused.mask_patches, torch_fused.refuses)
MASK_PATCHES.register("reference", reference.mask_patches)


def patchify(
    images: Tensor,
    patch_size: int,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype,
    backend: str | None = None,
) -> Tensor:
    """Cut images into the patch matrix that a projection GEMM takes.

    `patchify(x, p, ...) @ conv1.weight.flatten(1).T` is the patch convolution of a ViT.

    Args:
        images: uint8 [B, Hi, Wi, channels], normalised here as (x / 255 - mean) / std; or already normalised floats
            [B, channels, Hi, Wi], which may require grad.
        patch_size: side p of a patch in pixels; divides Hi and Wi.
        mean, std: one number a channel in 0..1, for uint8 images only; None is 0 and 1.
        dtype: floating dtype of the result. Pixels are normalised in fp32 (float64 for float64) and rounded once.
        backend: None, "triton" (uint8 with 3 channels, or floats; not float64) or "reference".

    Returns:
        [B, P, channels * p * p]; patches row by row, inside a patch (channel, row, column).

    Raises:
        ValueError: an argument of the wrong shape, dtype or range, or an unknown backend.
    """
    op = "patchify"
    if images.ndim != 4:
        raise ValueError(f"{op}: images is {describe(images)}, want 4 dimensions")
    if patch_size < 1:
        raise ValueError(f"{op}: patch_size is {patch_size}, want at least 1")
    if not dtype.is_floating_point:
        raise ValueError(f"{op}: dtype is {dtype}, want floating point")
    if images.dtype == torch.uint8:
        (height, width), channels, layout = images.shape[1:3], images.shape[3], "[B, height, width, channels]"
    elif images.is_floating_point():
        (height, width), channels, layout = images.shape[2:], images.shape[1], "[B, channels, height, width]"
        if mean is not None or std is not None:
            raise ValueError(f"{op}: mean or std is given, want None with float images, which come normalised")
    else:
        raise ValueError(f"{op}: images is {images.dtype}, want uint8 or floating point")
    if height % patch_size or width % patch_size or not height or not width:
        raise ValueError(
            f"{op}: images is {describe(images)}, want {layout} with height and width multiples of "
            f"patch_size {patch_size}"
        )
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != channels:
            raise ValueError(f"{op}: {name} has {len(values)} numbers, want {channels}, one a channel")
    if std is not None and min(std) <= 0:
        raise ValueError(f"{op}: std is {tuple(std)}, want positive numbers")
    return PATCHIFY(backend, images, patch_size, mean, std, dtype)


def sample_block_masks(
    sample_ids: Tensor,
    views: Tensor,
    *,
    grid: tuple[int, int],
    max_masked: int,
    min_block: int = 16,
    seed: int,
    mode: str = "block",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose the patches to mask: a pure function of (seed, sample id, view), on the device, without a host sync.

    The same three numbers give the same mask, bit for bit, on every device, in any batch, on any rank. The first call
    with mode "block" on a device copies a table of 32 KB there and waits for it: make one before a CUDA graph is
    captured, or recorded by ``torch.compile(mode="reduce-overhead")``.

    Args:
        sample_ids, views: int64 [B] on one device.
        grid: (rows, columns) of patches; P = rows * columns.
        max_masked: the most patches to mask of a sample, 1..P.
        min_block: smallest area of a block in patches (mode "block"). Lowered to `max_masked` and to
            (min(rows, columns) - 1)^2, so that 16, made for 14 x 14, also works on small grids.
        seed: any integer; its low 64 bits count.
        mode: "block" is the block-wise sampling of BEiT (Bao et al. 2021): blocks with area uniform in
            [min_block, patches left] and aspect ratio log-uniform in 0.3..1/0.3, up to 10 tries a block, until nothing
            is added: at most, not always, `max_masked` patches. "random" masks exactly `max_masked` patches.
        backend: None, "triton" (grids up to 64 x 64), "numpy" (CPU tensors) or "reference".

    Returns:
        mask bool [B, P], True = masked; positions int32 [B, max_masked], the masked patches ascending, padded with -1.

    Raises:
        ValueError: an argument of the wrong shape, dtype or range, or a backend that cannot run the call.
    """
    op = "sample_block_masks"
    for name, values in (("sample_ids", sample_ids), ("views", views)):
        if values.dtype != torch.int64 or values.ndim != 1:
            raise ValueError(f"{op}: {name} is {describe(values)}, want int64 [B]")
    if views.shape != sample_ids.shape:
        raise ValueError(
            f"{op}: views has shape {tuple(views.shape)}, want {tuple(sample_ids.shape)}, the shape of sample_ids"
        )
    check_device(op, "views", views, "sample_ids", sample_ids)
    if len(grid) != 2 or min(grid) < 1 or grid[0] * grid[1] > MAX_PATCHES:
        raise ValueError(f"{op}: grid is {tuple(grid)}, want (rows, columns) with 1..{MAX_PATCHES} patches")
    rows, columns = grid
    if not 1 <= max_masked <= rows * columns:
        raise ValueError(f"{op}: max_masked is {max_masked}, want 1..{rows * columns} for a grid of {rows} x {columns}")
    check_choice(op, "mode", mode, ("block", "random"))
    if min_block < 1:
        raise ValueError(f"{op}: min_block is {min_block}, want at least 1")
    if mode == "block" and min(grid) < 2:
        raise ValueError(
            f"{op}: grid is {rows} x {columns}, want at least 2 rows and 2 columns with mode 'block'; use 'random'"
        )
    plan = BlockPlan.build((rows, columns), max_masked, min_block)
    return SAMPLE_BLOCK_MASKS(backend, sample_ids, views, plan, seed, mode)


def mask_positions(mask: Tensor, count: int) -> Tensor:
    """bool [B, P] -> int32 [B, count]: indices of the True entries, ascending, padded with -1; no host sync.

    `mask_positions(~mask, P - max_masked)` is `visible` for `mask_patches(mode="gather")` after "random" sampling.

    Raises:
        ValueError: `mask` is not bool [B, P], or `count` is not in 1..P.
    """
    op = "mask_positions"
    if mask.dtype != torch.bool or mask.ndim != 2:
        raise ValueError(f"{op}: mask is {describe(mask)}, want bool [B, P]")
    if not 1 <= count <= mask.shape[1]:
        raise ValueError(f"{op}: count is {count}, want 1..{mask.shape[1]}")
    return reference.mask_positions(mask, count)


def mask_patches(
    embeddings: Tensor,
    mask: Tensor | None,
    *,
    mask_token: Tensor | None,
    class_token: Tensor,
    position_embedding: Tensor,
    mode: str,
    visible: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Turn patch embeddings into the sequences that the trunk takes: class token in front, position embedding added.

    Args:
        embeddings: floats [B, P, C].
        mask: bool [B, P], True = replace the embedding by `mask_token` (before the position embedding is added).
            Not read in modes "gather" and "plain", where it may be None.
        mask_token: [C], or with leading dimensions of size 1; None only in modes "gather" and "plain".
        class_token: [C], or with leading dimensions of size 1.
        position_embedding: [P + 1, C] (or [1, P + 1, C]); row 0 belongs to the class token.
        mode: "fork" returns the clean sequences, then the masked ones; "mask" the masked ones; "gather" the class token
            and the `visible` patches alone (MAE, FLIP); "plain" the clean ones, as any ViT without masking starts.
        visible: int32 or int64 [B, K], distinct patch indices of a sample; -1 pads, giving a row of zeros.
        backend: None, "triton" (not float64), "torch" or "reference".

    Returns:
        "fork" [2 B, P + 1, C], "mask" and "plain" [B, P + 1, C], "gather" [B, K + 1, C], in the dtype of `embeddings`;
        sums are made in the widest dtype given and rounded once. Gradients of the parameters are summed in fp32 at
        least, in a fixed order, and have the parameters' dtypes.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, or an unknown backend.
    """
    op = "mask_patches"
    if embeddings.ndim != 3 or not embeddings.is_floating_point():
        raise ValueError(f"{op}: embeddings is {describe(embeddings)}, want floating point [B, P, C]")
    batch, patches, channels = embeddings.shape
    check_choice(op, "mode", mode, ("fork", "mask", "gather", "plain"))
    class_token = _parameter("class_token", class_token, (channels,), embeddings)
    position_embedding = _parameter("position_embedding", position_embedding, (patches + 1, channels), embeddings)
    if mode == "gather":
        if visible is None:
            raise ValueError(f"{op}: visible is None, want int32 [{batch}, K] with mode 'gather'")
        if visible.dtype not in (torch.int32, torch.int64) or visible.ndim != 2 or visible.shape[0] != batch:
            raise ValueError(f"{op}: visible is {describe(visible)}, want int32 [{batch}, K]")
        check_device(op, "visible", visible, "embeddings", embeddings)
        mask = mask_token = None
    elif visible is not None:
        raise ValueError(f"{op}: visible is given, want None with mode {mode!r}")
    elif mode == "plain":
        mask = mask_token = None
    else:
        if mask is None or mask.dtype != torch.bool or mask.shape != (batch, patches):
            raise ValueError(f"{op}: mask is {describe(mask)}, want bool [{batch}, {patches}]")
        check_device(op, "mask", mask, "embeddings", embeddings)
        if mask_token is None:
            raise ValueError(f"{op}: mask_token is None, want [{channels}] with mode {mode!r}")
        mask_token = _parameter("mask_token", mask_token, (channels,), embeddings)
    return MASK_PATCHES(backend, embeddings, mask, mask_token, class_token, position_embedding, mode, visible)


def _parameter(name: str, value: Tensor, shape: tuple[int, ...], embeddings: Tensor) -> Tensor:
    """`value` in `shape`; leading dimensions of size 1 are dropped."""
    lead = value.ndim - len(shape)
    if lead < 0 or tuple(value.shape[lead:]) != shape or any(size != 1 for size in value.shape[:lead]):
        raise ValueError(f"mask_patches: {name} has shape {tuple(value.shape)}, want {shape}")
    if not value.is_floating_point():
        raise ValueError(f"mask_patches: {name} is {value.dtype}, want floating point")
    check_device("mask_patches", name, value, "embeddings", embeddings)
    return value.reshape(shape)
