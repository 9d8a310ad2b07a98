"""Starts the kernels of patch masking."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from farl_kernels import tables
from farl_kernels.launch import launch
from farl_kernels.patch_masking import kernels
from farl_kernels.patch_masking.block_plan import ASPECT_TABLE
from farl_kernels.patch_masking.counter_random import seed_state
from farl_kernels.patch_masking.reference import on_device

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def patchify(
    images: Tensor, patch_size: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """uint8 [B, H, W, 3] with three of `mean` and `std`, or floats [B, C, H, W] with none -> [B, P, C * p * p]."""
    if images.dtype == torch.uint8:
        batch, height, width, channels = images.shape
    else:
        batch, channels, height, width = images.shape
    columns = width // patch_size
    count = height // patch_size * columns
    patches = torch.empty(batch, count, channels * patch_size**2, dtype=dtype, device=images.device)
    scales = _affine(mean, std)
    group, words = _words(images, _group(patch_size, patches))
    if words is None:
        _pixels(images, patches, scales, patch_size, inverse=False)
        return patches
    units = count * patch_size**2 // group
    config = tables.lookup("patch_masking", "patchify_bytes", _bucket(patches), images.device)
    launch(
        kernels.patchify_bytes_kernel,
        (batch * _blocks(units, config["BLOCK"]),),
        words,
        patches,
        *scales,
        columns,
        units,
        words.stride(0),
        words.stride(1),
        PATCH=patch_size,
        GROUP=group,
        **config,
    )
    return patches


def unpatchify(grad: Tensor, shape: Sequence[int], patch_size: int, dtype: torch.dtype) -> Tensor:
    """The gradient [B, P, C * p * p] of a patch matrix -> that of float images `shape` = [B, C, H, W]."""
    images = torch.empty(tuple(shape), dtype=dtype, device=grad.device)
    _pixels(images, grad.contiguous(), _affine((), ()), patch_size, inverse=True)
    return images


def _pixels(images: Tensor, patches: Tensor, scales: tuple[float, ...], patch_size: int, *, inverse: bool) -> None:
    """Pixels to patches, or back, a pixel at a time."""
    raw = images.dtype == torch.uint8
    pixels = images.permute(0, 3, 1, 2) if raw else images
    batch, channels, height, width = pixels.shape
    group = _group(patch_size, patches)
    units = channels * height * width // group
    config = tables.lookup("patch_masking", "patchify_pixels", _bucket(patches), images.device)
    launch(
        kernels.patchify_pixels_kernel,
        (batch * _blocks(units, config["BLOCK"]),),
        pixels,
        patches,
        *scales,
        width // patch_size,
        units,
        *pixels.stride(),
        CHANNELS=channels,
        PATCH=patch_size,
        GROUP=group,
        NORMALISE=raw,
        INVERSE=inverse,
        **config,
    )


def _affine(mean: Sequence[float], std: Sequence[float]) -> tuple[float, ...]:
    """(x / 255 - mean) / std as one product and one sum a pixel: three factors, then three summands."""
    if not mean:
        return (0.0,) * 6
    return (*(1 / (255 * s) for s in std), *(-m / s for m, s in zip(mean, std, strict=True)))


def _group(patch_size: int, patches: Tensor) -> int:
    """Neighbouring pixels of a patch's row that are moved together: 16 bytes of the result at most."""
    return next(group for group in (8, 4, 2, 1) if patch_size % group == 0 and group * patches.itemsize <= 16)


def _words(images: Tensor, group: int) -> tuple[int, Tensor | None]:
    """Rows of bytes as wider integers [B, H, words], each three of them `group` pixels, or as many as the layout lets.

    None where it lets no two.
    """
    if images.dtype != torch.uint8 or images.stride(3) != 1 or images.stride(2) != 3:
        return group, None
    while group > 1:
        offsets = images.storage_offset(), images.data_ptr(), images.stride(0), images.stride(1)
        if all(offset % group == 0 for offset in offsets):
            return group, images.flatten(2).view(_WORDS[group])
        group //= 2
    return group, None


def sample_block_masks(
    sample_ids: Tensor,
    views: Tensor,
    rows: int,
    columns: int,
    max_masked: int,
    min_block: int,
    tries: int,
    seed: int,
    mode: str,
) -> tuple[Tensor, Tensor]:
    """Mask bool [B, rows * columns] and positions int32 [B, max_masked]."""
    batch, device = len(sample_ids), sample_ids.device
    mask = torch.empty(batch, rows * columns, dtype=torch.bool, device=device)
    positions = torch.empty(batch, max_masked, dtype=torch.int32, device=device)
    strides = sample_ids.stride(0), views.stride(0)
    state = seed_state(seed)
    size = "small" if rows * columns <= 1024 else "large"
    if mode == "random":
        launch(
            kernels.sample_block_masks_random_kernel,
            (batch,),
            sample_ids,
            views,
            mask.view(torch.uint8),
            positions,
            state,
            *strides,
            rows * columns,
            max_masked,
            PATCHES=_power(rows * columns),
            **tables.lookup("patch_masking", "sample_block_masks_random", size, device),
        )
    else:
        launch(
            kernels.sample_block_masks_block_kernel,
            (batch,),
            sample_ids,
            views,
            on_device(ASPECT_TABLE, device),
            mask.view(torch.uint8),
            positions,
            state,
            *strides,
            rows,
            columns,
            max_masked,
            min_block,
            TRIES=tries,
            ROWS=_power(rows),
            COLUMNS=_power(columns),
            SLOTS=_power(max_masked),
            **tables.lookup("patch_masking", "sample_block_masks_block", size, device),
        )
    return mask, positions


def mask_patches(
    embeddings: Tensor,
    mask: Tensor | None,
    mask_token: Tensor | None,
    class_token: Tensor,
    position_embedding: Tensor,
    visible: Tensor | None,
    mode: str,
) -> Tensor:
    """The sequences of `mode`, one launch."""
    if embeddings.stride(2) != 1:
        embeddings = embeddings.contiguous()
    batch, patches, channels = embeddings.shape
    tokens = 1 + (patches if visible is None else visible.shape[1])
    output = embeddings.new_empty((2 if mode == "fork" else 1) * batch, tokens, channels)
    choice = visible if mask is None else mask
    config = tables.lookup("patch_masking", "mask_patches_forward", _bucket(embeddings), embeddings.device)
    grid = _blocks(channels, config["BLOCK_C"]) * tokens * _blocks(batch, config["IMAGES"])
    launch(
        kernels.mask_patches_forward_kernel,
        (grid,),
        embeddings,
        None if mask is None else mask.view(torch.uint8),
        None if mask_token is None else mask_token.contiguous(),
        class_token.contiguous(),
        position_embedding.contiguous(),
        visible,
        output,
        batch,
        tokens,
        channels,
        *embeddings.stride()[:2],
        *((0, 0) if choice is None else choice.stride()),
        MODE=mode,
        **config,
    )
    return output


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
) -> Gradients:
    """Gradients in the dtypes given, of no elements for None: of embeddings, mask token, class token, positions.

    One pass over the gradient, and one over partial sums where parameters want theirs; "gather" first turns the list of
    visible patches round.
    """
    if grad.stride(2) != 1:
        grad = grad.contiguous()
    batch, channels, device = len(grad) // (2 if mode == "fork" else 1), grad.shape[2], grad.device
    tokens = patches + 1

    def wanted(dtype: torch.dtype | None, *shape: int) -> Tensor | None:
        return None if dtype is None else torch.empty(shape, dtype=dtype, device=device)

    grad_embeddings = wanted(embeddings_dtype, batch, patches, channels)
    grad_mask_token = wanted(mask_token_dtype, channels)
    grad_class_token = wanted(class_token_dtype, channels)
    grad_position = wanted(position_dtype, tokens, channels)

    config = tables.lookup("patch_masking", "mask_patches_backward", _bucket(grad), device)
    slabs = _blocks(batch, config["STEPS"] * config["IMAGES"])
    in_positions = grad_class_token is not None or grad_position is not None
    position_partial = wanted(torch.float32 if in_positions else None, slabs, tokens, channels)
    mask_token_partial = wanted(None if grad_mask_token is None else torch.float32, slabs, tokens, channels)
    rows = None if visible is None else _rows(visible, tokens)
    launch(
        kernels.mask_patches_backward_kernel,
        (_blocks(channels, config["BLOCK_C"]) * tokens * slabs,),
        grad,
        None if mask is None else mask.view(torch.uint8),
        rows,
        grad_embeddings,
        position_partial,
        mask_token_partial,
        batch,
        patches,
        channels,
        *grad.stride()[:2],
        *((0, 0) if mask is None else mask.stride()),
        MODE=mode,
        **config,
    )
    if in_positions or grad_mask_token is not None:
        config = tables.lookup("patch_masking", "mask_patches_reduce", "any", device)
        position_programs = _blocks(tokens * channels, config["BLOCK"]) if in_positions else 0
        mask_token_programs = 0 if grad_mask_token is None else _blocks(channels, config["COLUMNS"])
        launch(
            kernels.mask_patches_reduce_kernel,
            (position_programs + mask_token_programs,),
            position_partial,
            mask_token_partial,
            grad_class_token,
            grad_position,
            grad_mask_token,
            slabs,
            tokens,
            channels,
            position_programs,
            **config,
        )

    def or_empty(x: Tensor | None) -> Tensor:
        return torch.empty(0, dtype=torch.float32, device=device) if x is None else x

    return or_empty(grad_embeddings), or_empty(grad_mask_token), or_empty(grad_class_token), or_empty(grad_position)


def _rows(visible: Tensor, tokens: int) -> Tensor:
    """Which row each token has in the gathered sequence, or -1: int32 [B, tokens]."""
    batch, count = visible.shape
    rows = torch.empty(batch, tokens, dtype=torch.int32, device=visible.device)
    config = tables.lookup("patch_masking", "mask_patches_rows", "any", visible.device)
    launch(
        kernels.mask_patches_rows_kernel,
        (batch * _blocks(tokens, config["BLOCK_T"]),),
        visible,
        rows,
        count,
        tokens,
        *visible.stride(),
        **config,
    )
    return rows


def _bucket(x: Tensor) -> str:
    return f"bits{8 * x.itemsize}"


def _blocks(count: int, size: int) -> int:
    return -(-count // size)


def _power(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << (count - 1).bit_length()
