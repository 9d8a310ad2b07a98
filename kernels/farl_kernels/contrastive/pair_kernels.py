"""Kernels of the contrastive loss beside its tiles: folding slots, the pairs' own terms, what follows the strip.

Sums and logarithms are in float64 here: near 100 a log-sum-exp in float32 is wrong by 4e-6 already.
"""

import triton
import triton.language as tl

from farl_kernels.contrastive.kernels import LOG2_E, LOWEST, SHIFT, any_flag

LN_2 = tl.constexpr(0.6931471805599453)
SMALLEST = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def contrastive_fold_kernel(
    slots_ptr,
    stats_ptr,
    largest_ptr,
    total_ptr,
    scale_ptr,
    flags_ptr,
    flags,
    n,
    N,
    first,
    width,
    row_tiles,
    column_tiles,
    row_programs,
    least,
    LATER: tl.constexpr,
    LAST: tl.constexpr,
    ONLINE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    SUMS: tl.constexpr,
    KINDS: tl.constexpr,
    SLOT_KINDS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Fold the slots of the columns [first, first + width) into the statistics (float64: rows [KINDS, n], columns
    [KINDS, N]); the first SUMS kinds are added, of the others the largest is kept. Kind 0 becomes a log-sum-exp.

    Columns are finished at once. Rows go on, in LATER calls, until the LAST; before that they hold plain sums. A sum of
    fixed-shift exponentials that is out of range, below `least` or infinite, becomes NaN, and its block sets its flag.
    Online, where a flag is set, the NaN are replaced; the rows' sums go on in `total` [n], relative to `largest` [n].
    """
    program = tl.program_id(0)
    is_row = program < row_programs
    block = tl.where(is_row, program, program - row_programs)
    item = block * BLOCK + tl.arange(0, BLOCK)
    items = tl.where(is_row, n, width)
    tiles = tl.where(is_row, column_tiles, row_tiles)
    reach = items
    if ONLINE:
        wanted = any_flag(flags_ptr, flags)
        tiles = tl.where(wanted, tiles, 0)
        reach = tl.where(wanted, items, 0)
    live = item < reach
    one = tl.full((), 1, tl.int64)  # sizes that are 1 come as constants, which have no `to`
    slots_ptr += tl.where(is_row, 0, one * SLOT_KINDS * n * column_tiles) + item
    kind_stride = tl.where(is_row, one * n * column_tiles, one * width * row_tiles)
    stats_stride = tl.where(is_row, one * n, one * N)
    stats_ptr += tl.where(is_row, 0, one * KINDS * n + first) + item
    is_row_item = item < tl.where(is_row, reach, 0)
    begun = item < tl.where(program < (row_programs if LATER else 0), reach, 0)
    final = program >= (0 if LAST else row_programs)
    depth = tl.arange(0, DEPTH)
    shift = (tl.load(scale_ptr).to(tl.float32) * LOG2_E * SHIFT).to(tl.float64)

    if ONLINE:
        largest = tl.load(largest_ptr + item, mask=begun, other=LOWEST)
        total = tl.load(total_ptr + item, mask=begun, other=0.0)
        for tile in range(0, tiles):
            at = slots_ptr + one * tile * items
            here = tl.load(at + kind_stride, mask=live, other=LOWEST)
            part = tl.load(at, mask=live, other=0.0).to(tl.float64)
            above = tl.maximum(largest, here)
            total = total * tl.exp2(largest - above).to(tl.float64) + part * tl.exp2(here - above).to(tl.float64)
            largest = above
        tl.store(largest_ptr + item, largest, mask=is_row_item)
        tl.store(total_ptr + item, total, mask=is_row_item)
        if final:
            before = tl.load(stats_ptr, mask=live, other=0.0)
            found = (tl.log2(total) + largest.to(tl.float64)) * LN_2
            tl.store(stats_ptr, tl.where(before == before, before, found), mask=live)
    else:
        for kind in tl.static_range(KINDS):
            if kind < SUMS:
                total = tl.load(stats_ptr + kind * stats_stride, mask=begun, other=0.0)
            else:
                total = tl.load(stats_ptr + kind * stats_stride, mask=begun, other=float("-inf"))
            for tile in range(0, tiles, DEPTH):
                at = slots_ptr[None, :] + kind * kind_stride + (tile + depth).to(tl.int64)[:, None] * items
                inside = live[None, :] & (tile + depth < tiles)[:, None]
                if kind < SUMS:
                    total += tl.sum(tl.load(at, mask=inside, other=0.0).to(tl.float64), 0)
                else:
                    part = tl.load(at, mask=inside, other=float("-inf")).to(tl.float64)
                    total = tl.maximum(total, tl.max(part, 0))
            if SOFTMAX and kind == 0:
                fits = (total >= least) & (total < float("inf"))
                failed = tl.where(final, tl.max((live & (fits == 0)).to(tl.int32), 0), 0)
                flag = tl.where(is_row, block, row_programs + first // BLOCK + block)
                tl.store(flags_ptr + flag, failed)
                lse = tl.where(fits, (tl.log2(total) + shift) * LN_2, float("nan"))
                total = tl.where(final, lse, total)
            tl.store(stats_ptr + kind * stats_stride, total, mask=live)


@triton.jit
def _softplus(x):
    """log(1 + e^x) in float64, also where it is far below 1."""
    e = tl.exp(-tl.abs(x))
    series = e * (1.0 + e * (-0.5 + e * (0.3333333333333333 - e * 0.25)))
    return tl.maximum(x, 0.0) + tl.where(e < 1e-4, series, tl.log(1.0 + e))


@triton.jit
def contrastive_pairs_kernel(
    image_ptr,
    text_ptr,
    scale_ptr,
    bias_ptr,
    row_ptr,
    column_ptr,
    loss_ptr,
    cosine_ptr,
    pull_ptr,
    lse_ptr,
    n,
    image_stride,
    text_stride,
    SOFTMAX: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Of each pair: cosine, loss, gradient of the loss with respect to its own logit, log-sum-exps [2, n] with it.

    `row` and `column` are the float64 log-sum-exps of the negatives; sigmoid: `row` is the sum of their losses.
    """
    item = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = item < n
    total = tl.zeros((BLOCK_M,), tl.float64)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = live[:, None] & (d < D)[None, :]
        image = tl.load(image_ptr + item.to(tl.int64)[:, None] * image_stride + d[None, :], mask=inside, other=0.0)
        text = tl.load(text_ptr + item.to(tl.int64)[:, None] * text_stride + d[None, :], mask=inside, other=0.0)
        total += tl.sum(image.to(tl.float64) * text.to(tl.float64), 1)
    # The scale as the tiles have it, rounded with log2(e) in it: a pair and its negatives then agree to the last digit.
    own = total * (tl.load(scale_ptr).to(tl.float32) * LOG2_E).to(tl.float64) * LN_2
    if bias_ptr is not None:
        own += tl.load(bias_ptr).to(tl.float64)
    row = tl.load(row_ptr + item, mask=live, other=0.0)
    if SOFTMAX:
        row -= own
        column = tl.load(column_ptr + item, mask=live, other=0.0) - own
        over_row = _softplus(row)
        over_column = _softplus(column)
        loss = 0.5 * (over_row + over_column)
        pull = -(1.0 / (1.0 + tl.exp(-row)) + 1.0 / (1.0 + tl.exp(-column)))
        tl.store(lse_ptr + item, own + over_row, mask=live)
        tl.store(lse_ptr + n + item, own + over_column, mask=live)
    else:
        loss = row + _softplus(-own)
        pull = -1.0 / (1.0 + tl.exp(own))
    tl.store(cosine_ptr + item, total.to(tl.float32), mask=live)
    tl.store(loss_ptr + item, loss.to(tl.float32), mask=live)
    tl.store(pull_ptr + item, pull.to(tl.float32), mask=live)


@triton.jit
def contrastive_terms_kernel(
    row_weight_ptr,
    row_lse_ptr,
    column_weight_ptr,
    column_lse_ptr,
    scale_ptr,
    terms_ptr,
    flags_ptr,
    n,
    N,
    row_programs,
    floor,
    BLOCK: tl.constexpr,
):
    """Of n rows, then N columns: the factor of the shared exponential, [n + N], then the log-sum-exp in base 2. Each
    program says in its flag whether one of its factors is NaN.

    The shared exponential cannot serve, and the factor is NaN, where it or the factor would leave the normal numbers:
    what is flushed to zero below `floor` (in base 2, relative to the shift) could be a part of the sum that counts.
    """
    program = tl.program_id(0)
    is_row = program < row_programs
    item = tl.where(is_row, program, program - row_programs) * BLOCK + tl.arange(0, BLOCK)
    live = item < tl.where(is_row, n, N)
    in_rows = item < tl.where(is_row, n, 0)
    in_columns = item < tl.where(is_row, 0, N)
    weight = tl.load(row_weight_ptr + item, mask=in_rows, other=0.0)
    weight += tl.load(column_weight_ptr + item, mask=in_columns, other=0.0)
    lse = tl.load(row_lse_ptr + item, mask=in_rows, other=0.0)
    lse += tl.load(column_lse_ptr + item, mask=in_columns, other=0.0)
    lse = lse * LOG2_E
    above = (lse - (tl.load(scale_ptr).to(tl.float32) * LOG2_E * SHIFT).to(tl.float64)).to(tl.float32)
    factor = weight * tl.exp2(-above)
    serves = (above > floor) & (above < 126.0) & ((tl.abs(factor) >= SMALLEST) | (weight == 0.0))
    to = terms_ptr + tl.where(is_row, 0, n) + item
    tl.store(to, tl.where(serves, factor, float("nan")), mask=live)
    tl.store(to + n + N, lse.to(tl.float32), mask=live)
    tl.store(flags_ptr + program, tl.max((live & (serves == 0)).to(tl.int32), 0))


@triton.jit
def contrastive_finish_kernel(
    gradient_ptr,
    pull_ptr,
    other_ptr,
    scale_ptr,
    out_ptr,
    n,
    other_stride,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out [n, D] = scale * (gradient + pull * other): the pair's own part joins in float32, then one rounding."""
    item = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    live = (item < n)[:, None] & (d < D)[None, :]
    at = item.to(tl.int64)[:, None] * D + d[None, :]
    pull = tl.load(pull_ptr + item, mask=item < n, other=0.0)
    other = tl.load(other_ptr + item.to(tl.int64)[:, None] * other_stride + d[None, :], mask=live, other=0.0)
    total = tl.load(gradient_ptr + at, mask=live, other=0.0) + pull[:, None] * other.to(tl.float32)
    total *= tl.load(scale_ptr).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def contrastive_product_kernel(
    strip_ptr,
    rest_ptr,
    columns_ptr,
    out_ptr,
    n,
    row_before,
    first,
    width,
    pitch,
    column_stride,
    ADD: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out [n, D] = (or, with ADD, +=) strip [n, width] @ columns [first, first + width) of [N, D], in float32.

    For ``deterministic``, whose bits must not depend on n: a library chooses its kernel by the shape.
    """
    row = tl.program_id(0) * BLOCK_M - row_before + tl.arange(0, BLOCK_M)
    d = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    live = ((row >= 0) & (row < n))[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_K):
        column = start + k
        left = live & (column < width)[None, :]
        right = (column < width)[:, None] & (d < D)[None, :]
        at = row.to(tl.int64)[:, None] * pitch + column[None, :]
        b = tl.load(
            columns_ptr + (first + column).to(tl.int64)[:, None] * column_stride + d[None, :], mask=right, other=0.0
        )
        total = tl.dot(tl.load(strip_ptr + at, mask=left, other=0.0), b, total, input_precision=PRECISION)
        if rest_ptr is not None:
            total = tl.dot(tl.load(rest_ptr + at, mask=left, other=0.0), b, total, input_precision=PRECISION)
    to = out_ptr + row.to(tl.int64)[:, None] * D + d[None, :]
    inside = live & (d < D)[None, :]
    if ADD:
        total += tl.load(to, mask=inside, other=0.0)
    tl.store(to, total, mask=inside)
