"""Plain attention: the truth that every other backend is held to.

softmax(q k^T * scale) v in float32 or better (float64 stays float64), rounded once at the end to the dtype of q.
A query that may attend no key gives 0 and passes no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from farl_kernels.attention.packing import segment_ids
from farl_kernels.precision import accumulation_dtype


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, scale: float) -> Tensor:
    """q [..., M, D], k and v [..., N, D], `allowed` bool broadcastable to [..., M, N] -> [..., M, D]."""
    compute = accumulation_dtype(q.dtype)
    scores = (q.to(compute) @ k.to(compute).mT) * scale
    if allowed is None:
        probabilities = scores.softmax(-1)
    else:
        # A row without keys is computed with every key and then zeroed: -inf everywhere would give NaN.
        dead = ~allowed.any(-1, keepdim=True)
        scores = scores.masked_fill(~(allowed | dead), float("-inf"))
        probabilities = scores.softmax(-1).masked_fill(dead, 0.0)
    return (probabilities @ v.to(compute)).to(q.dtype)


def allowed_keys(m: int, n: int, *, causal: bool, key_mask: Tensor | None, device: torch.device) -> Tensor | None:
    """Bool mask broadcastable to [B, H, M, N], True = may be attended; None when every key may be."""
    allowed = None if key_mask is None else key_mask[:, None, None, :]
    if causal:
        lower = torch.ones(m, n, dtype=torch.bool, device=device).tril()
        allowed = lower if allowed is None else allowed & lower
    return allowed


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, key_mask: Tensor | None, scale: float) -> Tensor:
    """q [B, H, M, D], k and v [B, H, N, D] -> [B, H, M, D]."""
    allowed = allowed_keys(q.shape[2], k.shape[2], causal=causal, key_mask=key_mask, device=q.device)
    return softmax_attention(q, k, v, allowed, scale)


def attention_packed(
    qkv: Tensor,
    *,
    qkv_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    causal: bool,
    key_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """[B, N, 3, H, D] -> [B, N, H, D]; [T, 3, H, D] with `cu_seqlens` -> [T, H, D] over a T x T block-diagonal mask."""
    compute = accumulation_dtype(qkv.dtype)
    rows = qkv.to(compute)
    allowed = None
    if cu_seqlens is not None:
        segments = segment_ids(cu_seqlens, qkv.shape[0])
        past_end = segments == cu_seqlens.shape[0] - 1
        allowed = (segments[:, None] == segments[None, :]) & ~past_end[:, None]
        # What stands past the end is never read, so that it may be NaN.
        rows = rows.masked_fill(past_end[:, None, None, None], 0.0)
    if qkv_bias is not None:
        rows = rows + qkv_bias.to(compute)
    q, k, v = (part.transpose(-3, -2) for part in rows.unbind(-3))
    if allowed is None:
        out = attention(q, k, v, causal=causal, key_mask=key_mask, scale=scale)
    else:
        out = softmax_attention(q, k, v, allowed.tril() if causal else allowed, scale)
    return out.transpose(-3, -2).to(qkv.dtype)


def attention_single_query(
    q: Tensor, kv: Tensor, *, cu_seqlens: Tensor | None, max_seqlen: int | None, scale: float
) -> Tensor:
    """q [S, H, D]; kv [S, N, 2, H, D], or [T, 2, H, D] with `cu_seqlens` -> [S, H, D]."""
    if cu_seqlens is None:
        k, v = (part.transpose(1, 2) for part in kv.unbind(2))
        return softmax_attention(q[:, :, None], k, v, None, scale)[:, :, 0]
    segments = segment_ids(cu_seqlens, kv.shape[0])
    kv = kv.masked_fill((segments == cu_seqlens.shape[0] - 1)[:, None, None, None], 0.0)
    k, v = (part.transpose(0, 1) for part in kv.unbind(1))
    allowed = torch.arange(q.shape[0], device=q.device)[:, None] == segments[None, :]
    return softmax_attention(q.transpose(0, 1), k, v, allowed, scale).transpose(0, 1)
