"""Attention over any number of keys: blocks of keys pass by, with a running maximum and sum of the softmax."""

# Triton's language is not what a type checker takes it for.
# pyrefly: ignore-errors

import triton
import triton.language as tl

from farl_kernels.attention.tiles import LOG2_E, load_delta, load_key_mask, load_rows, store_result


@triton.jit
def _attend(
    q,
    k,
    v,
    key_mask,
    acc,
    top,
    total,
    k_row,
    v_row,
    start,
    at,
    n,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    STEP: tl.constexpr,
):
    """Take in the keys at .. at + STEP. MASKED: some of them may lie past `n` or, if CAUSAL, ahead of a query."""
    k_s = load_rows(k, None, k_row, at, n, STEP, D, BLOCK_D)
    v_s = load_rows(v, None, v_row, at, n, STEP, D, BLOCK_D)
    scores = tl.dot(q, tl.trans(k_s), input_precision=PRECISION) * (scale * LOG2_E)
    if MASKED or key_mask is not None:
        scores = tl.where(load_key_mask(key_mask, at, n, STEP)[None, :], scores, float("-inf"))
    if MASKED and CAUSAL:
        behind = start + tl.arange(0, q.shape[0])[:, None] >= at + tl.arange(0, STEP)[None, :]
        scores = tl.where(behind, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    # A query without keys so far has only -inf: 0 keeps the differences from being NaN.
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(scores - shift[:, None])
    shrink = tl.exp2(top - shift)
    acc = tl.dot(p.to(v_s.dtype), v_s, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_top, total * shrink + tl.sum(p, 1)


@triton.jit
def attention_long_forward_kernel(
    q,
    k,
    v,
    bias,
    key_mask,
    out,
    lse,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    heads,
    m,
    n,
    tiles,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STEP: tl.constexpr,
):
    program = tl.program_id(0)
    start = (program % tiles) * BLOCK_M
    head = ((program // tiles) % heads).to(tl.int64)
    batch = (program // tiles // heads).to(tl.int64)
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    out += (batch * m * heads + head) * D
    lse += (batch * heads + head) * m
    q_bias = None
    v_bias = None
    if bias is not None:
        q_bias = bias + head * D
        v_bias = q_bias + 2 * heads * D
    if key_mask is not None:
        key_mask += batch * n

    q_t = load_rows(q, q_bias, q_row, start, m, BLOCK_M, D, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    last = n
    whole = n // STEP * STEP
    if CAUSAL:
        last = tl.minimum(n, start + BLOCK_M)
        whole = start // STEP * STEP
    # fmt: off
    for at in range(0, whole, STEP):
        acc, top, total = _attend(q_t, k, v, key_mask, acc, top, total, k_row, v_row, start, at, n,
                                  scale, D, BLOCK_D, False, CAUSAL, PRECISION, STEP)
    for at in range(whole, last, STEP):
        acc, top, total = _attend(q_t, k, v, key_mask, acc, top, total, k_row, v_row, start, at, n,
                                  scale, D, BLOCK_D, True, CAUSAL, PRECISION, STEP)
    # fmt: on
    shift = tl.where(top == float("-inf"), 0.0, top)
    store_result(out, lse, v_bias, acc, shift, total, heads * D, start, m, BLOCK_M, D, BLOCK_D)


@triton.jit
def attention_long_delta_kernel(
    out,
    bias,
    grad,
    delta,
    g_batch,
    g_row,
    g_head,
    heads,
    m,
    tiles,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """delta [B, H, M] = rowsum(grad * (out - bias of v)), float32."""
    program = tl.program_id(0)
    start = (program % tiles) * BLOCK_M
    head = ((program // tiles) % heads).to(tl.int64)
    batch = (program // tiles // heads).to(tl.int64)
    out += (batch * m * heads + head) * D
    g_t = load_rows(grad + batch * g_batch + head * g_head, None, g_row, start, m, BLOCK_M, D, BLOCK_D)
    v_bias = None
    if bias is not None:
        v_bias = bias + 2 * heads * D + head * D
    value = load_delta(None, out, v_bias, g_t, heads * D, start, m, BLOCK_M, D, BLOCK_D)
    rows = start + tl.arange(0, BLOCK_M)
    tl.store(delta + (batch * heads + head) * m + rows, value, mask=rows < m)
