"""Residual + LayerNorm by PyTorch's fused layer_norm: the fast path on CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from farl_kernels.layer_norm.reference import residual_dtype, spread
from farl_kernels.precision import accumulation_dtype


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def add_layer_norm_by(layer_norm: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A backend from `layer_norm(x, weight, bias, eps)`, which gets weight and bias in the dtype of x, or no affine."""

    def add_layer_norm(
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        *,
        eps: float,
        affine_dtype: torch.dtype | None,
        x_bias: Tensor | None,
        row_scale: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        summed = _sum(x, residual, x_bias, row_scale)
        compute = accumulation_dtype(summed.dtype)
        if affine_dtype is None and x.dtype != compute:
            # Cast first, affine after, both in the dtype of x.
            normalised = layer_norm(summed, None, None, eps).to(x.dtype)
            if weight is not None:
                normalised = normalised * weight.to(x.dtype)
            return (normalised if bias is None else normalised + bias.to(x.dtype)), summed
        weight = None if weight is None else weight.to(compute)
        bias = None if bias is None else bias.to(compute)
        if weight is None and bias is not None:
            weight = torch.ones_like(bias)
        return layer_norm(summed.to(compute), weight, bias, eps).to(x.dtype), summed

    return add_layer_norm


def _sum(x: Tensor, residual: Tensor | None, x_bias: Tensor | None, row_scale: Tensor | None) -> Tensor:
    """residual + row_scale * (x + x_bias) in as few passes as eager PyTorch allows."""
    if row_scale is None:
        x = x if x_bias is None else x + x_bias.to(x.dtype)
        return x if residual is None else residual + x
    stored = residual_dtype(x, residual)
    compute = accumulation_dtype(stored)  # a factor like 1 / 0.9 in 16 bits would make all of a sample too small
    x = x.to(compute) if x_bias is None else x.to(compute) + x_bias.to(compute)
    scale = spread(row_scale.to(compute), x)
    summed = x * scale if residual is None else torch.addcmul(residual.to(compute), x, scale)
    return summed.to(stored)


add_layer_norm = add_layer_norm_by(_layer_norm)
