"""What the attention kernels share: reading and writing the rows of one head.

Of the bias of q, k and v only q's is added to rows. That of k adds the same to all scores of a query, which the softmax
cancels: its gradient is 0. That of v passes through, because the weights sum to 1. So keys and values go from memory
to the tensor cores untouched.

Scores are in base 2, and so is the log-sum-exp that is kept: a conversion would round it twice more.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(x, bias, stride, start, end, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows start .. start + ROWS of `x` (plus `bias`, rounded to the dtype of x); rows from `end` on are never read."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    inside = (start + rows < end)[:, None]
    if BLOCK_D != D:
        inside = inside & (columns < D)[None, :]
    first = x + tl.cast(start, tl.int64) * stride
    tile = tl.load(first + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)
    if bias is not None:
        tile += tl.load(bias + columns, mask=columns < D, other=0.0)[None, :]
    return tile


@triton.jit
def store_rows(x, tile, stride, start, end, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write `tile` to rows start .. start + ROWS of `x`, in its dtype, as far as they are before `end`."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    inside = (start + rows < end)[:, None]
    if BLOCK_D != D:
        inside = inside & (columns < D)[None, :]
    first = x + tl.cast(start, tl.int64) * stride
    tl.store(first + rows[:, None] * stride + columns[None, :], tile.to(x.dtype.element_ty), mask=inside)


@triton.jit
def load_key_mask(key_mask, start, end, ROWS: tl.constexpr):
    """Whether each of the keys start .. start + ROWS may be attended; `key_mask` of one sequence, or None."""
    keys = start + tl.arange(0, ROWS)
    allowed = keys < end
    if key_mask is not None:
        allowed = allowed & (tl.load(key_mask + keys, mask=allowed, other=0) != 0)
    return allowed


@triton.jit
def load_log_sum_exp(lse, start, end, ROWS: tl.constexpr):
    """+inf for queries that do not exist or have no key: exp2(score - inf) is 0, never NaN."""
    rows = start + tl.arange(0, ROWS)
    value = tl.load(lse + rows, mask=rows < end, other=float("inf"))
    return tl.where(value == float("-inf"), float("inf"), value)


@triton.jit
def load_delta(
    delta, out, v_bias, grad, stride, start, end, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """rowsum(grad * (out - v_bias)) of the rows start .. start + ROWS, or what `delta` holds; `grad` is the tile."""
    if delta is not None:
        rows = start + tl.arange(0, ROWS)
        value = tl.load(delta + rows, mask=rows < end, other=0.0)
    else:
        tile = load_rows(out, None, stride, start, end, ROWS, D, BLOCK_D).to(tl.float32)
        if v_bias is not None:
            columns = tl.arange(0, BLOCK_D)
            tile -= tl.load(v_bias + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
        value = tl.sum(grad.to(tl.float32) * tile, 1)
    return value


@triton.jit
def store_result(
    out, lse, v_bias, acc, shift, total, stride, start, end, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Divide by the sum of the weights and write; a query without keys has a sum of 0, and gets 0 and -inf."""
    alive = total > 0
    divisor = tl.where(alive, total, 1.0)
    acc = acc / divisor[:, None]
    if v_bias is not None:
        columns = tl.arange(0, BLOCK_D)
        value = tl.load(v_bias + columns, mask=columns < D, other=0.0).to(tl.float32)
        acc += tl.where(alive[:, None], value[None, :], 0.0)
    store_rows(out, acc, stride, start, end, ROWS, D, BLOCK_D)
    rows = start + tl.arange(0, ROWS)
    log_sum = tl.where(alive, shift + tl.log2(divisor), float("-inf"))
    tl.store(lse + rows, log_sum, mask=rows < end)
