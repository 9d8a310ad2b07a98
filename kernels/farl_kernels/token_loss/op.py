"""The public masked-token loss: arguments checked, backend chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from farl_kernels.dispatch import Op
from farl_kernels.token_loss import reference

MASKED_TOKEN_CROSS_ENTROPY = Op("masked_token_cross_entropy")
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
        backend: None, or a name in ``MASKED_TOKEN_CROSS_ENTROPY.names``.

    Returns:
        (loss, correct, count), 0-d: the loss, float32 or float64; the rows whose largest logit is the target,
        float32; the rows that count, int64. The last two are detached.

    Raises:
        ValueError: an argument does not fit; the message names it.
        RuntimeError: a second derivative is asked for.
    """
    if hidden.dim() != 2 or not hidden.is_floating_point():
        raise ValueError(f"hidden must be floating-point [R, C]; got {hidden.dtype} {list(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or not weight.is_floating_point():
        wanted = f"floating-point [V, {hidden.shape[1]}], as wide as hidden"
        raise ValueError(f"weight must be {wanted}; got {weight.dtype} {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{len(weight)}], one for each row of weight; got {list(bias.shape)}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64 [{len(hidden)}]; got {targets.dtype} {list(targets.shape)}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum'; got {reduction!r}")
    for name, x in (("weight", weight), ("bias", bias), ("targets", targets)):
        if x is not None and x.device != hidden.device:
            raise ValueError(f"{name} must be on the device of hidden, {hidden.device}; got {x.device}")
    kind = hidden.device.type
    if hidden.dtype == torch.float32 and torch.is_autocast_enabled(kind):
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    return MASKED_TOKEN_CROSS_ENTROPY(backend, hidden, weight, bias, targets, ignore_index, reduction)
