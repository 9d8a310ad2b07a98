"""Plain activations: the truth that every other backend is held to. Float32 or better, rounded once at the end."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from farl_kernels.precision import accumulation_dtype

# QuickGELU's constant, from OpenAI's CLIP (clip/model.py).
ALPHA = 1.702


def _with_bias(x: Tensor, bias: Tensor | None) -> Tensor:
    compute = accumulation_dtype(x.dtype)
    return x.to(compute) if bias is None else x.to(compute) + bias.to(compute)


def quick_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """z * sigmoid(1.702 z), z = x + bias; x [..., C], bias [C]."""
    z = _with_bias(x, bias)
    return (z * torch.sigmoid(ALPHA * z)).to(x.dtype)


def gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """z * Phi(z) with the exact erf, z = x + bias; x [..., C], bias [C]."""
    z = _with_bias(x, bias)
    return (0.5 * z * (1.0 + torch.erf(z * math.sqrt(0.5)))).to(x.dtype)


def forward(x: Tensor, bias: Tensor | None, quick: bool) -> Tensor:
    """Of the raw op: QuickGELU or GELU, contiguous."""
    return (quick_gelu if quick else gelu)(x, bias).contiguous()


def backward(
    grad: Tensor, x: Tensor, bias: Tensor | None, quick: bool, want_x: bool, want_bias: bool
) -> tuple[Tensor, Tensor]:
    """Of the raw op: dx, and d_bias [C] in the dtype of accumulation; empty where not wanted."""
    z = _with_bias(x, bias)
    if quick:
        s = torch.sigmoid(ALPHA * z)
        derivative = s + ALPHA * z * s * (1.0 - s)
    else:
        density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
        derivative = 0.5 * (1.0 + torch.erf(z * math.sqrt(0.5))) + z * density
    d = grad.to(z.dtype) * derivative
    return (
        d.to(x.dtype, copy=True).contiguous() if want_x else x.new_empty(0),
        d[None].sum_to_size(d.shape[-1:]) if want_bias else d.new_empty(0),
    )
