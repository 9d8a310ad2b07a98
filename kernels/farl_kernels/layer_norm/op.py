"""The public residual + LayerNorm function: arguments are checked here, then the op goes to a backend."""

from __future__ import annotations

import torch
from torch import Tensor

from farl_kernels.checks import check_device, describe
from farl_kernels.dispatch import Op
from farl_kernels.layer_norm import apex_backend, custom_ops, reference, torch_fused
from farl_kernels.precision import without_autocast

# Backends in order of preference: the first that does not refuse a call serves it.
ADD_LAYER_NORM = Op("add_layer_norm")
ADD_LAYER_NORM.register("triton", custom_ops.add_layer_norm, custom_ops.refuses, custom_ops.declines)
ADD_LAYER_NORM.register("torch", torch_fused.add_layer_norm)
ADD_LAYER_NORM.register("reference", reference.add_layer_norm)
ADD_LAYER_NORM.register("apex", apex_backend.add_layer_norm, apex_backend.refuses)


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    affine_dtype: torch.dtype | None = None,
    x_bias: Tensor | None = None,
    row_scale: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """LayerNorm of residual + row_scale * (x + x_bias), and that sum.

    Args:
        x: [..., C], bf16, fp16, fp32 or fp64: the output of the layer before.
        residual: [..., C], or None for a plain LayerNorm. It may be wider than x (a float32 residual stream).
        weight, bias: [C], or None for no affine.
        eps: added to the variance.
        affine_dtype: where weight and bias are applied. torch.float32 = CLIP's LayerNorm (affine in float32, then the
            cast to the dtype of x); None = FaRL's (cast first, affine in the dtype of x). One result in float32.
        x_bias: [C], bias of the layer before, added and differentiated here.
        row_scale: [B] or [B, N] (the leading dimensions of x): factor of each sample, for stochastic depth. A constant.
        backend: None (the fastest that fits), "triton", "torch", "reference" or "apex".

    Returns:
        (normalised [..., C] in the dtype of x, sum [..., C] in the wider dtype of x and residual). Where nothing is
        added, the sum may be x itself. With "triton" the gradient cannot itself be differentiated, nor taken by
        torch.func; trying raises RuntimeError.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, or a backend that cannot serve the call.
    """
    op = "add_layer_norm"
    if x.ndim < 1 or not x.is_floating_point() or x.shape[-1] == 0:
        raise ValueError(f"{op}: x is {describe(x)}, want floating point [..., C] with C >= 1")
    wanted = {"residual": (residual, x.shape)}
    wanted |= {name: (p, x.shape[-1:]) for name, p in (("weight", weight), ("bias", bias), ("x_bias", x_bias))}
    for name, (tensor, shape) in wanted.items():
        if tensor is None:
            continue
        if tensor.shape != shape or not tensor.is_floating_point():
            raise ValueError(f"{op}: {name} is {describe(tensor)}, want floating point {tuple(shape)}")
        check_device(op, name, tensor, "x", x)
    if row_scale is not None:
        if not 1 <= row_scale.ndim < x.ndim or row_scale.shape != x.shape[: row_scale.ndim]:
            raise ValueError(
                f"{op}: row_scale has shape {tuple(row_scale.shape)}, want the leading dimensions of x {tuple(x.shape)}"
            )
        if row_scale.requires_grad or row_scale.device != x.device or not row_scale.is_floating_point():
            raise ValueError(f"{op}: row_scale must be a floating-point constant (no gradient) on {x.device}")
    if affine_dtype not in (None, torch.float32):
        raise ValueError(f"{op}: affine_dtype is {affine_dtype}, want torch.float32 (CLIP) or None (FaRL)")
    if not eps >= 0:
        raise ValueError(f"{op}: eps is {eps}, want a number >= 0")
    # Left alone, CUDA autocast would give a float32 result here; this op keeps the dtype of x.
    with without_autocast(x.device):
        return ADD_LAYER_NORM(
            backend,
            x,
            residual,
            weight,
            bias,
            eps=eps,
            affine_dtype=affine_dtype,
            x_bias=x_bias,
            row_scale=row_scale,
        )
