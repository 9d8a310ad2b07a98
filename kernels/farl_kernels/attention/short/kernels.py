"""Attention over at most 256 keys: a head's keys and values stay on chip, so the softmax needs no running maximum.

The backward serves any number of keys.
"""

# Triton's language is not what a type checker takes it for.
# pyrefly: ignore-errors

import triton
import triton.language as tl

from farl_kernels.attention.tiles import (
    LOG2_E,
    load_delta,
    load_key_mask,
    load_log_sum_exp,
    load_rows,
    store_result,
    store_rows,
)


@triton.jit
def _scores(
    q,
    k,
    key_mask,
    start,
    n,
    scale,
    FIRST: tl.constexpr,
    KEYS: tl.constexpr,
    PARTIAL: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores in base 2 of the queries from `start` on and the keys FIRST .. FIRST + KEYS; -inf where not allowed."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
    if key_mask is not None or PARTIAL:
        scores = tl.where(load_key_mask(key_mask, FIRST, n, KEYS)[None, :], scores, float("-inf"))
    if CAUSAL:
        behind = start + tl.arange(0, q.shape[0])[:, None] >= FIRST + tl.arange(0, KEYS)[None, :]
        scores = tl.where(behind, scores, float("-inf"))
    return scores


@triton.jit
def attention_short_forward_kernel(
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
    groups,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEYS_0: tl.constexpr,
    KEYS_1: tl.constexpr,
    KEYS_2: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILES: tl.constexpr,
):
    """TILES tiles of queries of one head; keys in up to three chunks, of which only the last may be partial."""
    program = tl.program_id(0)
    group = program % groups
    head = ((program // groups) % heads).to(tl.int64)
    batch = (program // groups // heads).to(tl.int64)
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

    k_0 = load_rows(k, None, k_row, 0, n, KEYS_0, D, BLOCK_D)
    v_0 = load_rows(v, None, v_row, 0, n, KEYS_0, D, BLOCK_D)
    if KEYS_1:
        k_1 = load_rows(k, None, k_row, KEYS_0, n, KEYS_1, D, BLOCK_D)
        v_1 = load_rows(v, None, v_row, KEYS_0, n, KEYS_1, D, BLOCK_D)
    if KEYS_2:
        k_2 = load_rows(k, None, k_row, KEYS_0 + KEYS_1, n, KEYS_2, D, BLOCK_D)
        v_2 = load_rows(v, None, v_row, KEYS_0 + KEYS_1, n, KEYS_2, D, BLOCK_D)

    for tile in tl.range(0, TILES, num_stages=1):
        start = (group * TILES + tile) * BLOCK_M
        q_t = load_rows(q, q_bias, q_row, start, m, BLOCK_M, D, BLOCK_D)
        s_0 = _scores(q_t, k_0, key_mask, start, n, scale, 0, KEYS_0, KEYS_1 == 0, CAUSAL, PRECISION)
        top = tl.max(s_0, 1)
        if KEYS_1:
            s_1 = _scores(q_t, k_1, key_mask, start, n, scale, KEYS_0, KEYS_1, KEYS_2 == 0, CAUSAL, PRECISION)
            top = tl.maximum(top, tl.max(s_1, 1))
        if KEYS_2:
            s_2 = _scores(q_t, k_2, key_mask, start, n, scale, KEYS_0 + KEYS_1, KEYS_2, True, CAUSAL, PRECISION)
            top = tl.maximum(top, tl.max(s_2, 1))
        # A query without keys has -inf everywhere: 0 keeps the difference from being NaN.
        shift = tl.where(top == float("-inf"), 0.0, top)
        p_0 = tl.exp2(s_0 - shift[:, None])
        total = tl.sum(p_0, 1)
        acc = tl.dot(p_0.to(v_0.dtype), v_0, input_precision=PRECISION)
        if KEYS_1:
            p_1 = tl.exp2(s_1 - shift[:, None])
            total += tl.sum(p_1, 1)
            acc = tl.dot(p_1.to(v_1.dtype), v_1, acc, input_precision=PRECISION)
        if KEYS_2:
            p_2 = tl.exp2(s_2 - shift[:, None])
            total += tl.sum(p_2, 1)
            acc = tl.dot(p_2.to(v_2.dtype), v_2, acc, input_precision=PRECISION)
        store_result(out, lse, v_bias, acc, shift, total, heads * D, start, m, BLOCK_M, D, BLOCK_D)


@triton.jit
def attention_backward_kernel(
    q,
    k,
    v,
    bias,
    key_mask,
    out,
    lse,
    delta,
    grad,
    dq,
    dk,
    dv,
    dbias,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    g_batch,
    g_row,
    g_head,
    dq_batch,
    dq_row,
    dk_batch,
    dk_row,
    heads,
    m,
    n,
    key_tiles,
    query_tiles,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """A program computes dk and dv of a tile of keys, or dq of a tile of queries.

    dq, dk and dv have unit stride in D and stride D over heads. Where dq, or dk and dv, are None, the caller starts no
    tile of that kind (its branch is compiled nevertheless). `delta` [B, H, M] float32 is rowsum(grad * (out - bias of
    v)); with None it is computed on the way, which saves a launch and reads more. `dbias` [B, tiles, 2, H, D] float32
    or None takes what each tile of queries adds to the gradients of the bias of q and v.
    """
    program = tl.program_id(0)
    tiles = key_tiles + query_tiles
    tile = program % tiles
    head = ((program // tiles) % heads).to(tl.int64)
    batch = (program // tiles // heads).to(tl.int64)
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    grad += batch * g_batch + head * g_head
    out += (batch * m * heads + head) * D
    lse += (batch * heads + head) * m
    if delta is not None:
        delta += (batch * heads + head) * m
    q_bias = None
    v_bias = None
    if bias is not None:
        q_bias = bias + head * D
        v_bias = q_bias + 2 * heads * D
    if key_mask is not None:
        key_mask += batch * n

    if tile < key_tiles:
        start = tile * BLOCK
        k_t = load_rows(k, None, k_row, start, n, BLOCK, D, BLOCK_D)
        v_t = load_rows(v, None, v_row, start, n, BLOCK, D, BLOCK_D)
        dk_t = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        dv_t = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        first = 0
        if CAUSAL:
            first = start // STEP * STEP
        for at in range(first, m, STEP):
            q_s = load_rows(q, q_bias, q_row, at, m, STEP, D, BLOCK_D)
            g_s = load_rows(grad, None, g_row, at, m, STEP, D, BLOCK_D)
            delta_s = load_delta(delta, out, v_bias, g_s, heads * D, at, m, STEP, D, BLOCK_D)
            scores = tl.dot(k_t, tl.trans(q_s), input_precision=PRECISION)
            p = tl.exp2(scores * (scale * LOG2_E) - load_log_sum_exp(lse, at, m, STEP)[None, :])
            if CAUSAL:
                behind = at + tl.arange(0, STEP)[None, :] >= start + tl.arange(0, BLOCK)[:, None]
                p = tl.where(behind, p, 0.0)
            dv_t = tl.dot(p.to(g_s.dtype), g_s, dv_t, input_precision=PRECISION)
            dp = tl.dot(v_t, tl.trans(g_s), input_precision=PRECISION)
            ds = p * (dp - delta_s[None, :])
            dk_t = tl.dot(ds.to(q_s.dtype), q_s, dk_t, input_precision=PRECISION)
        # Only here: what a forbidden key or one past the end computed stays in its own row.
        allowed = load_key_mask(key_mask, start, n, BLOCK)[:, None]
        dk_t = tl.where(allowed, dk_t * scale, 0.0)
        dv_t = tl.where(allowed, dv_t, 0.0)
        if dk is not None:
            store_rows(dk + batch * dk_batch + head * D, dk_t, dk_row, start, n, BLOCK, D, BLOCK_D)
            store_rows(dv + batch * dk_batch + head * D, dv_t, dk_row, start, n, BLOCK, D, BLOCK_D)
    else:
        tile -= key_tiles
        start = tile * BLOCK
        q_t = load_rows(q, q_bias, q_row, start, m, BLOCK, D, BLOCK_D)
        g_t = load_rows(grad, None, g_row, start, m, BLOCK, D, BLOCK_D)
        delta_t = load_delta(delta, out, v_bias, g_t, heads * D, start, m, BLOCK, D, BLOCK_D)[:, None]
        log_sum = load_log_sum_exp(lse, start, m, BLOCK)[:, None]
        dq_t = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        last = n
        if CAUSAL:
            last = tl.minimum(n, start + BLOCK)
        for at in range(0, last, STEP):
            k_s = load_rows(k, None, k_row, at, n, STEP, D, BLOCK_D)
            v_s = load_rows(v, None, v_row, at, n, STEP, D, BLOCK_D)
            scores = tl.dot(q_t, tl.trans(k_s), input_precision=PRECISION)
            p = tl.exp2(scores * (scale * LOG2_E) - log_sum)
            allowed = load_key_mask(key_mask, at, n, STEP)[None, :]
            if CAUSAL:
                behind = start + tl.arange(0, BLOCK)[:, None] >= at + tl.arange(0, STEP)[None, :]
                allowed = allowed & behind
            p = tl.where(allowed, p, 0.0)
            dp = tl.dot(g_t, tl.trans(v_s), input_precision=PRECISION)
            ds = p * (dp - delta_t)
            dq_t = tl.dot(ds.to(k_s.dtype), k_s, dq_t, input_precision=PRECISION)
        dq_t *= scale
        if dq is not None:
            store_rows(dq + batch * dq_batch + head * D, dq_t, dq_row, start, m, BLOCK, D, BLOCK_D)
        if dbias is not None:
            columns = tl.arange(0, BLOCK_D)
            dbias += ((batch * query_tiles + tile) * 2 * heads + head) * D
            tl.store(dbias + columns, tl.sum(dq_t, 0), mask=columns < D)
            alive = log_sum < float("inf")
            dv_bias = tl.sum(tl.where(alive, g_t.to(tl.float32), 0.0), 0)
            tl.store(dbias + heads * D + columns, dv_bias, mask=columns < D)
