"""The plain linear layer with a cast weight: what autocast does. Gradients of weights are rounded to the dtype of x."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., C], weight [D, C], bias [D] -> [..., D]."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
