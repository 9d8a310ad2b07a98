"""Tile kernels of the contrastive loss: n rows against N columns, the logits of a tile never leave the chip.

`contrastive_statistics_kernel` is the forward pass: each tile writes what the loss needs of it along its rows and its
columns into slots of its own, which `contrastive_fold_kernel` (in ``pair_kernels.py``) adds in a fixed order.
`contrastive_strip_kernel` computes the tile again in the backward pass and writes the logit gradient, the strip.

Logits are in base 2 here: ``x = cosine * scale * log2(e)``. One exponential, ``2^(x - SHIFT * scale * log2(e))``,
serves rows and columns, because its shift is the same for all. It cannot overflow for unit features at scales up to
100, and what it flushes to zero does not matter where the sums pass the check of the fold; where they do not, the
same kernel runs once more with ONLINE, with a maximum of its own for every row and column of the tile. It finds a set
flag on the device, so the host never asks.

`row_before` rows of padding come before the first row, so that a row has the same place in a tile on any number of
ranks. Rows and columns past the end are loaded from the last one, and masked afterwards where a tile has any.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
SHIFT = tl.constexpr(0.3)
LOWEST = tl.constexpr(-3.0e38)
MASK = tl.constexpr(1)
SEVERAL = tl.constexpr(2)


@triton.jit
def any_flag(flags_ptr, flags):
    """Whether one of the first `flags` numbers is not zero."""
    found = tl.zeros((1024,), tl.int32)
    for start in range(0, flags, 1024):
        at = start + tl.arange(0, 1024)
        found |= tl.load(flags_ptr + at, mask=at < flags, other=0)
    return tl.max(found, 0) != 0


@triton.jit
def _place(index, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Row and column tile of a program: GROUP row tiles share a column tile before the next, which is then in L2."""
    in_group = GROUP * column_tiles
    first = index // in_group * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    return first + index % in_group % size, index % in_group // size


@triton.jit
def _cosines(
    rows_ptr,
    columns_ptr,
    row,
    column,
    row_stride,
    column_stride,
    dim,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    k = tl.arange(0, BLOCK_K)
    a_ptr = rows_ptr + row.to(tl.int64)[:, None] * row_stride + k[None, :]
    b_ptr = columns_ptr + column.to(tl.int64)[None, :] * column_stride + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, dim, BLOCK_K):
        if EVEN:
            a = tl.load(a_ptr + start)
            b = tl.load(b_ptr + start)
        else:
            a = tl.load(a_ptr + start, mask=k[None, :] < dim - start, other=0.0)
            b = tl.load(b_ptr + start, mask=k[:, None] < dim - start, other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def _scale(scale_ptr):
    """The scale in base 2; not 0, so that a masked cosine times it is always out of reach."""
    scale = tl.load(scale_ptr).to(tl.float32) * LOG2_E
    return tl.where(tl.abs(scale) < 1e-30, 1e-30, scale)


@triton.jit
def _others(place, live_row, live_column, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which logits of the tile are there and not on the diagonal; row 0 has its own pair at column `place`."""
    own = (place + tl.arange(0, BLOCK_M))[:, None] == tl.arange(0, BLOCK_N)[None, :]
    return live_row[:, None] & live_column[None, :] & (own == 0)


@triton.jit
def _same(row_ids_ptr, column_ids_ptr, live_row, live_column, place, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which logits are between other items of the same id (ids are not negative)."""
    row_id = tl.where(live_row, tl.load(row_ids_ptr), -1)
    column_id = tl.where(live_column, tl.load(column_ids_ptr), -2)
    own = (place + tl.arange(0, BLOCK_M))[:, None] == tl.arange(0, BLOCK_N)[None, :]
    return (row_id[:, None] == column_id[None, :]) & (own == 0)


@triton.jit
def _log1p(e):
    """log(1 + e) for e in [0, 1]; below 1/8 by its series, because 1 + e would lose the digits of e."""
    series = e * (0.14285714 + e * (-0.125 + e * 0.11111111))
    series = e * (0.2 + e * (-0.16666667 + series))
    series = e * (0.33333333 + e * (-0.25 + series))
    series = e * (1.0 + e * (-0.5 + series))
    return tl.where(e < 0.125, series, tl.log(1.0 + e))


@triton.jit
def _softplus(x):
    """log(1 + 2^x) for x in base 2; the result is natural."""
    return tl.maximum(x, 0.0) * 0.6931471805599453 + _log1p(tl.exp2(-tl.abs(x)))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x))


@triton.jit
def _statistics_tile(
    index,
    rows_ptr,
    columns_ptr,
    row_ids_ptr,
    column_ids_ptr,
    scale_ptr,
    bias_ptr,
    slots_ptr,
    own_ptr,
    n,
    row_before,
    offset,
    first,
    width,
    row_stride,
    column_stride,
    dim,
    row_tiles,
    column_tiles,
    ONLINE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    DUPLICATES: tl.constexpr,
    SUM_SAME: tl.constexpr,
    BEST: tl.constexpr,
    WITH_COLUMNS: tl.constexpr,
    KINDS: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_tile, column_tile = _place(index, row_tiles, column_tiles, GROUP)
    row_start = row_tile * BLOCK_M - row_before
    column_start = column_tile * BLOCK_N
    row = row_start + tl.arange(0, BLOCK_M)
    column = column_start + tl.arange(0, BLOCK_N)
    row_from = tl.minimum(tl.maximum(row, 0), n - 1)
    column_from = first + tl.minimum(column, width - 1)
    cosines = _cosines(
        rows_ptr, columns_ptr, row_from, column_from, row_stride, column_stride, dim, EVEN, PRECISION, BLOCK_M, BLOCK_N,
        BLOCK_K,
    )  # fmt: skip
    scale = _scale(scale_ptr)
    bias = 0.0
    if bias_ptr is not None:
        bias = tl.load(bias_ptr).to(tl.float32) * LOG2_E
    live_row = (row >= 0) & (row < n)
    live_column = column < width
    place = row_start + offset - first - column_start  # of the first row's own pair among the columns
    crosses = (place < BLOCK_N) & (place > -BLOCK_M)
    ragged = (row_start < 0) | (row_start + BLOCK_M > n) | (column_start + BLOCK_N > width)
    one = tl.full((), 1, tl.int64)  # sizes that are 1 come as constants, which have no `to`
    next_row = one * column_tiles * n
    next_column = one * row_tiles * width
    row_slot = slots_ptr + one * column_tile * n + row
    column_slot = slots_ptr + KINDS * next_row + one * row_tile * width + column

    if BEST:  # noqa: SIM102 - known when compiling, unlike the next
        if crosses:
            own = (place + tl.arange(0, BLOCK_M))[:, None] == tl.arange(0, BLOCK_N)[None, :]
            mine = place + tl.arange(0, BLOCK_M)
            here = live_row & (mine >= 0) & (mine < BLOCK_N) & (mine + column_start < width)
            tl.store(own_ptr + row, tl.sum(tl.where(own, cosines, 0.0), 1) * scale + bias, mask=here)
    if crosses | ragged:
        others = _others(place, live_row, live_column, BLOCK_M, BLOCK_N)
        cosines = tl.where(others, cosines, tl.where(scale > 0, float("-inf"), float("inf")))
    if DUPLICATES != 0:
        same = _same(
            row_ids_ptr + row_from, column_ids_ptr + column_from, live_row, live_column, place, BLOCK_M, BLOCK_N
        )
    else:
        same = cosines != cosines
    if SUM_SAME and not ONLINE:
        shared = tl.where(same, cosines, 0.0)
        tl.store(row_slot + next_row, tl.sum(shared, 1), mask=live_row)
        if WITH_COLUMNS:
            tl.store(column_slot + next_column, tl.sum(shared, 0), mask=live_column)

    x = cosines * scale + bias
    if DUPLICATES == MASK:
        x = tl.where(same, float("-inf"), x)
    if BEST and not ONLINE:
        kind = 1 + SUM_SAME
        wrong = x
        if DUPLICATES == SEVERAL:
            wrong = tl.where(same, float("-inf"), x)
        tl.store(row_slot + kind * next_row, tl.max(wrong, 1), mask=live_row)
        if WITH_COLUMNS:
            tl.store(column_slot + kind * next_column, tl.max(wrong, 0), mask=live_column)
        if DUPLICATES == SEVERAL:
            right = tl.where(same, x, float("-inf"))
            tl.store(row_slot + (kind + 1) * next_row, tl.max(right, 1), mask=live_row)
            if WITH_COLUMNS:
                tl.store(column_slot + (kind + 1) * next_column, tl.max(right, 0), mask=live_column)

    if not SOFTMAX:
        if DUPLICATES == SEVERAL:
            x = tl.where(same, -x, x)
        tl.store(row_slot, tl.sum(_softplus(x), 1), mask=live_row)
    elif ONLINE:
        largest = tl.maximum(tl.max(x, 1), LOWEST)
        tl.store(row_slot, tl.sum(tl.exp2(x - largest[:, None]), 1), mask=live_row)
        tl.store(row_slot + next_row, largest, mask=live_row)
        if WITH_COLUMNS:
            highest = tl.maximum(tl.max(x, 0), LOWEST)
            tl.store(column_slot, tl.sum(tl.exp2(x - highest[None, :]), 0), mask=live_column)
            tl.store(column_slot + next_column, highest, mask=live_column)
    else:
        e = tl.exp2(x - scale * SHIFT)
        tl.store(row_slot, tl.sum(e, 1), mask=live_row)
        if WITH_COLUMNS:
            tl.store(column_slot, tl.sum(e, 0), mask=live_column)


@triton.jit
def contrastive_statistics_kernel(
    rows_ptr,
    columns_ptr,
    row_ids_ptr,
    column_ids_ptr,
    scale_ptr,
    bias_ptr,
    flags_ptr,
    slots_ptr,
    own_ptr,
    flags,
    n,
    row_before,
    offset,
    first,
    width,
    row_stride,
    column_stride,
    dim,
    row_tiles,
    column_tiles,
    ONLINE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    DUPLICATES: tl.constexpr,
    SUM_SAME: tl.constexpr,
    BEST: tl.constexpr,
    WITH_COLUMNS: tl.constexpr,
    KINDS: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Statistics of the tiles of rows [n, D] with columns [first, first + width) into their slots.

    Slots are float32: for each of KINDS kinds [column_tiles, n], then for each kind [row_tiles, width]. Kinds: sum of
    the exponentials (or of the sigmoid losses); online, the maximum they are relative to; else, as asked for, the sum
    of the cosines with items of the same id, the largest negative logit, the largest of the same id. A program has one
    tile; online, where most often nothing is to be done, few programs share all.
    """
    if ONLINE:
        tiles = tl.where(any_flag(flags_ptr, flags), row_tiles * column_tiles, 0)
        for index in range(tl.program_id(0), tiles, tl.num_programs(0)):
            _statistics_tile(
                index, rows_ptr, columns_ptr, row_ids_ptr, column_ids_ptr, scale_ptr, bias_ptr, slots_ptr, own_ptr, n,
                row_before, offset, first, width, row_stride, column_stride, dim, row_tiles, column_tiles, ONLINE,
                SOFTMAX, DUPLICATES, SUM_SAME, BEST, WITH_COLUMNS, KINDS, EVEN, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
                GROUP,
            )  # fmt: skip
    else:
        _statistics_tile(
            tl.program_id(0), rows_ptr, columns_ptr, row_ids_ptr, column_ids_ptr, scale_ptr, bias_ptr, slots_ptr,
            own_ptr, n, row_before, offset, first, width, row_stride, column_stride, dim, row_tiles, column_tiles,
            ONLINE, SOFTMAX, DUPLICATES, SUM_SAME, BEST, WITH_COLUMNS, KINDS, EVEN, PRECISION, BLOCK_M, BLOCK_N,
            BLOCK_K, GROUP,
        )  # fmt: skip


@triton.jit
def _strip_tile(
    index,
    rows_ptr,
    columns_ptr,
    row_ids_ptr,
    column_ids_ptr,
    scale_ptr,
    bias_ptr,
    row_weight_ptr,
    row_factor_ptr,
    row_lse_ptr,
    row_same_ptr,
    column_weight_ptr,
    column_factor_ptr,
    column_lse_ptr,
    column_same_ptr,
    unit_ptr,
    strip_ptr,
    rest_ptr,
    sums_ptr,
    n,
    row_before,
    offset,
    first,
    width,
    pitch,
    row_stride,
    column_stride,
    dim,
    row_tiles,
    column_tiles,
    GENERAL: tl.constexpr,
    SOFTMAX: tl.constexpr,
    DUPLICATES: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_tile, column_tile = _place(index, row_tiles, column_tiles, GROUP)
    row_start = row_tile * BLOCK_M - row_before
    column_start = column_tile * BLOCK_N
    row = row_start + tl.arange(0, BLOCK_M)
    column = column_start + tl.arange(0, BLOCK_N)
    row_from = tl.minimum(tl.maximum(row, 0), n - 1)
    column_from = first + tl.minimum(column, width - 1)
    cosines = _cosines(
        rows_ptr, columns_ptr, row_from, column_from, row_stride, column_stride, dim, EVEN, PRECISION, BLOCK_M, BLOCK_N,
        BLOCK_K,
    )  # fmt: skip
    scale = _scale(scale_ptr)
    live_row = (row >= 0) & (row < n)
    live_column = column < width
    place = row_start + offset - first - column_start  # of the first row's own pair among the columns
    crosses = (place < BLOCK_N) & (place > -BLOCK_M)
    ragged = (row_start < 0) | (row_start + BLOCK_M > n) | (column_start + BLOCK_N > width)
    if crosses | ragged:
        # Masked here and not in the strip, so that the tile is not held twice. Finite, for the product with its 0.
        others = _others(place, live_row, live_column, BLOCK_M, BLOCK_N)
        cosines = tl.where(others, cosines, tl.where(scale > 0, LOWEST, -LOWEST))
    if DUPLICATES != 0:
        same = _same(
            row_ids_ptr + row_from, column_ids_ptr + column_from, live_row, live_column, place, BLOCK_M, BLOCK_N
        )
    else:
        same = cosines != cosines

    # No branch from here to the sum: past one, cosines and strip would both have to be kept.
    if SOFTMAX:
        row_factor = tl.load(row_factor_ptr + row_from)
        column_factor = tl.load(column_factor_ptr + column_from)
        strip = tl.exp2(cosines * scale - scale * SHIFT) * (row_factor[:, None] + column_factor[None, :])
        if GENERAL:
            row_weight = tl.load(row_weight_ptr + row_from)
            row_lse = tl.load(row_lse_ptr + row_from)
            column_weight = tl.load(column_weight_ptr + column_from)
            column_lse = tl.load(column_lse_ptr + column_from)
            general = row_weight[:, None] * tl.exp2(cosines * scale - row_lse[:, None])
            general += column_weight[None, :] * tl.exp2(cosines * scale - column_lse[None, :])
            strip = tl.where(strip == strip, strip, general)
    else:
        x = cosines * scale
        if bias_ptr is not None:
            x += tl.load(bias_ptr).to(tl.float32) * LOG2_E
        if DUPLICATES == SEVERAL:
            x = tl.where(same, -x, x)
        strip = _sigmoid(x)
        if DUPLICATES == SEVERAL:
            strip = tl.where(same, -strip, strip)
        strip *= tl.load(row_weight_ptr + row_from)[:, None] + tl.load(column_weight_ptr + column_from)[None, :]
    if DUPLICATES == MASK:
        strip = tl.where(same, 0.0, strip)
    if row_same_ptr is not None:
        row_same = tl.load(row_same_ptr + row_from)
        column_same = tl.load(column_same_ptr + column_from)
        strip -= tl.where(same, row_same[:, None] + column_same[None, :], 0.0)
    if sums_ptr is not None:
        tl.store(sums_ptr + index, tl.sum(tl.sum(strip * cosines, 1), 0))
        if bias_ptr is not None:
            tl.store(sums_ptr + row_tiles * column_tiles + index, tl.sum(tl.sum(strip, 1), 0))
    if strip_ptr is not None:
        if unit_ptr is not None:
            strip *= tl.load(unit_ptr)
        at = row.to(tl.int64)[:, None] * pitch + column[None, :]
        live = live_row[:, None] & live_column[None, :]
        high = strip.to(strip_ptr.dtype.element_ty)
        tl.store(strip_ptr + at, high, mask=live)
        if rest_ptr is not None:
            tl.store(rest_ptr + at, (strip - high.to(tl.float32)).to(strip_ptr.dtype.element_ty), mask=live)


@triton.jit
def contrastive_strip_kernel(
    rows_ptr,
    columns_ptr,
    row_ids_ptr,
    column_ids_ptr,
    scale_ptr,
    bias_ptr,
    row_weight_ptr,
    row_factor_ptr,
    row_lse_ptr,
    row_same_ptr,
    column_weight_ptr,
    column_factor_ptr,
    column_lse_ptr,
    column_same_ptr,
    flags_ptr,
    unit_ptr,
    strip_ptr,
    rest_ptr,
    sums_ptr,
    flags,
    n,
    row_before,
    offset,
    first,
    width,
    pitch,
    row_stride,
    column_stride,
    dim,
    row_tiles,
    column_tiles,
    GENERAL: tl.constexpr,
    SOFTMAX: tl.constexpr,
    DUPLICATES: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Gradient with respect to the cosines of rows [n, D] with columns [first, first + width), before the scale.

    Softmax: `factor` of an item is what its weight becomes for the shared exponential, NaN where that cannot serve;
    `lse` is in base 2 (both from `contrastive_terms_kernel`, which sets `flags` where there is a NaN). With GENERAL
    everything is written again where a flag is set, by two exponentials where one cannot serve.

    Written times `unit` to strip [n, pitch]; `rest` takes what the strip's 16 bits round away. For each tile two
    numbers go to `sums`: the gradients of the scale and of the bias. Each of these pointers may be None.
    """
    if GENERAL:
        tiles = tl.where(any_flag(flags_ptr, flags), row_tiles * column_tiles, 0)
        for index in range(tl.program_id(0), tiles, tl.num_programs(0)):
            _strip_tile(
                index, rows_ptr, columns_ptr, row_ids_ptr, column_ids_ptr, scale_ptr, bias_ptr, row_weight_ptr,
                row_factor_ptr, row_lse_ptr, row_same_ptr, column_weight_ptr, column_factor_ptr, column_lse_ptr,
                column_same_ptr, unit_ptr, strip_ptr, rest_ptr, sums_ptr, n, row_before, offset, first, width, pitch,
                row_stride, column_stride, dim, row_tiles, column_tiles, GENERAL, SOFTMAX, DUPLICATES, EVEN,
                PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, GROUP,
            )  # fmt: skip
    else:
        _strip_tile(
            tl.program_id(0), rows_ptr, columns_ptr, row_ids_ptr, column_ids_ptr, scale_ptr, bias_ptr, row_weight_ptr,
            row_factor_ptr, row_lse_ptr, row_same_ptr, column_weight_ptr, column_factor_ptr, column_lse_ptr,
            column_same_ptr, unit_ptr, strip_ptr, rest_ptr, sums_ptr, n, row_before, offset, first, width, pitch,
            row_stride, column_stride, dim, row_tiles, column_tiles, GENERAL, SOFTMAX, DUPLICATES, EVEN, PRECISION,
            BLOCK_M, BLOCK_N, BLOCK_K, GROUP,
        )  # fmt: skip
