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


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    x_bias: Tensor | None,
    row_scale: Tensor | None,
    eps: float,
    cast_first: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the raw op: normalised, summed (empty where nothing is added to x), and mean and rstd [...] of each row."""
    normalised, summed = add_layer_norm(
        x,
        residual,
        weight,
        bias,
        eps=eps,
        affine_dtype=None if cast_first else torch.float32,
        x_bias=x_bias,
        row_scale=row_scale,
    )
    wide = summed.to(accumulation_dtype(summed.dtype))
    mean = wide.mean(-1)
    rstd = torch.rsqrt((wide - mean[..., None]).square().mean(-1) + eps)
    if residual is None and x_bias is None and row_scale is None:
        summed = x.new_empty(0)
    return normalised.contiguous(), summed.contiguous(), mean, rstd


def backward(
    d_normalised: Tensor | None,
    d_summed: Tensor | None,
    summed: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    row_scale: Tensor | None,
    dtype: torch.dtype,
    cast_first: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the raw op: d_residual, dx in `dtype`, and those of the sums [C] for weight, bias and x_bias that are wanted.

    With n = (summed - mean) rstd and g = d_normalised * weight:
    d_residual = rstd (g - mean(g) - n mean(g n)) + d_summed;  dx = row_scale * d_residual
    """
    compute = mean.dtype
    normalised = (summed.to(compute) - mean[..., None]) * rstd[..., None]
    d = torch.zeros_like(normalised) if d_summed is None else d_summed.to(compute)
    upstream = torch.zeros_like(normalised) if d_normalised is None else d_normalised.to(compute)
    g = upstream
    if weight is not None:
        g = g * (weight.to(dtype) if cast_first else weight).to(compute)
    centred = g - g.mean(-1, keepdim=True) - normalised * (g * normalised).mean(-1, keepdim=True)
    d = d + centred * rstd[..., None]
    dx = d if row_scale is None else d * spread(row_scale.to(compute), d)
    columns = summed.shape[-1]
    sums = [
        v.reshape(-1, columns).sum(0)
        for v, w in zip((upstream * normalised, upstream, dx), wanted[2:], strict=True)
        if w
    ]
    return (
        d.to(summed.dtype).contiguous() if wanted[0] else summed.new_empty(0),
        dx.to(dtype, copy=True).contiguous() if wanted[1] else summed.new_empty(0, dtype=dtype),
        torch.stack(sums) if sums else d.new_empty(0, columns),
    )
