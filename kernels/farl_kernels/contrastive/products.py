"""The two products of the backward pass, written where they belong: no temporary, no second pass to add."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def _float32_precision(precision: str | None) -> Iterator[None]:
    """Float32 products in "tf32" or in full ("fp32"); None leaves them as PyTorch is set."""
    if precision not in ("tf32", "fp32"):
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool, precision: str | None) -> None:
    """``out = a @ b``, or with `add` ``out += a @ b``; `out` is float32, `a` and `b` of one dtype of 16 or 32 bits."""
    if a.dtype == torch.float32:
        with _float32_precision(precision):
            torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif not a.is_cuda:  # products of 16-bit numbers are exact in float32
        multiply(a.float(), b.float(), out, add=add, precision=None)
    elif add:
        torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, out=out)
    else:
        torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)
