"""What all attention kernels ask of their arguments, and how the launchers hand tensors of any strides to them."""

from __future__ import annotations

import torch
from torch import Tensor

# Offsets inside a tile of at most 256 rows are computed in int32.
LARGEST_ROW_STRIDE = 2**22


def refuses_head_dim(head_dim: int) -> str | None:
    """Why the kernels cannot serve this head dim, or None."""
    served = head_dim % 8 == 0 and 16 <= head_dim <= 128
    return None if served else f"head dim {head_dim} is no multiple of 8 from 16 to 128"


def kernel_rows(x: Tensor, rows: int = 1) -> Tensor:
    """`x`, copied unless its last dimension has unit stride and its rows (a dimension) lie at a reasonable distance."""
    return x if x.stride(-1) == 1 and x.stride(rows) <= LARGEST_ROW_STRIDE else x.contiguous()


def kernel_mask(key_mask: Tensor | None) -> Tensor | None:
    return None if key_mask is None else key_mask.contiguous().view(torch.uint8)


def batch_row_head(x: Tensor) -> tuple[int, int, int]:
    """The strides of [B, N, H, D] in the order of the kernels' arguments."""
    return x.stride(0), x.stride(1), x.stride(2)


def block_of(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())


def bucket_of(q: Tensor, keys: int | None = None) -> str:
    """The table bucket by dtype, head dim and, for kernels that hold all keys, their number."""
    kind = "float" if q.dtype == torch.float32 else "half"
    size = "" if keys is None else "-n128" if keys <= 128 else "-n256"
    return f"{kind}-d{64 if q.shape[3] <= 64 else 128}{size}"
