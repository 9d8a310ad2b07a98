"""Cross-entropy of a linear classifier, by chunks of rows, so that the logits of all rows never exist at once.

The gradient is made in the forward pass, while a chunk's logits are at hand: the softmax is written over them, its
products with the weight and the hidden states are summed in float32 (or float64), and the backward pass only
multiplies by the upstream gradient. No product is done twice, and what is kept is the size of the inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from farl_kernels.gemm import logit_chunk_bytes, matmul, matmul_add_
from farl_kernels.precision import accumulation_dtype, without_autocast


class MaskedTokenCrossEntropy(torch.autograd.Function):
    """(hidden [R, C], weight [V, C], bias [V], targets [R]) -> loss, correct, count: 0-d each."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        ignore_index: int,
        mean: bool,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        accumulate = accumulation_dtype(hidden.dtype)
        valid = targets != ignore_index
        safe_targets = torch.where(valid, targets, 0)
        count = valid.sum()
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        correct = torch.zeros((), dtype=torch.float32, device=hidden.device)
        matrix = weight.to(hidden.dtype)
        # Inputs "need" a gradient under no_grad as well.
        needs_hidden, needs_weight, needs_bias = (with_gradient and need for need in ctx.needs_input_grad[:3])
        # float16 is too coarse near zero for a gradient that is not scaled yet.
        kept_dtype = accumulate if hidden.dtype == torch.float16 else hidden.dtype
        d_hidden = torch.empty(hidden.shape, dtype=kept_dtype, device=hidden.device) if needs_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=accumulate, device=hidden.device) if needs_weight else None
        d_bias = torch.zeros(weight.shape[:1], dtype=accumulate, device=hidden.device) if needs_bias else None
        kept_matrix = matrix.to(kept_dtype) if needs_hidden else matrix
        rows = max(1, logit_chunk_bytes(hidden.device) // (accumulate.itemsize * max(1, len(weight))))
        for start in range(0, len(hidden), rows):
            at = slice(start, start + rows)
            some, target = hidden[at], safe_targets[at, None]
            logits = matmul(some, matrix.T)
            if bias is not None:
                logits += bias.to(accumulate)
            largest, best = logits.max(1, keepdim=True)
            correct += ((best == target)[:, 0] & valid[at]).sum()
            own = logits.gather(1, target) - largest
            normaliser = logits.sub_(largest).exp_().sum(1, keepdim=True)
            total += torch.where(valid[at, None], normaliser.log() - own, 0.0).sum()
            if not (needs_hidden or needs_weight or needs_bias):
                continue
            gradient = logits.div_(normaliser)
            gradient.scatter_add_(1, target, gradient.new_full((), -1.0).expand(target.shape))
            gradient.masked_fill_(~valid[at, None], 0.0)
            if d_bias is not None:
                d_bias += gradient.sum(0)
            gradient = gradient.to(kept_dtype)
            if d_hidden is not None:
                d_hidden[at] = matmul(gradient, kept_matrix)
            if d_weight is not None:
                matmul_add_(d_weight, gradient.T, some.to(kept_dtype))
        divisor = count.clamp(min=1).to(accumulate) if mean else torch.ones((), dtype=accumulate, device=hidden.device)
        ctx.save_for_backward(d_hidden, d_weight, d_bias, divisor)
        ctx.dtypes = hidden.dtype, weight.dtype, bias.dtype if bias is not None else None
        ctx.mark_non_differentiable(correct, count)
        return total.to(accumulate) / divisor, correct, count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("masked_token_cross_entropy has no second derivative: do not use create_graph")
        *kept, divisor = ctx.saved_tensors
        factor = grads[0] / divisor
        # In the factor's dtype: on a GPU PyTorch would round it to that of a 16-bit x, and all rows would be off by it.
        made = (
            None if x is None else (x.to(factor.dtype) * factor).to(dtype)
            for x, dtype in zip(kept, ctx.dtypes, strict=True)
        )
        return (*made, None, None, None, None)


def masked_token_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int, reduction: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The plain truth of :func:`farl_kernels.masked_token_cross_entropy`; arguments are checked there."""
    with without_autocast(hidden.device):
        return MaskedTokenCrossEntropy.apply(
            hidden, weight, bias, targets, ignore_index, reduction == "mean", torch.is_grad_enabled()
        )
