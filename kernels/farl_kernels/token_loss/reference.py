"""Cross-entropy of a linear classifier, by chunks of rows, so that the logits of all rows never exist at once.

The gradient is made in the forward pass, while a chunk's logits are at hand: the softmax is written over them, its
products with the weight and the hidden states are summed in float32 (or float64), and the backward pass only
multiplies by the upstream gradient. No product is done twice, and what is kept is the size of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from farl_kernels.gemm import logit_chunk_bytes, matmul, matmul_add_
from farl_kernels.precision import accumulation_dtype, without_autocast

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    mean: bool,
    hidden_gradient: bool,
    weight_gradient: bool,
    bias_gradient: bool,
) -> Results:
    """The results, and those gradients of the sum of losses that are asked for.

    Returns:
        (loss, correct, count, d_hidden [R, C], d_weight [V, C], d_bias [V]): the first three as in
        :func:`farl_kernels.masked_token_cross_entropy`. d_hidden is bfloat16 for bfloat16 `hidden`, everything else is
        float32, or float64 for float64. A gradient that is not asked for has no elements.
    """
    accumulate = accumulation_dtype(hidden.dtype)
    valid = targets != ignore_index
    safe_targets = torch.where(valid, targets, 0)
    count = valid.sum()
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    correct = torch.zeros((), dtype=torch.float32, device=hidden.device)
    matrix = weight.to(hidden.dtype)
    # float16 is too coarse near zero for a gradient that is not scaled yet.
    kept_dtype = accumulate if hidden.dtype == torch.float16 else hidden.dtype
    d_hidden = torch.empty(hidden.shape if hidden_gradient else 0, dtype=kept_dtype, device=hidden.device)
    d_weight = torch.zeros(weight.shape if weight_gradient else 0, dtype=accumulate, device=hidden.device)
    d_bias = torch.zeros(len(weight) if bias_gradient else 0, dtype=accumulate, device=hidden.device)
    kept_matrix = matrix.to(kept_dtype) if hidden_gradient else matrix
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
        if not (hidden_gradient or weight_gradient or bias_gradient):
            continue
        gradient = logits.div_(normaliser)
        gradient.scatter_add_(1, target, gradient.new_full((), -1.0).expand(target.shape))
        gradient.masked_fill_(~valid[at, None], 0.0)
        if bias_gradient:
            d_bias += gradient.sum(0)
        gradient = gradient.to(kept_dtype)
        if hidden_gradient:
            d_hidden[at] = matmul(gradient, kept_matrix)
        if weight_gradient:
            matmul_add_(d_weight, gradient.T, some.to(kept_dtype))
    return total.to(accumulate) / divisor(count, mean, accumulate), correct, count, d_hidden, d_weight, d_bias


def divisor(count: Tensor, mean: bool, dtype: torch.dtype) -> Tensor:
    """What the sum of losses is divided by, 0-d."""
    return count.clamp(min=1).to(dtype) if mean else torch.ones((), dtype=dtype, device=count.device)


def scaled(
    grad: Tensor, count: Tensor, mean: bool, kept: Sequence[Tensor | None], dtypes: Sequence[torch.dtype | None]
) -> list[Tensor | None]:
    """The gradients that :func:`forward` made, times the upstream gradient `grad` of the loss, in `dtypes`."""
    factor = grad / divisor(count, mean, grad.dtype)
    # In the factor's dtype: on a GPU PyTorch would round it to that of a 16-bit x, and all rows would be off by it.
    return [
        None if x is None else (x.to(factor.dtype) * factor).to(dtype) for x, dtype in zip(kept, dtypes, strict=True)
    ]


class MaskedTokenCrossEntropy(torch.autograd.Function):
    """(hidden [R, C], weight [V, C], bias [V], targets [R]) -> loss, correct, count: 0-d each.

    `run` is :func:`forward` or the like.
    """

    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[..., Results],
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        ignore_index: int,
        mean: bool,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Inputs "need" a gradient under no_grad as well.
        needs = [with_gradient and need for need in ctx.needs_input_grad[1:4]]
        loss, correct, count, *made = run(hidden, weight, bias, targets, ignore_index, mean, *needs)
        ctx.save_for_backward(count, *(x if need else None for x, need in zip(made, needs, strict=True)))
        ctx.mean = mean
        ctx.dtypes = hidden.dtype, weight.dtype, bias.dtype if bias is not None else None
        ctx.mark_non_differentiable(correct, count)
        return loss, correct, count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("masked_token_cross_entropy has no second derivative: do not use create_graph")
        count, *kept = ctx.saved_tensors
        return (None, *scaled(grads[0], count, ctx.mean, kept, ctx.dtypes), None, None, None, None)


def masked_token_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int, reduction: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The plain truth of :func:`farl_kernels.masked_token_cross_entropy`; arguments are checked there."""
    with without_autocast(hidden.device):
        return MaskedTokenCrossEntropy.apply(
            forward, hidden, weight, bias, targets, ignore_index, reduction == "mean", torch.is_grad_enabled()
        )
