"""Kernels of attention over packed sequences: a tile is BLOCK_M consecutive tokens of the stream, whoever owns them.

A token attends within its own sequence, so a tile needs the start and the end of the sequence of each of its tokens,
found by search in `cu_seqlens`; the blocks it meets run from the first start to the last end. Scores are in base
2, statistics in float32, and the log-sum-exp that is kept is the natural one.

Of the bias only the part of q has to be added to its tokens. That of k adds the same to all scores of a query, which
the softmax cancels: its gradient is 0. That of v comes out as it is, because the probabilities sum to 1.
"""

# pyrefly: ignore-errors
# Inside jitted functions the types of triton.language are not what its annotations say.
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
NOWHERE = tl.constexpr(2147483647)


@triton.jit
def _bounds(tokens, cu_ptr, sequences, live, MARKS: tl.constexpr, STEPS: tl.constexpr):
    """Start and end of the sequence of each token; NOWHERE and 0 where not `live`, so that nothing lies between.

    Wanted is the last offset that is not greater than the token: of several equal ones that behind all empty sequences.
    Every 2^STEPS-th offset is compared with every token at once, because steps of a binary search wait for each other.
    """
    marks = tl.arange(0, MARKS) << STEPS
    offsets = tl.load(cu_ptr + marks, mask=marks <= sequences, other=NOWHERE)
    index = (tl.sum((offsets[None, :] <= tokens[:, None]).to(tl.int32), 1) - 1) << STEPS
    start = tl.load(cu_ptr + index)
    for step in tl.static_range(STEPS):
        candidate = index + (1 << (STEPS - 1 - step))
        offset = tl.load(cu_ptr + candidate, mask=candidate <= sequences, other=NOWHERE)
        index = tl.where(offset <= tokens, candidate, index)
        start = tl.where(offset <= tokens, offset, start)
    end = tl.load(cu_ptr + index + 1, mask=live, other=0)
    return tl.where(live, start, NOWHERE), end


@triton.jit
def _tile(ptr, stride, rows, dims, D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows from `ptr` on whose flag in `rows` is set, zero elsewhere: nothing else is read."""
    offsets = tl.arange(0, BLOCK_ROWS)[:, None] * stride + dims[None, :]
    return tl.load(ptr + offsets, mask=rows[:, None] & (dims[None, :] < D), other=0.0)


@triton.jit
def _put(ptr, stride, x, rows, dims, D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    offsets = tl.arange(0, BLOCK_ROWS)[:, None] * stride + dims[None, :]
    tl.store(ptr + offsets, x.to(ptr.dtype.element_ty), mask=rows[:, None] & (dims[None, :] < D))


@triton.jit
def _bias(ptr, part: tl.constexpr, heads, head, dims, D: tl.constexpr):
    return tl.load(ptr + (part * heads + head) * D + dims, mask=dims < D, other=0.0).to(tl.float32)


@triton.jit
def attention_packed_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    cu_ptr,
    out_ptr,
    lse_ptr,
    stride_t,
    stride_h,
    tokens,
    sequences,
    heads,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MARKS: tl.constexpr,
    STEPS: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads * BLOCK_M
    dims = tl.arange(0, BLOCK_D)
    rows = tile + tl.arange(0, BLOCK_M)
    total = tl.load(cu_ptr + sequences)
    live = rows < total
    head_offset = head.to(tl.int64) * stride_h
    q = _tile(q_ptr + tile.to(tl.int64) * stride_t + head_offset, stride_t, live, dims, D, BLOCK_M, BLOCK_D)
    start, end = _bounds(rows, cu_ptr, sequences, live, MARKS, STEPS)
    if bias_ptr is not None:
        q = (q.to(tl.float32) + _bias(bias_ptr, 0, heads, head, dims, D)[None, :]).to(q.dtype)

    first = tl.min(start, 0)
    last = tl.minimum(tile + BLOCK_M, total) if CAUSAL else tl.max(end, 0)
    k_block = k_ptr + first.to(tl.int64) * stride_t + head_offset
    v_block = v_ptr + first.to(tl.int64) * stride_t + head_offset
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for block in tl.range(first, last, BLOCK_N):
        keys = block + tl.arange(0, BLOCK_N)
        k = _tile(k_block, stride_t, keys < last, dims, D, BLOCK_N, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
        if CAUSAL:
            allowed = (keys[None, :] >= start[:, None]) & (keys[None, :] <= rows[:, None])
        else:
            allowed = (keys[None, :] >= start[:, None]) & (keys[None, :] < end[:, None])
        scores = tl.where(allowed, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # A row whose sequence begins in a later block has met nothing yet: -inf minus -inf would be NaN.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - shift[:, None])
        keep = tl.exp2(top - shift)
        norm = norm * keep + tl.sum(weights, 1)
        v = _tile(v_block, stride_t, keys < last, dims, D, BLOCK_N, BLOCK_D)
        acc = tl.dot(weights.to(v.dtype), v, acc * keep[:, None], input_precision=PRECISION)
        top = new_top
        k_block += BLOCK_N * stride_t
        v_block += BLOCK_N * stride_t

    norm = tl.where(live, norm, 1.0)
    out = acc / norm[:, None]
    if bias_ptr is not None:
        out = tl.where(live[:, None], out + _bias(bias_ptr, 2, heads, head, dims, D)[None, :], 0.0)
    inside = rows < tokens
    _put(out_ptr + (tile.to(tl.int64) * heads + head) * D, heads * D, out, inside, dims, D, BLOCK_M, BLOCK_D)
    tl.store(lse_ptr + head.to(tl.int64) * tokens + rows, (top + tl.log2(norm)) * LN_2, mask=inside)


@triton.jit
def attention_packed_backward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    cu_ptr,
    out_ptr,
    lse_ptr,
    grad_ptr,
    dqkv_ptr,
    dbias_ptr,
    stride_t,
    stride_h,
    grad_stride_t,
    grad_stride_h,
    tokens,
    sequences,
    heads,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MARKS: tl.constexpr,
    STEPS: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Every tile is worked on twice, by neighbouring programs: as keys (dK, dV) and as queries (dQ).

    `dbias_ptr` gets column sums: float32 [tiles, 2, heads, D], of dQ and of dV.
    """
    as_queries = tl.program_id(0) % 2
    head = tl.program_id(0) // 2 % heads
    number = tl.program_id(0) // 2 // heads
    tile = number * BLOCK_M
    dims = tl.arange(0, BLOCK_D)
    rows = tile + tl.arange(0, BLOCK_M)
    total = tl.load(cu_ptr + sequences)
    live = rows < total
    inside = rows < tokens
    start, end = _bounds(rows, cu_ptr, sequences, live, MARKS, STEPS)
    scale_2 = scale * LOG2_E

    q_ptr += head.to(tl.int64) * stride_h
    k_ptr += head.to(tl.int64) * stride_h
    v_ptr += head.to(tl.int64) * stride_h
    grad_ptr += head.to(tl.int64) * grad_stride_h
    lse_ptr += head.to(tl.int64) * tokens
    out_ptr += head * D
    dqkv_ptr += tile.to(tl.int64) * 3 * heads * D + head * D
    if dbias_ptr is not None:
        dbias_ptr += (number.to(tl.int64) * 2 * heads + head) * D

    if as_queries:
        q = _tile(q_ptr + tile.to(tl.int64) * stride_t, stride_t, live, dims, D, BLOCK_M, BLOCK_D)
        grad = _tile(grad_ptr + tile.to(tl.int64) * grad_stride_t, grad_stride_t, live, dims, D, BLOCK_M, BLOCK_D)
        out = _tile(out_ptr + tile.to(tl.int64) * heads * D, heads * D, live, dims, D, BLOCK_M, BLOCK_D).to(tl.float32)
        if bias_ptr is not None:
            q = (q.to(tl.float32) + _bias(bias_ptr, 0, heads, head, dims, D)[None, :]).to(q.dtype)
            out -= _bias(bias_ptr, 2, heads, head, dims, D)[None, :]
        delta = tl.sum(grad.to(tl.float32) * out, 1)
        lse = tl.load(lse_ptr + rows, mask=live, other=0.0) * LOG2_E
        first = tl.min(start, 0)
        last = tl.minimum(tile + BLOCK_M, total) if CAUSAL else tl.max(end, 0)
        k_block = k_ptr + first.to(tl.int64) * stride_t
        v_block = v_ptr + first.to(tl.int64) * stride_t
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for block in tl.range(first, last, BLOCK_N):
            keys = block + tl.arange(0, BLOCK_N)
            k = _tile(k_block, stride_t, keys < last, dims, D, BLOCK_N, BLOCK_D)
            v = _tile(v_block, stride_t, keys < last, dims, D, BLOCK_N, BLOCK_D)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_2
            if CAUSAL:
                allowed = (keys[None, :] >= start[:, None]) & (keys[None, :] <= rows[:, None])
            else:
                allowed = (keys[None, :] >= start[:, None]) & (keys[None, :] < end[:, None])
            p = tl.exp2(tl.where(allowed, scores - lse[:, None], float("-inf")))
            ds = p * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
            k_block += BLOCK_N * stride_t
            v_block += BLOCK_N * stride_t
        dq *= scale
        _put(dqkv_ptr, 3 * heads * D, dq, inside, dims, D, BLOCK_M, BLOCK_D)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + dims, tl.sum(dq, 0), mask=dims < D)
    else:
        k = _tile(k_ptr + tile.to(tl.int64) * stride_t, stride_t, live, dims, D, BLOCK_M, BLOCK_D)
        v = _tile(v_ptr + tile.to(tl.int64) * stride_t, stride_t, live, dims, D, BLOCK_M, BLOCK_D)
        first = tl.minimum(tile, total) if CAUSAL else tl.min(start, 0)
        last = tl.max(end, 0)
        q_block = q_ptr + first.to(tl.int64) * stride_t
        grad_block = grad_ptr + first.to(tl.int64) * grad_stride_t
        out_block = out_ptr + first.to(tl.int64) * heads * D
        dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for block in tl.range(first, last, BLOCK_N):
            queries = block + tl.arange(0, BLOCK_N)
            q = _tile(q_block, stride_t, queries < last, dims, D, BLOCK_N, BLOCK_D)
            if bias_ptr is not None:
                q = (q.to(tl.float32) + _bias(bias_ptr, 0, heads, head, dims, D)[None, :]).to(q.dtype)
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_2
            lse = tl.load(lse_ptr + queries, mask=queries < last, other=0.0) * LOG2_E
            if CAUSAL:
                allowed = (queries[None, :] >= rows[:, None]) & (queries[None, :] < end[:, None])
            else:
                allowed = (queries[None, :] >= start[:, None]) & (queries[None, :] < end[:, None])
            p = tl.exp2(tl.where(allowed, scores - lse[None, :], float("-inf")))
            grad = _tile(grad_block, grad_stride_t, queries < last, dims, D, BLOCK_N, BLOCK_D)
            dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
            out = _tile(out_block, heads * D, queries < last, dims, D, BLOCK_N, BLOCK_D).to(tl.float32)
            if bias_ptr is not None:
                out -= _bias(bias_ptr, 2, heads, head, dims, D)[None, :]
            delta = tl.sum(grad.to(tl.float32) * out, 1)
            ds = p * (tl.dot(v, tl.trans(grad), input_precision=PRECISION) - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
            q_block += BLOCK_N * stride_t
            grad_block += BLOCK_N * grad_stride_t
            out_block += BLOCK_N * heads * D
        _put(dqkv_ptr + heads * D, 3 * heads * D, dk * scale, inside, dims, D, BLOCK_M, BLOCK_D)
        _put(dqkv_ptr + 2 * heads * D, 3 * heads * D, dv, inside, dims, D, BLOCK_M, BLOCK_D)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + heads * D + dims, tl.sum(dv, 0), mask=dims < D)
