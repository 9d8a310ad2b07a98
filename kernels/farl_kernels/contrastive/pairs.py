"""The pairs themselves, in plain PyTorch: what the diagonal, which stays out of the tile, adds to loss and gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Pairs(NamedTuple):
    """Of each pair [n], in the accumulation dtype: cosine, loss, and the loss's gradient by the pair's own logit.

    `lse` (float64 [2, n], empty for sigmoid) are the log-sum-exps of the image's and of the text's logits, the pair's
    own included. `pull` belongs to twice the softmax loss: the sum over its two axes.
    """

    cosines: Tensor
    loss: Tensor
    pull: Tensor
    lse: Tensor


def pairs(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, row: Tensor, column: Tensor | None) -> Pairs:
    """Join the pairs with what the tile found off its diagonal.

    `row` and `column` are the log-sum-exps of the negatives (float64 [n]); sigmoid: `row` is the sum of their losses,
    and `column` is None.
    """
    cosines = (image.to(scale.dtype) * text.to(scale.dtype)).sum(1)
    own = cosines * scale if bias is None else cosines * scale + bias
    if column is None:
        none = torch.empty(2, 0, dtype=torch.float64, device=own.device)
        return Pairs(cosines, row - F.logsigmoid(own), -torch.sigmoid(-own), none)
    over = torch.stack([row - own, column - own])
    softplus = torch.logaddexp(over, over.new_zeros(()))  # F.softplus is linear above 20
    pull = -over.sigmoid().sum(0)
    return Pairs(cosines, (0.5 * softplus.sum(0)).to(scale.dtype), pull.to(scale.dtype), own + softplus)


def finish(gradient: Tensor, pull: Tensor, other: Tensor, scale: Tensor) -> Tensor:
    """``scale * (gradient + pull * other)`` [n, D] in the dtype of `other`, rounded once. May overwrite `gradient`."""
    return gradient.addcmul_(pull[:, None], other.to(gradient.dtype)).mul_(scale).to(other.dtype)
