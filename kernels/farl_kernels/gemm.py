"""Matrix products of 16-bit numbers: with 32-bit results, which plain `torch.mm` rounds away, and fast on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)
# Without AMX (matrix units), 16-bit products measure slower on a CPU than float32 ones, the casts included.
_CPU_PREFERS_FLOAT32 = not torch.cpu.get_capabilities().get("amx_bf16", False)


def logit_chunk_bytes(device: torch.device) -> int:
    """How many bytes of logits a loss works on at a time: on the CPU they stay in the cache between their uses."""
    return 2**22 if device.type == "cpu" else 2**28


def fast_operand(x: Tensor) -> Tensor:
    """`x` as products want it: float32 where it has 16 bits and the CPU multiplies float32 faster, else itself."""
    return x.float() if x.device.type == "cpu" and x.dtype in _HALF and _CPU_PREFERS_FLOAT32 else x


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
