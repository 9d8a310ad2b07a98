"""Activations by PyTorch's own fused ops: the fast path on CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from farl_kernels.activation import reference
from farl_kernels.activation.reference import ALPHA


def gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """PyTorch's fused GELU; x [..., C], bias [C]."""
    return F.gelu(x if bias is None else x + bias.to(x.dtype))


def quick_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., C], bias [C] -> [..., C]."""
    # A compiler fuses the plain formula by itself, and in fp16 the scaled argument below could overflow.
    if torch.compiler.is_compiling() or x.dtype == torch.float16:
        return reference.quick_gelu(x, bias)
    return _QuickGELU.apply(x, None if bias is None else bias.to(x.dtype))


class _QuickGELU(torch.autograd.Function):
    """z sigmoid(ALPHA z) = silu(ALPHA z) / ALPHA, and its derivative is silu'(ALPHA z): one fused kernel each.

    ALPHA z is kept for the backward, and x is not, so that eager PyTorch's three saved tensors become one.
    """

    @staticmethod
    def forward(ctx, x, bias):  # type: ignore[no-untyped-def]
        scaled = x * ALPHA if bias is None else torch.add(bias * ALPHA, x, alpha=ALPHA)
        ctx.save_for_backward(scaled)
        return F.silu(scaled).mul_(1 / ALPHA)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled():
            raise RuntimeError('quick_gelu: for gradients of gradients use backend="reference"')
        (scaled,) = ctx.saved_tensors
        grad_x = torch.ops.aten.silu_backward(grad, scaled)
        # [None]: a sum over at least one dimension never returns grad_x itself, which would be two gradients in one.
        grad_bias = grad_x[None].sum_to_size(grad_x.shape[-1:]) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias
