"""Matrix products of 16-bit features that keep 32-bit results, which plain `torch.mm` rounds away."""

from __future__ import annotations

import torch
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)


def logit_chunk_bytes(device: torch.device) -> int:
    """How many bytes of logits a loss works on at a time: on the CPU they stay in the cache between their uses."""
    return 2**22 if device.type == "cpu" else 2**28


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` for 2-D operands of one dtype, in that dtype's accumulation dtype."""
    if a.dtype not in _HALF:
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())  # products of 16-bit numbers are exact in float32


def matmul_add_(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``total += a @ b``; `total` is in the accumulation dtype of `a` and `b`. Returns `total`."""
    if a.dtype not in _HALF:
        return total.addmm_(a, b)
    if a.is_cuda:
        return total.add_(torch.mm(a, b, out_dtype=torch.float32))
    return total.addmm_(a.float(), b.float())
