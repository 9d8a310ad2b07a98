"""The public masked-token loss: arguments checked, backend chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from farl_kernels.checks import check_choice, check_device, describe
from farl_kernels.dispatch import Op
from farl_kernels.precision import autocast_dtype
from farl_kernels.token_loss import custom_ops, reference

MASKED_TOKEN_CROSS_ENTROPY = Op("masked_token_cross_entropy")
MASKED_TOKEN_CROSS_ENTROPY.register(
    "triton", custom_ops.masked_token_cross_entropy, custom_ops.refuses, custom_ops.declines
)
MASKED_TOKEN_CROSS_ENTROPY.register("reference", reference.masked_token_cross_entropy)


def masked_token_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    ignore_index: int = -1,
    reduction: str = "mean",
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of ``hidden @ weight.T + bias`` with visual tokens, without the logits of all rows at once.

    Products are taken in the dtype of `hidden` (the autocast dtype, under autocast, for float32 `hidden`), softmax and
    sums in float32, or float64 for float64. Nothing waits for the device.

    Args:
        hidden: float [R, C], the hidden states at masked positions.
        weight: float [V, C].
        bias: float [V] or None.
        targets: int64 [R] in 0..V-1; rows with `ignore_index` count nothing and get no gradient.
        reduction: "mean" over the rows that count (0 where none does) or "sum".
        backend: "triton", "reference" or None for the best that can run; ``MASKED_TOKEN_CROSS_ENTROPY.names``.

    Returns:
        (loss, correct, count), 0-d: the loss, float32 or float64; the rows whose largest logit is the target,
        float32; the rows that count, int64. The last two are detached.

    Raises:
        ValueError: an argument does not fit; the message names it.
        RuntimeError: a second derivative is asked for.
    """
    op = "masked_token_cross_entropy"
    if hidden.dim() != 2 or not hidden.is_floating_point():
        raise ValueError(f"{op}: hidden is {describe(hidden)}, want floating point [R, C]")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or not weight.is_floating_point():
        wanted = f"floating point [V, {hidden.shape[1]}], as wide as hidden"
        raise ValueError(f"{op}: weight is {describe(weight)}, want {wanted}")
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        wanted = f"floating point [{len(weight)}], one for each row of weight"
        raise ValueError(f"{op}: bias is {describe(bias)}, want {wanted}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"{op}: targets is {describe(targets)}, want int64 [{len(hidden)}], one for each row of hidden"
        )
    check_choice(op, "reduction", reduction, ("mean", "sum"))
    for name, x in (("weight", weight), ("bias", bias), ("targets", targets)):
        if x is not None:
            check_device(op, name, x, "hidden", hidden)
    dtype = autocast_dtype(hidden.device)
    if dtype is not None and hidden.dtype == torch.float32:
        hidden = hidden.to(dtype)
    return MASKED_TOKEN_CROSS_ENTROPY(backend, hidden, weight, bias, targets, ignore_index, reduction)
