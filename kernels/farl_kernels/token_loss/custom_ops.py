"""The masked-token loss on Triton kernels, registered with PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from farl_kernels import launch, library
from farl_kernels.precision import accumulation_dtype, without_autocast
from farl_kernels.token_loss import reference
from farl_kernels.token_loss.reference import MaskedTokenCrossEntropy, Results


def _triton(*args: Any) -> Results:
    from farl_kernels.token_loss import launchers

    return launchers.forward(*args)


def _fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    mean: bool,
    hidden_gradient: bool,
    weight_gradient: bool,
    bias_gradient: bool,
    backend: str,
) -> Results:
    accumulate = accumulation_dtype(hidden.dtype)
    kept = accumulate if hidden.dtype == torch.float16 else hidden.dtype
    return (
        hidden.new_empty((), dtype=accumulate),
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty((), dtype=torch.int64),
        hidden.new_empty(hidden.shape if hidden_gradient else 0, dtype=kept),
        hidden.new_empty(weight.shape if weight_gradient else 0, dtype=accumulate),
        hidden.new_empty(weight.shape[0] if bias_gradient else 0, dtype=accumulate),
    )


forward = library.define(
    "masked_token_cross_entropy_forward(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, int ignore_index, "
    "bool mean, bool hidden_gradient, bool weight_gradient, bool bias_gradient, str backend) "
    "-> (Tensor loss, Tensor correct, Tensor count, Tensor d_hidden, Tensor d_weight, Tensor d_bias)",
    triton=_triton,
    reference=reference.forward,
    fake=_fake,
)


def _run(*args: Any) -> Results:
    return forward(*args, "triton")


def masked_token_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int, reduction: str
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`farl_kernels.masked_token_cross_entropy` on Triton kernels; arguments are checked there.

    A target that is neither a token nor `ignore_index` makes the loss NaN.
    """
    with without_autocast(hidden.device):
        return MaskedTokenCrossEntropy.apply(
            _run, hidden, weight, bias, targets, ignore_index, reduction == "mean", torch.is_grad_enabled()
        )


def refuses(hidden: Tensor, *others: object) -> str | None:
    """Why the kernels cannot run, or None."""
    return launch.refuses(hidden)


def declines(hidden: Tensor, *others: object) -> str | None:
    """Why the kernels are not taken unasked, or None."""
    return launch.declines(hidden)
