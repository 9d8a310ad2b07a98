"""The target distribution of the softmax loss, as three numbers an item.

Cross-entropy against a target q that sums to one is ``lse_i - sum_j q_ij x_ij``. With the diagonal taken out,
``softplus(lse_neg_i - x_ii) + x_ii - sum_j q_ij x_ij``, and for every policy here the part after the softplus is

    own_i x_ii  -  same_i sum_{j != i, id_j = id_i} x_ij  -  uniform_i sum_j x_ij

It is zero without label smoothing and without several positives. Both axes share the numbers, because both
towers of a pair carry the same id.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from farl_kernels.contrastive.options import Options


@dataclass(frozen=True)
class LinearTerm:
    """Coefficients [N] of the part of the loss that is linear in the logits; None where they vanish."""

    own: Tensor | None
    same: Tensor | None
    uniform: Tensor | None

    def at(self, rows: slice) -> LinearTerm:
        own, same, uniform = (None if x is None else x[rows] for x in (self.own, self.same, self.uniform))
        return LinearTerm(own, same, uniform)


def linear_term(options: Options, count: int, ids: Tensor | None, like: Tensor) -> LinearTerm:
    """Coefficients for all `count` items of the global batch; `ids` int64 [count], `like` gives dtype and device."""
    smoothing = options.label_smoothing
    ones = torch.ones(count, dtype=like.dtype, device=like.device)
    if not options.softmax or (not smoothing and options.duplicates != "multi_positive"):
        return LinearTerm(None, None, None)
    if options.duplicates == "negative" or ids is None:
        return LinearTerm(ones * smoothing, None, ones * (smoothing / count))
    # How often each id occurs, at every item, in static shapes: no host sync.
    ordered = torch.sort(ids).values
    occurrences = torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)
    occurrences = occurrences.to(like.dtype)
    if options.duplicates == "multi_positive":
        same = (1.0 - smoothing) / occurrences
        own = torch.where(occurrences == 1, smoothing, 1.0 - same)  # 1 - (1 - eps) is not eps in floating point
        return LinearTerm(own, same, ones * (smoothing / count) if smoothing else None)
    uniform = smoothing / (count + 1 - occurrences)  # masked items leave the uniform part too
    return LinearTerm(ones * smoothing, -uniform, uniform)


def uniform_gradient(other: Tensor, weight: Tensor, other_weight: Tensor) -> Tensor:
    """Gradient [n, D] of ``sum_ij (weight_i + other_weight_j) <row_i, other_j>`` with respect to the rows.

    The uniform part of the target touches every logit alike, so it needs sums of `other` [m, D] instead of a tile.
    """
    return other_weight @ other + weight[:, None] * other.sum(0)
