"""Attention over at most 256 keys in 16 bits: q [B, M, H, D], k and v [B, N, H, D], any strides."""

from __future__ import annotations

import torch
from torch import Tensor

from farl_kernels import tables
from farl_kernels.attention.arguments import batch_row_head, block_of, bucket_of, kernel_mask, kernel_rows
from farl_kernels.attention.short.kernels import attention_backward_kernel, attention_short_forward_kernel
from farl_kernels.launch import launch
from farl_kernels.precision import dot_precision

OP = "attention_short"
LARGEST_CHUNK = 128


def key_chunks(n: int) -> tuple[int, int, int]:
    """Up to three powers of two, 0 where not needed, that hold `n` <= 256 keys; all but the last are full.

    197 keys cost 128 + 64 + 16 columns of scores.
    """
    left = max(16, -(-n // 16) * 16)
    chunks = []
    while left > 0:
        fits = min(LARGEST_CHUNK, 1 << (left.bit_length() - 1))
        # The third chunk takes all that is left.
        chunks.append(fits if len(chunks) < 2 else 1 << (left - 1).bit_length())
        left -= chunks[-1]
    first, second, third = chunks + [0] * (3 - len(chunks))
    if third and third == second:
        second, third = 2 * second, 0
    return first, second, third


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, key_mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """out [B, M, H, D] and the base-2 log-sum-exp of the scores [B, H, M], float32; `bias` is [3, H, D] or None."""
    q, k, v = kernel_rows(q), kernel_rows(k), kernel_rows(v)
    batch, m, heads, head_dim = q.shape
    n = k.shape[1]
    out = torch.empty(batch, m, heads, head_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, m, dtype=torch.float32, device=q.device)
    config = tables.lookup(OP, "forward", bucket_of(q, n), q.device)
    tiles = -(-m // config["BLOCK_M"])
    # Masks take registers that a loop over tiles needs.
    together = config["TILES"] if key_mask is None and not causal else 1
    groups = -(-tiles // together)
    config["TILES"] = -(-tiles // max(1, groups))
    keys_0, keys_1, keys_2 = key_chunks(n)
    launch(
        attention_short_forward_kernel,
        (groups * heads * batch,),
        q,
        k,
        v,
        None if bias is None else bias.contiguous(),
        kernel_mask(key_mask),
        out,
        lse,
        *batch_row_head(q),
        *batch_row_head(k),
        *batch_row_head(v),
        heads,
        m,
        n,
        groups,
        scale,
        D=head_dim,
        BLOCK_D=block_of(head_dim),
        KEYS_0=keys_0,
        KEYS_1=keys_1,
        KEYS_2=keys_2,
        CAUSAL=causal,
        PRECISION=dot_precision(q.dtype),
        **config,
    )
    return out, lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    bias_grad: bool,
    *,
    op: str = OP,
    delta: Tensor | None = None,
) -> Tensor | None:
    """Write dq, dk and dv, which have unit stride in D and stride D over heads; return the gradient of the bias.

    `dq`, or `dk` and `dv` together, may be None; with `bias_grad` none of them.
    """
    grad, q, k, v = kernel_rows(grad), kernel_rows(q), kernel_rows(k), kernel_rows(v)
    batch, m, heads, head_dim = q.shape
    n = k.shape[1]
    config = tables.lookup(op, "backward", bucket_of(q, n if op == OP else None), q.device)
    key_tiles = 0 if dk is None else -(-n // config["BLOCK"])
    query_tiles = 0 if dq is None else -(-m // config["BLOCK"])
    partial = None
    if bias_grad:
        partial = torch.empty(batch, query_tiles, 2, heads, head_dim, dtype=torch.float32, device=q.device)
    launch(
        attention_backward_kernel,
        ((key_tiles + query_tiles) * heads * batch,),
        q,
        k,
        v,
        None if bias is None else bias.contiguous(),
        kernel_mask(key_mask),
        out.contiguous(),
        lse,
        delta,
        grad,
        dq,
        dk,
        dv,
        partial,
        *batch_row_head(q),
        *batch_row_head(k),
        *batch_row_head(v),
        *batch_row_head(grad),
        *((0, 0) if dq is None else dq.stride()[:2]),
        *((0, 0) if dk is None else dk.stride()[:2]),
        heads,
        m,
        n,
        key_tiles,
        query_tiles,
        scale,
        D=head_dim,
        BLOCK_D=block_of(head_dim),
        CAUSAL=causal,
        PRECISION=dot_precision(q.dtype),
        **config,
    )
    if partial is None:
        return None
    dq_bias, dv_bias = partial.sum((0, 1))
    return torch.stack([dq_bias, torch.zeros_like(dq_bias), dv_bias])
