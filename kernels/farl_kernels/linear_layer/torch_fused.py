"""The linear layer by PyTorch's products, with gradients of weights that are never rounded to 16 bits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from farl_kernels.gemm import fast_operand, matmul
from farl_kernels.library import refuse_double_backward
from farl_kernels.precision import accumulation_dtype


class _Linear(torch.autograd.Function):
    """Keeps x and the cast weight, each only where the other wants a gradient.

    The cast weight, as autocast's cache does: casting again would save 2 bytes a parameter and read 4 and write 2.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        matrix = weight.to(x.dtype)
        need_x, need_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_weight else None, matrix if need_x else None)
        ctx.shape, ctx.dtype, ctx.weight_dtype = x.shape, x.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.transposed = weight.stride(0) < weight.stride(1)
        rows = fast_operand(x)
        return F.linear(rows, matrix.to(rows.dtype), None if bias is None else bias.to(rows.dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("linear")
        x, matrix = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        dx = d_weight = d_bias = None
        rows = fast_operand(grads[0].reshape(-1, grads[0].shape[-1]))
        if need_x:
            dx = torch.mm(rows, matrix.to(rows.dtype)).to(ctx.dtype).view(ctx.shape)
        if need_weight:
            inputs = x.reshape(-1, x.shape[-1]).to(rows.dtype)
            # Laid out as the weight is: else autograd would copy it.
            d_weight = matmul(inputs.t(), rows).t() if ctx.transposed else matmul(rows.t(), inputs)
            d_weight = d_weight.to(ctx.weight_dtype)
        if need_bias:
            d_bias = rows.sum(0, dtype=accumulation_dtype(rows.dtype)).to(ctx.bias_dtype)
        return dx, d_weight, d_bias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., C], weight [D, C], bias [D] -> [..., D]."""
    if x.dtype == weight.dtype and (bias is None or bias.dtype == x.dtype):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)
