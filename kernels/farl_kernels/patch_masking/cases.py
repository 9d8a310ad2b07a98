"""The table entries of patch masking in use."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from farl_kernels.cases import Case
from farl_kernels.tables import Config

# ViT-B/16 at 224 pixels.
_BATCH, _SIZE, _PATCH, _PATCHES, _CHANNELS = 256, 224, 16, 196, 768
_DTYPES = {"bits16": torch.bfloat16, "bits32": torch.float32}


def cases() -> list[Case]:
    """Every entry of `tables/<architecture>/patch_masking.json`."""
    found = []
    for bucket, dtype in _DTYPES.items():
        found += [
            _case("patchify_bytes", bucket, partial(_patchify, torch.uint8, dtype), BLOCK=(64, 128, 256)),
            _case("patchify_pixels", bucket, partial(_patchify, dtype, dtype), BLOCK=(128, 256, 512)),
            _case("mask_patches_forward", bucket, partial(_forward, dtype), IMAGES=(4, 8, 16), BLOCK_C=(128, 256)),
            _case(
                "mask_patches_backward",
                bucket,
                partial(_backward, "fork", dtype),
                STEPS=(2, 4, 8),
                IMAGES=(4, 8, 16),
                BLOCK_C=(128, 256),
            ),
        ]
    for size, side in (("small", 14), ("large", 64)):
        found += [
            _case("sample_block_masks_block", size, partial(_sample, "block", side), warps=(1, 2, 4)),
            _case("sample_block_masks_random", size, partial(_sample, "random", side), warps=(1, 2, 4)),
        ]
    rows, sums = partial(_backward, "gather", torch.bfloat16), partial(_backward, "fork", torch.bfloat16)
    return [
        *found,
        _case("mask_patches_rows", "any", rows, BLOCK_T=(32, 64, 128), BLOCK_K=(64, 128)),
        _case("mask_patches_reduce", "any", sums, BLOCK=(256, 512), ROWS=(32, 64, 128), COLUMNS=(8, 16, 32)),
    ]


def _case(
    kernel: str, bucket: str, prepare: Callable[[torch.device], Any], warps: tuple[int, ...] = (2, 4, 8), **sizes: Any
) -> Case:
    candidates: list[Config] = [
        {**dict(zip(sizes, values, strict=True)), "num_warps": count, "num_stages": 1}
        for *values, count in product(*sizes.values(), warps)
    ]
    return Case("patch_masking", kernel, bucket, prepare, tuple(candidates))


def _patchify(source: torch.dtype, dtype: torch.dtype, device: torch.device) -> Callable[[], list[Tensor]]:
    from farl_kernels.patch_masking import launchers

    if source == torch.uint8:
        images = torch.randint(0, 256, (_BATCH, _SIZE, _SIZE, 3), dtype=source, device=device)
        return lambda: [launchers.patchify(images, _PATCH, [0.5] * 3, [0.25] * 3, dtype)]
    images = torch.randn(_BATCH, 3, _SIZE, _SIZE, dtype=source, device=device)
    return lambda: [launchers.patchify(images, _PATCH, [], [], dtype)]


def _sample(mode: str, side: int, device: torch.device) -> Callable[[], list[Tensor]]:
    from farl_kernels.patch_masking import launchers

    ids = torch.arange(_BATCH, device=device)
    views = torch.zeros_like(ids)
    return lambda: list(launchers.sample_block_masks(ids, views, side, side, round(0.38 * side**2), 16, 64, 7, mode))


def _forward(dtype: torch.dtype, device: torch.device) -> Callable[[], list[Tensor]]:
    from farl_kernels.patch_masking import launchers

    embeddings = torch.randn(_BATCH, _PATCHES, _CHANNELS, dtype=dtype, device=device)
    position = torch.randn(_PATCHES + 1, _CHANNELS, device=device)
    mask_token, class_token = torch.randn(_CHANNELS, device=device), torch.randn(_CHANNELS, device=device)
    mask = _mask(device)
    return lambda: [launchers.mask_patches(embeddings, mask, mask_token, class_token, position, None, "fork")]


def _backward(mode: str, dtype: torch.dtype, device: torch.device) -> Callable[[], list[Tensor]]:
    from farl_kernels.patch_masking import launchers

    keep = 122  # of 196, as after masking 75 at most
    shape = (2 * _BATCH, _PATCHES + 1) if mode == "fork" else (_BATCH, keep + 1)
    grad = torch.randn(*shape, _CHANNELS, dtype=dtype, device=device)
    mask = _mask(device) if mode == "fork" else None
    visible = None if mode == "fork" else torch.arange(keep, dtype=torch.int32, device=device).repeat(_BATCH, 1)
    dtypes = dtype, torch.float32 if mode == "fork" else None, torch.float32, torch.float32
    return lambda: list(launchers.mask_patches_backward(grad, mask, visible, _PATCHES, *dtypes, mode))


def _mask(device: torch.device) -> Tensor:
    return torch.rand(_BATCH, _PATCHES, device=device) < 0.38
