"""Kernels of attention with one query a sequence: a program reads the keys and values of one head of one sequence.

There is no product of matrices, only memory to read. Each of the BLOCK_N rows of a block keeps a softmax of its own
(maximum, norm and sum over the keys that it has met) and they are merged once, at the end: the loop has no barrier.
With `cu_ptr` the sequences are packed, else all have `length` keys.
"""

# pyrefly: ignore-errors
# Inside jitted functions the types of triton.language are not what its annotations say.
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _extent(cu_ptr, sequence, length):
    """First row and number of rows of a sequence."""
    if cu_ptr is not None:
        start = tl.load(cu_ptr + sequence)
        return start.to(tl.int64), tl.load(cu_ptr + sequence + 1) - start
    else:
        return sequence.to(tl.int64) * length, length


@triton.jit
def attention_single_query_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cu_ptr,
    out_ptr,
    lse_ptr,
    q_stride_s,
    q_stride_h,
    stride_s,
    stride_n,
    stride_h,
    length,
    heads,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head = (tl.program_id(0) % heads).to(tl.int64)
    sequence = tl.program_id(0) // heads
    dims = tl.arange(0, BLOCK_D)
    q_ptr += sequence.to(tl.int64) * q_stride_s + head * q_stride_h
    q = tl.load(q_ptr + dims, mask=dims < D, other=0.0).to(tl.float32) * (scale * LOG2_E)
    start, count = _extent(cu_ptr, sequence, length)
    if cu_ptr is not None:
        offset = start * stride_n + head * stride_h
    else:
        offset = sequence.to(tl.int64) * stride_s + head * stride_h
    k_ptr += offset
    v_ptr += offset
    rows = tl.arange(0, BLOCK_N)
    offsets = rows[:, None] * stride_n + dims[None, :]
    top = tl.full([BLOCK_N], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for block in tl.range(0, count, BLOCK_N):
        live = rows < count - block
        mask = live[:, None] & (dims[None, :] < D)
        k = tl.load(k_ptr + offsets, mask=mask, other=0.0)
        v = tl.load(v_ptr + offsets, mask=mask, other=0.0)
        scores = tl.where(live, tl.sum(q[None, :] * k.to(tl.float32), 1), float("-inf"))
        new_top = tl.maximum(top, scores)
        # A row that has met no key: -inf minus -inf would be NaN.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - shift)
        keep = tl.exp2(top - shift)
        norm = norm * keep + weights
        acc = acc * keep[:, None] + weights[:, None] * v.to(tl.float32)
        top = new_top
        k_ptr += BLOCK_N * stride_n
        v_ptr += BLOCK_N * stride_n

    top_of_all = tl.max(top, 0)
    keep = tl.exp2(top - tl.where(top_of_all == float("-inf"), 0.0, top_of_all))
    norm_of_all = tl.where(count > 0, tl.sum(norm * keep, 0), 1.0)
    out = tl.sum(acc * keep[:, None], 0) / norm_of_all
    row = sequence.to(tl.int64) * heads + head
    tl.store(out_ptr + row * D + dims, out.to(out_ptr.dtype.element_ty), mask=dims < D)
    tl.store(lse_ptr + row, (top_of_all + tl.log2(norm_of_all)) * LN_2)


@triton.jit
def attention_single_query_backward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cu_ptr,
    out_ptr,
    lse_ptr,
    grad_ptr,
    dq_ptr,
    dkv_ptr,
    q_stride_s,
    q_stride_h,
    stride_s,
    stride_n,
    stride_h,
    grad_stride_s,
    grad_stride_h,
    length,
    tokens,
    sequences,
    heads,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`dkv_ptr` [tokens, 2, heads, D] is written in full, where it is given."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    sequence = tl.program_id(0) // heads
    dims = tl.arange(0, BLOCK_D)
    inside = dims < D
    q_ptr += sequence.to(tl.int64) * q_stride_s + head * q_stride_h
    q = tl.load(q_ptr + dims, mask=inside, other=0.0).to(tl.float32)
    grad_ptr += sequence.to(tl.int64) * grad_stride_s + head * grad_stride_h
    grad = tl.load(grad_ptr + dims, mask=inside, other=0.0).to(tl.float32)
    row = sequence.to(tl.int64) * heads + head
    out = tl.load(out_ptr + row * D + dims, mask=inside, other=0.0).to(tl.float32)
    delta = tl.sum(grad * out, 0)
    lse = tl.load(lse_ptr + row) * LOG2_E
    start, count = _extent(cu_ptr, sequence, length)
    if cu_ptr is not None:
        offset = start * stride_n + head * stride_h
    else:
        offset = sequence.to(tl.int64) * stride_s + head * stride_h
    k_ptr += offset
    v_ptr += offset
    rows = tl.arange(0, BLOCK_N)
    offsets = rows[:, None] * stride_n + dims[None, :]
    of_token = 2 * heads * D
    written = rows[:, None] * of_token + dims[None, :]
    if dkv_ptr is not None:
        dk_ptr = dkv_ptr + start * of_token + head * D
    dq = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for block in tl.range(0, count, BLOCK_N):
        live = rows < count - block
        mask = live[:, None] & inside[None, :]
        k = tl.load(k_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        p = tl.exp2(tl.sum(q[None, :] * k, 1) * (scale * LOG2_E) - lse)
        ds = tl.where(live, p * (tl.sum(grad[None, :] * v, 1) - delta) * scale, 0.0)
        dq += ds[:, None] * k
        if dkv_ptr is not None:
            dk, dv = ds[:, None] * q[None, :], p[:, None] * grad[None, :]
            tl.store(dk_ptr + written, dk.to(dkv_ptr.dtype.element_ty), mask=mask)
            tl.store(dk_ptr + heads * D + written, dv.to(dkv_ptr.dtype.element_ty), mask=mask)
            dk_ptr += BLOCK_N * of_token
        k_ptr += BLOCK_N * stride_n
        v_ptr += BLOCK_N * stride_n
    tl.store(dq_ptr + row * D + dims, tl.sum(dq, 0).to(dq_ptr.dtype.element_ty), mask=inside)

    if cu_ptr is not None and dkv_ptr is not None:
        # Tokens past the end are shared out to the sequences, a block each in turn.
        zeros = tl.zeros([BLOCK_N, BLOCK_D], dkv_ptr.dtype.element_ty)
        rest = tokens - tl.load(cu_ptr + sequences)
        dk_ptr = dkv_ptr + (tokens - rest + sequence * BLOCK_N).to(tl.int64) * of_token + head * D
        for block in tl.range(sequence * BLOCK_N, rest, sequences * BLOCK_N):
            mask = (rows < rest - block)[:, None] & inside[None, :]
            tl.store(dk_ptr + written, zeros, mask=mask)
            tl.store(dk_ptr + heads * D + written, zeros, mask=mask)
            dk_ptr += tl.cast(sequences * BLOCK_N, tl.int64) * of_token
