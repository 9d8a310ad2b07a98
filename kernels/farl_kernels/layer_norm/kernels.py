"""Residual + LayerNorm. A row is cut into CHUNKS pieces of CHUNK columns that all stay in registers.

CHUNK is what the warps of one row load at once, 16 bytes a thread. Rows of 768 or 1280 are then read without idle
lanes, which one block of the next power of two would leave, and where a warp holds a row to itself its sums need no
shared memory and no barrier.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _piece(live, i: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr):
    """The columns of piece i of a row, and which elements of the tile exist."""
    column = i * CHUNK + tl.arange(0, CHUNK)
    mask = live[:, None]
    if (i + 1) * CHUNK > C:
        mask = mask & (column < C)[None, :]
    return column[None, :], mask


@triton.jit
def _vector(PTR, i: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr):
    """Load piece i of a [C] vector for every row of a tile, by the lanes that hold the tile.

    Loaded once and broadcast, it would pass through shared memory, with a barrier each time.
    """
    column = i * CHUNK + tl.arange(0, CHUNK)
    pointers = tl.broadcast_to((PTR + column)[None, :], [ROWS, CHUNK])
    if (i + 1) * CHUNK > C:
        values = tl.load(pointers, mask=(column < C)[None, :], other=0.0)
    else:
        values = tl.load(pointers)
    return values


@triton.jit
def _zeros(CHUNKS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr):
    pieces = ()
    for _ in tl.static_range(CHUNKS):
        pieces += (tl.zeros([ROWS, CHUNK], tl.float32),)
    return pieces


@triton.jit
def _store_sums(PTR, sums, C: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """The sums over the rows of a tile, into this program's row of PTR [programs, C]."""
    start = tl.program_id(0).to(tl.int64) * C
    for i in tl.static_range(CHUNKS):
        column = i * CHUNK + tl.arange(0, CHUNK)
        tl.store(PTR + start + column, tl.sum(sums[i], 0), mask=column < C)


@triton.jit
def add_layer_norm_forward_kernel(
    X,
    RESIDUAL,
    WEIGHT,
    BIAS,
    X_BIAS,
    ROW_SCALE,
    NORMALISED,
    SUMMED,
    MEAN,
    RSTD,
    rows,
    x_stride,
    residual_stride,
    rows_per_scale,
    eps,
    C: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS rows a program. SUMMED is None where nothing is added to x."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    start = row.to(tl.int64)[:, None]
    scale = 1.0
    if ROW_SCALE is not None:
        scale = tl.load(ROW_SCALE + row // rows_per_scale, mask=live, other=0.0).to(tl.float32)[:, None]

    # Columns past the end hold zeros, which leave the sum alone.
    parts = ()
    total = tl.zeros([ROWS, CHUNK], tl.float32)
    for i in tl.static_range(CHUNKS):
        column, mask = _piece(live, i, C, CHUNK)
        part = tl.load(X + start * x_stride + column, mask=mask, other=0.0).to(tl.float32)
        if X_BIAS is not None:
            part += _vector(X_BIAS, i, C, CHUNK, ROWS).to(tl.float32)
        if ROW_SCALE is not None:
            part *= scale
        if RESIDUAL is not None:
            part += tl.load(RESIDUAL + start * residual_stride + column, mask=mask, other=0.0).to(tl.float32)
        if SUMMED is not None:
            # The statistics are those of the sum as it is stored, which is what the backward reads.
            rounded = part.to(SUMMED.dtype.element_ty)
            tl.store(SUMMED + start * C + column, rounded, mask=mask)
            part = rounded.to(tl.float32)
        parts += (part,)
        total += part
    mean = (tl.sum(total, 1) / C)[:, None]

    squares = tl.zeros([ROWS, CHUNK], tl.float32)
    for i in tl.static_range(CHUNKS):
        centred = parts[i] - mean
        if (i + 1) * CHUNK > C:
            _, mask = _piece(live, i, C, CHUNK)
            centred = tl.where(mask, centred, 0.0)
        squares += centred * centred
    rstd = tl.math.rsqrt(tl.sum(squares, 1) / C + eps)[:, None]
    tl.store(MEAN + start, mean, mask=live[:, None])
    tl.store(RSTD + start, rstd, mask=live[:, None])

    dtype: tl.constexpr = NORMALISED.dtype.element_ty
    for i in tl.static_range(CHUNKS):
        column, mask = _piece(live, i, C, CHUNK)
        normalised = (parts[i] - mean) * rstd
        if CAST_FIRST:
            normalised = normalised.to(dtype).to(tl.float32)
        if WEIGHT is not None:
            weight = _vector(WEIGHT, i, C, CHUNK, ROWS)
            if CAST_FIRST:
                # As two operations on tensors of that dtype would round. Float32 holds their products exactly.
                normalised = (normalised * weight.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
            else:
                normalised *= weight.to(tl.float32)
        if BIAS is not None:
            bias = _vector(BIAS, i, C, CHUNK, ROWS)
            if CAST_FIRST:
                bias = bias.to(dtype)
            normalised += bias.to(tl.float32)
        tl.store(NORMALISED + start * C + column, normalised.to(dtype), mask=mask)


@triton.jit
def add_layer_norm_backward_kernel(
    D_NORMALISED,
    D_SUMMED,
    SUMMED,
    MEAN,
    RSTD,
    WEIGHT,
    ROW_SCALE,
    D_RESIDUAL,
    DX,
    D_WEIGHT,
    D_BIAS,
    D_X_BIAS,
    rows,
    d_normalised_stride,
    d_summed_stride,
    summed_stride,
    rows_per_scale,
    C: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Each program takes every num_programs-th tile of ROWS rows and keeps column sums in registers.

    D_WEIGHT, D_BIAS and D_X_BIAS [programs, C] float32 get its sums. D_NORMALISED or D_SUMMED may be None, and so may
    any result; D_WEIGHT and D_BIAS are where D_NORMALISED is.
    """
    weight_sums = ()
    bias_sums = ()
    x_bias_sums = ()
    if D_WEIGHT is not None:
        weight_sums = _zeros(CHUNKS, CHUNK, ROWS)
    if D_BIAS is not None:
        bias_sums = _zeros(CHUNKS, CHUNK, ROWS)
    if D_X_BIAS is not None:
        x_bias_sums = _zeros(CHUNKS, CHUNK, ROWS)

    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        live = row < rows
        start = row.to(tl.int64)[:, None]
        # What is used last is asked for first, so that a tile waits for memory once.
        upstream = ()
        if D_SUMMED is not None:
            for i in tl.static_range(CHUNKS):
                column, mask = _piece(live, i, C, CHUNK)
                upstream += (tl.load(D_SUMMED + start * d_summed_stride + column, mask=mask, other=0.0),)

        gradients = ()
        normalised = ()
        rstd = 0.0
        mean_gradient = 0.0
        mean_product = 0.0
        if D_NORMALISED is not None:
            mean = tl.load(MEAN + start, mask=live[:, None], other=0.0)
            rstd = tl.load(RSTD + start, mask=live[:, None], other=0.0)
            new_weight_sums = ()
            new_bias_sums = ()
            total = tl.zeros([ROWS, CHUNK], tl.float32)
            product = tl.zeros([ROWS, CHUNK], tl.float32)
            for i in tl.static_range(CHUNKS):
                # The gradient is zero past the end, so that it does not matter what `normalised` holds there.
                column, mask = _piece(live, i, C, CHUNK)
                gradient = tl.load(D_NORMALISED + start * d_normalised_stride + column, mask=mask, other=0.0)
                summed = tl.load(SUMMED + start * summed_stride + column, mask=mask, other=0.0)
                part = (summed.to(tl.float32) - mean) * rstd
                gradient = gradient.to(tl.float32)
                g = gradient
                if WEIGHT is not None:
                    weight = _vector(WEIGHT, i, C, CHUNK, ROWS)
                    if CAST_FIRST:
                        weight = weight.to(D_NORMALISED.dtype.element_ty)
                    g = gradient * weight.to(tl.float32)
                gradients += (g,)
                normalised += (part,)
                total += g
                product += g * part
                # After the sums of the row: in the other order ptxas needs a few more registers, and spills.
                if D_WEIGHT is not None:
                    new_weight_sums += (weight_sums[i] + gradient * part,)
                if D_BIAS is not None:
                    new_bias_sums += (bias_sums[i] + gradient,)
            weight_sums = new_weight_sums
            bias_sums = new_bias_sums
            mean_gradient = (tl.sum(total, 1) / C)[:, None]
            mean_product = (tl.sum(product, 1) / C)[:, None]

        scale = 1.0
        if ROW_SCALE is not None:
            scale = tl.load(ROW_SCALE + row // rows_per_scale, mask=live, other=0.0).to(tl.float32)[:, None]
        new_x_bias_sums = ()
        for i in tl.static_range(CHUNKS):
            column, mask = _piece(live, i, C, CHUNK)
            d = tl.zeros([ROWS, CHUNK], tl.float32)
            if D_NORMALISED is not None:
                d = (gradients[i] - mean_gradient - normalised[i] * mean_product) * rstd
            if D_SUMMED is not None:
                d += upstream[i].to(tl.float32)
            if D_RESIDUAL is not None:
                tl.store(D_RESIDUAL + start * C + column, d.to(D_RESIDUAL.dtype.element_ty), mask=mask)
            if ROW_SCALE is not None:
                d *= scale
            if DX is not None:
                tl.store(DX + start * C + column, d.to(DX.dtype.element_ty), mask=mask)
            if D_X_BIAS is not None:
                # Rows past the end have no gradient, and so d 0.
                new_x_bias_sums += (x_bias_sums[i] + d,)
        x_bias_sums = new_x_bias_sums

    if D_WEIGHT is not None:
        _store_sums(D_WEIGHT, weight_sums, C, CHUNK, CHUNKS)
    if D_BIAS is not None:
        _store_sums(D_BIAS, bias_sums, C, CHUNK, CHUNKS)
    if D_X_BIAS is not None:
        _store_sums(D_X_BIAS, x_bias_sums, C, CHUNK, CHUNKS)
