"""Plain residual + LayerNorm: the truth that every other backend is held to.

sum        = residual + row_scale * (x + x_bias)          rounded once to the dtype of the new residual
normalised = (sum - mean) / sqrt(variance + eps)          in float32 or better
affine_dtype float32 (CLIP):  cast(normalised * weight + bias)
affine_dtype None    (FaRL):  cast(normalised) * weight + bias
"""

from __future__ import annotations

import torch
from torch import Tensor

from farl_kernels.precision import accumulation_dtype


def residual_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    """The dtype of the new residual: the wider of the two summands."""
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def spread(row_scale: Tensor, x: Tensor) -> Tensor:
    """`row_scale` [B] or [B, N] with dimensions of one appended, to be multiplied with x [B, N, C]."""
    return row_scale.reshape(row_scale.shape + (1,) * (x.ndim - row_scale.ndim))


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
    """x [..., C] -> (normalised [..., C] in the dtype of x, new residual [..., C])."""
    stored = residual_dtype(x, residual)
    compute = accumulation_dtype(stored)
    summed = x.to(compute)
    if x_bias is not None:
        summed = summed + x_bias.to(compute)
    if row_scale is not None:
        summed = summed * spread(row_scale.to(compute), x)
    if residual is not None:
        summed = residual.to(compute) + summed
    new_residual = summed.to(stored)

    centred = new_residual.to(compute)
    centred = centred - centred.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    normalised = centred * torch.rsqrt(variance + eps)
    affine = x.dtype if affine_dtype is None else torch.promote_types(affine_dtype, compute)
    normalised = normalised.to(affine)
    if weight is not None:
        normalised = normalised * weight.to(affine)
    if bias is not None:
        normalised = normalised + bias.to(affine)
    return normalised.to(x.dtype), new_residual
