"""Patch masking on Triton kernels, registered with PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from farl_kernels import launch, library
from farl_kernels.patch_masking import reference
from farl_kernels.patch_masking.block_plan import BlockPlan
from farl_kernels.patch_masking.counter_random import signed

Floats = Sequence[float]
# A row of patches is held in 64 bits.
LONGEST_SIDE = 64


def _launchers() -> Any:
    from farl_kernels.patch_masking import launchers

    return launchers


def _patchify_reference(images: Tensor, patch_size: int, mean: Floats, std: Floats, dtype: torch.dtype) -> Tensor:
    patches = reference.patchify(images, patch_size, mean or None, std or None, dtype)
    return patches.clone(memory_format=torch.contiguous_format)


def _patchify_fake(
    images: Tensor, patch_size: int, mean: Floats, std: Floats, dtype: torch.dtype, backend: str
) -> Tensor:
    raw = images.dtype == torch.uint8
    height, width = images.shape[1:3] if raw else images.shape[2:]
    channels = images.shape[3] if raw else images.shape[1]
    patches = (height // patch_size) * (width // patch_size)
    return images.new_empty(images.shape[0], patches, channels * patch_size**2, dtype=dtype)


patchify_forward = library.define(
    "patchify_forward(Tensor images, int patch_size, float[] mean, float[] std, ScalarType dtype, str backend)"
    " -> Tensor patches",
    triton=lambda *args: _launchers().patchify(*args),
    reference=_patchify_reference,
    fake=_patchify_fake,
)


def _unpatchify_reference(grad: Tensor, shape: Sequence[int], patch_size: int, dtype: torch.dtype) -> Tensor:
    return reference.unpatchify(grad, shape, patch_size, dtype).clone(memory_format=torch.contiguous_format)


patchify_backward = library.define(
    "patchify_backward(Tensor grad, SymInt[] shape, int patch_size, ScalarType dtype, str backend) -> Tensor images",
    triton=lambda *args: _launchers().unpatchify(*args),
    reference=_unpatchify_reference,
    fake=lambda grad, shape, patch_size, dtype, backend: grad.new_empty(shape, dtype=dtype),
)


class _Patchify(torch.autograd.Function):
    @staticmethod
    def forward(images: Tensor, patch_size: int, dtype: torch.dtype) -> Tensor:
        return patchify_forward(images, patch_size, [], [], dtype, "triton")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        images, ctx.patch_size, _ = inputs
        ctx.shape, ctx.dtype = images.shape, images.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        library.refuse_double_backward("patchify")
        return patchify_backward(grads[0], ctx.shape, ctx.patch_size, ctx.dtype, "triton"), None, None


def patchify(images: Tensor, patch_size: int, mean: Floats | None, std: Floats | None, dtype: torch.dtype) -> Tensor:
    """See :func:`farl_kernels.patch_masking.op.patchify`."""
    if images.dtype != torch.uint8:
        return _Patchify.apply(images, patch_size, dtype)
    means = [0.0] * 3 if mean is None else [float(m) for m in mean]
    stds = [1.0] * 3 if std is None else [float(s) for s in std]
    return patchify_forward(images, patch_size, means, stds, dtype, "triton")


def patchify_refuses(
    images: Tensor, patch_size: int, mean: Floats | None, std: Floats | None, dtype: torch.dtype
) -> str | None:
    """Why the kernels cannot run, or None."""
    if images.dtype == torch.uint8 and images.shape[3] != 3:
        return f"the uint8 images have {images.shape[3]} channels, the kernels take 3"
    return launch.refuses(images) or _refuses_dtype(dtype, images)


def patchify_declines(images: Tensor, *_: object) -> str | None:
    """Why the kernels are not taken unasked, or None."""
    return launch.declines(images)


def _sample_reference(
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
    plan = BlockPlan(rows, columns, max_masked, min_block, tries)
    return reference.sample_block_masks(sample_ids, views, plan, seed, mode)


def _sample_fake(
    sample_ids: Tensor, views: Tensor, rows: int, columns: int, max_masked: int, *_: object
) -> tuple[Tensor, Tensor]:
    batch = sample_ids.shape[0]
    return (
        sample_ids.new_empty(batch, rows * columns, dtype=torch.bool),
        sample_ids.new_empty(batch, max_masked, dtype=torch.int32),
    )


sample_masks = library.define(
    "sample_block_masks(Tensor sample_ids, Tensor views, int rows, int columns, int max_masked, int min_block, "
    "int tries, int seed, str mode, str backend) -> (Tensor mask, Tensor positions)",
    triton=lambda *args: _launchers().sample_block_masks(*args),
    reference=_sample_reference,
    fake=_sample_fake,
)


def sample_block_masks(
    sample_ids: Tensor, views: Tensor, plan: BlockPlan, seed: int, mode: str
) -> tuple[Tensor, Tensor]:
    """See :func:`farl_kernels.patch_masking.op.sample_block_masks`."""
    sizes = plan.rows, plan.columns, plan.max_masked, plan.min_block, plan.tries
    # A tracer's symbolic seed goes through comparisons, not through bits.
    if not -(2**63) <= seed < 2**63:
        seed = signed(seed)
    return sample_masks(sample_ids, views, *sizes, seed, mode, "triton")


def sample_refuses(sample_ids: Tensor, views: Tensor, plan: BlockPlan, *_: object) -> str | None:
    """Why the kernels cannot run, or None."""
    if max(plan.rows, plan.columns) > LONGEST_SIDE:
        return f"the grid is {plan.rows} x {plan.columns}, the kernels take up to {LONGEST_SIDE} x {LONGEST_SIDE}"
    return launch.refuses(sample_ids)


def sample_declines(sample_ids: Tensor, *_: object) -> str | None:
    """Why the kernels are not taken unasked, or None."""
    return launch.declines(sample_ids)


def _mask_fake(
    embeddings: Tensor,
    mask: Tensor | None,
    mask_token: Tensor | None,
    class_token: Tensor,
    position_embedding: Tensor,
    visible: Tensor | None,
    mode: str,
    backend: str,
) -> Tensor:
    batch, patches, channels = embeddings.shape
    count = patches if visible is None else visible.shape[1]
    return embeddings.new_empty(2 * batch if mode == "fork" else batch, count + 1, channels)


def _mask_reference(
    embeddings: Tensor,
    mask: Tensor | None,
    mask_token: Tensor | None,
    class_token: Tensor,
    position_embedding: Tensor,
    visible: Tensor | None,
    mode: str,
) -> Tensor:
    return reference.mask_patches(embeddings, mask, mask_token, class_token, position_embedding, mode, visible)


mask_forward = library.define(
    "mask_patches_forward(Tensor embeddings, Tensor? mask, Tensor? mask_token, Tensor class_token, "
    "Tensor position_embedding, Tensor? visible, str mode, str backend) -> Tensor",
    triton=lambda *args: _launchers().mask_patches(*args),
    reference=_mask_reference,
    fake=_mask_fake,
)


def _mask_backward_fake(
    grad: Tensor,
    mask: Tensor | None,
    visible: Tensor | None,
    patches: int,
    embeddings_dtype: torch.dtype | None,
    mask_token_dtype: torch.dtype | None,
    class_token_dtype: torch.dtype | None,
    position_dtype: torch.dtype | None,
    mode: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, channels = grad.shape[0] // (2 if mode == "fork" else 1), grad.shape[2]

    def empty(dtype: torch.dtype | None, *shape: int) -> Tensor:
        return grad.new_empty(0, dtype=torch.float32) if dtype is None else grad.new_empty(shape, dtype=dtype)

    return (
        empty(embeddings_dtype, batch, patches, channels),
        empty(mask_token_dtype, channels),
        empty(class_token_dtype, channels),
        empty(position_dtype, patches + 1, channels),
    )


mask_backward = library.define(
    "mask_patches_backward(Tensor grad, Tensor? mask, Tensor? visible, SymInt patches, ScalarType? embeddings_dtype, "
    "ScalarType? mask_token_dtype, ScalarType? class_token_dtype, ScalarType? position_dtype, str mode, str backend)"
    " -> (Tensor d_embeddings, Tensor d_mask_token, Tensor d_class_token, Tensor d_position)",
    triton=lambda *args: _launchers().mask_patches_backward(*args),
    reference=reference.mask_patches_backward,
    fake=_mask_backward_fake,
)


class _MaskPatches(torch.autograd.Function):
    @staticmethod
    def forward(
        embeddings: Tensor,
        mask_token: Tensor | None,
        class_token: Tensor,
        position_embedding: Tensor,
        mask: Tensor | None,
        visible: Tensor | None,
        mode: str,
    ) -> Tensor:
        return mask_forward(embeddings, mask, mask_token, class_token, position_embedding, visible, mode, "triton")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *values, mask, visible, ctx.mode = inputs
        ctx.save_for_backward(mask, visible)
        ctx.patches = values[0].shape[1]
        ctx.dtypes = [None if value is None else value.dtype for value in values]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        library.refuse_double_backward("mask_patches")
        mask, visible = ctx.saved_tensors
        needed = ctx.needs_input_grad[:4]
        dtypes = [dtype if need else None for dtype, need in zip(ctx.dtypes, needed, strict=True)]
        found = mask_backward(grads[0], mask, visible, ctx.patches, *dtypes, ctx.mode, "triton")
        return *(grad if need else None for grad, need in zip(found, needed, strict=True)), None, None, None


def mask_patches(
    embeddings: Tensor,
    mask: Tensor | None,
    mask_token: Tensor | None,
    class_token: Tensor,
    position_embedding: Tensor,
    mode: str,
    visible: Tensor | None,
) -> Tensor:
    """See :func:`farl_kernels.patch_masking.op.mask_patches`."""
    return _MaskPatches.apply(embeddings, mask_token, class_token, position_embedding, mask, visible, mode)


def mask_refuses(
    embeddings: Tensor,
    mask: Tensor | None,
    mask_token: Tensor | None,
    class_token: Tensor,
    position_embedding: Tensor,
    *_: object,
) -> str | None:
    """Why the kernels cannot run, or None."""
    reasons = [launch.refuses(x) for x in (embeddings, mask_token, class_token, position_embedding) if x is not None]
    return next((reason for reason in reasons if reason is not None), None)


def mask_declines(embeddings: Tensor, *_: object) -> str | None:
    """Why the kernels are not taken unasked, or None."""
    return launch.declines(embeddings)


def _refuses_dtype(dtype: torch.dtype, x: Tensor) -> str | None:
    """As :func:`farl_kernels.launch.refuses` for a result of `dtype` on the device of `x`."""
    return launch.refuses(torch.empty(0, dtype=dtype, device=x.device))
