"""Plain attention: the truth that every other backend is held to.

softmax(q k^T * scale) v in float32 or better (float64 stays float64), rounded once at the end to the dtype of q.
A query that may attend no key gives 0 and passes no gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from farl_kernels.attention.packing import segment_ids
from farl_kernels.precision import accumulation_dtype

LOG_2 = math.log(2)


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


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """q [B, M, H, D], k and v [B, N, H, D] -> out like q, and log2(sum(exp(scores))) [B, H, M].

    The latter is float32 (float64 for float64), and -inf for a query without keys.
    """
    scores, alive = _scores(q, k, key_mask, causal, scale)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(~alive, 0.0)[..., None]).exp()
    lse = lse / LOG_2
    out = weights @ v.to(scores.dtype).transpose(1, 2)
    return _dense(out.transpose(1, 2), q.dtype), lse


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, contiguous: dS = P (dP - rowsum(grad out)) with P = exp(S - log(2) lse)."""
    scores, alive = _scores(q, k, key_mask, causal, scale)
    compute = scores.dtype
    g, o, qc, kc, vc = (x.to(compute).transpose(1, 2) for x in (grad, out, q, k, v))
    weights = (scores - LOG_2 * lse.to(compute).masked_fill(~alive, 0.0)[..., None]).exp()
    dscores = weights * (g @ vc.mT - (g * o).sum(-1, keepdim=True)) * scale
    grads = dscores @ kc, dscores.mT @ qc, weights.mT @ g
    dq, dk, dv = (_dense(x.transpose(1, 2), q.dtype) for x in grads)
    return dq, dk, dv


def attention_qkv_forward(
    qkv: Tensor, bias: Tensor | None, key_mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """qkv [B, N, 3, H, D], bias [3, H, D] -> out [B, N, H, D] and the log-sum-exp [B, H, N] without the bias of k.

    The bias of k adds the same to all scores of a query, and the softmax cancels it; that of v adds itself to `out`.
    """
    out, lse = attention_forward(*_biased(qkv, bias), key_mask, causal, scale)
    if bias is not None:
        alive = (lse > float("-inf")).transpose(1, 2)[..., None]
        out = (out + bias[2].to(out.dtype) * alive).to(qkv.dtype)
    return out.to(qkv.dtype), lse


def attention_qkv_backward(
    grad: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    bias_grad: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient of qkv, contiguous, and of the bias, float32 or better ([0] unless `bias_grad`)."""
    q, k, v = _biased(qkv, bias)
    alive = (lse > float("-inf")).transpose(1, 2)[..., None]
    if bias is not None:
        out = out.to(q.dtype) - bias[2].to(q.dtype) * alive
    dq, dk, dv = attention_backward(grad, q, k, v, key_mask, out, lse, causal, scale)
    dbias = lse.new_empty(0)
    if bias_grad:
        dq_bias, dv_bias = dq.sum((0, 1)), (grad.to(q.dtype) * alive).sum((0, 1))
        dbias = torch.stack([dq_bias, torch.zeros_like(dq_bias), dv_bias])
    return torch.stack([dq, dk, dv], 2).to(qkv.dtype), dbias


def _dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    # Unlike contiguous(), this makes the strides of dimensions of size 1 those of a new tensor.
    return x.to(dtype).clone(memory_format=torch.contiguous_format)


def _biased(qkv: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    rows = qkv.to(accumulation_dtype(qkv.dtype))
    q, k, v = rows.unbind(2)
    return (q if bias is None else q + bias[0].to(q.dtype)), k, v


def _scores(q: Tensor, k: Tensor, key_mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Scores [B, H, M, N], -inf where not allowed, and which queries have a key, [B, H, M]."""
    compute = accumulation_dtype(q.dtype)
    scores = (q.to(compute).transpose(1, 2) @ k.to(compute).permute(0, 2, 3, 1)) * scale
    allowed = allowed_keys(q.shape[1], k.shape[1], causal=causal, key_mask=key_mask, device=q.device)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    return scores, (scores > float("-inf")).any(-1)
