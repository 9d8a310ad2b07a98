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
