"""QuickGELU and GELU of x + bias, float32 inside. QUICK chooses which; `exp2` serves every exponential."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _activate(z, QUICK: tl.constexpr):
    if QUICK:
        # 1.702 log2(e)
        result = z / (1.0 + tl.math.exp2(-2.4554669595930157 * z))
    else:
        result = 0.5 * z * (1.0 + tl.math.erf(z * 0.7071067811865476))
    return result


@triton.jit
def _derivative(z, QUICK: tl.constexpr):
    if QUICK:
        sigmoid = 1.0 / (1.0 + tl.math.exp2(-2.4554669595930157 * z))
        result = sigmoid + 1.702 * z * sigmoid * (1.0 - sigmoid)
    else:
        # Phi(z) + z phi(z); log2(e) / 2 and 1 / sqrt(2 pi)
        density = 0.3989422804014327 * tl.math.exp2(-0.7213475204444817 * z * z)
        result = 0.5 + 0.5 * tl.math.erf(z * 0.7071067811865476) + z * density
    return result


@triton.jit
def activation_forward_kernel(
    X,
    BIAS,
    OUT,
    rows,
    columns,
    x_stride,
    QUICK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile [ROWS, COLUMNS] a program; those of the same rows follow each other."""
    across = tl.cdiv(columns, COLUMNS)
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    start = row.to(tl.int64)[:, None]
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    z = tl.load(X + start * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if BIAS is not None:
        # By all rows: loaded once and broadcast, it would pass through shared memory.
        z += tl.load(tl.broadcast_to((BIAS + column)[None, :], [ROWS, COLUMNS]), mask=mask, other=0.0).to(tl.float32)
    tl.store(OUT + start * columns + column[None, :], _activate(z, QUICK).to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def activation_backward_kernel(
    GRAD,
    X,
    BIAS,
    DX,
    SUMS,
    rows,
    columns,
    grad_stride,
    x_stride,
    QUICK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program (i, j) goes down column block i, from tile j by steps of the number of programs there.

    DX [rows, columns] may be None. SUMS [programs, columns] float32 gets the column sums of the gradient, or is None.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (column < columns)[None, :]
    bias = 0.0
    if BIAS is not None:
        pointers = tl.broadcast_to((BIAS + column)[None, :], [ROWS, COLUMNS])
        bias = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile in tl.range(tl.program_id(1), tl.cdiv(rows, ROWS), tl.num_programs(1)):
        row = tile * ROWS + tl.arange(0, ROWS)
        start = row.to(tl.int64)[:, None]
        mask = (row < rows)[:, None] & inside
        gradient = tl.load(GRAD + start * grad_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        z = tl.load(X + start * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if BIAS is not None:
            z += bias
        d = gradient * _derivative(z, QUICK)
        if DX is not None:
            tl.store(DX + start * columns + column[None, :], d.to(DX.dtype.element_ty), mask=mask)
        if SUMS is not None:
            sums += d
    if SUMS is not None:
        start = tl.program_id(1).to(tl.int64) * columns
        tl.store(SUMS + start + column, tl.sum(sums, 0), mask=column < columns)
