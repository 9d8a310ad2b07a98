"""What the raw ops of single-query attention compute, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from farl_kernels.attention.packing import segment_ids
from farl_kernels.precision import accumulation_dtype


def forward(q: Tensor, kv: Tensor, cu_seqlens: Tensor | None, max_seqlen: int, scale: float) -> tuple[Tensor, Tensor]:
    """q [S, H, D], kv [S, N, 2, H, D] or [T, 2, H, D] -> out [S, H, D] and the natural log-sum-exp, float32 [S, H].

    `max_seqlen` bounds the lengths of packed sequences. A sequence without keys gives 0 and -inf.
    (Of float64, float64.)
    """
    _, v, probabilities, lse = _operands(q, kv, cu_seqlens, scale)
    return torch.einsum("shn,nhd->shd", probabilities, v).to(q.dtype).contiguous(), lse.contiguous()


def backward(
    grad: Tensor,
    q: Tensor,
    kv: Tensor,
    cu_seqlens: Tensor | None,
    out: Tensor,
    lse: Tensor,
    max_seqlen: int,
    scale: float,
    wants_kv: bool,
) -> tuple[Tensor, Tensor]:
    """grad [S, H, D] -> that of q, and with `wants_kv` that of kv (else an empty tensor)."""
    k, v, probabilities, _ = _operands(q, kv, cu_seqlens, scale)
    do = grad.to(k.dtype)
    dp = torch.einsum("shd,nhd->shn", do, v)
    ds = probabilities * (dp - (probabilities * dp).sum(-1, keepdim=True)) * scale
    dq = torch.einsum("shn,nhd->shd", ds, k).to(q.dtype).contiguous()
    if not wants_kv:
        return dq, kv.new_empty(0)
    dk = torch.einsum("shn,shd->nhd", ds, q.to(k.dtype))
    dv = torch.einsum("shn,shd->nhd", probabilities, do)
    return dq, torch.stack([dk, dv], 1).view(kv.shape).to(kv.dtype)


def _operands(q: Tensor, kv: Tensor, cu_seqlens: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and values as [T, H, D], the probabilities [S, H, T] and their log-sum-exp [S, H]."""
    sequences = q.shape[0]
    rows = kv.to(accumulation_dtype(kv.dtype))
    if cu_seqlens is None:
        segments = torch.arange(sequences, device=q.device).repeat_interleave(kv.shape[1])
        rows = rows.flatten(0, 1)
    else:
        segments = segment_ids(cu_seqlens, kv.shape[0])
        rows = rows.masked_fill((segments == sequences)[:, None, None, None], 0.0)
    k, v = rows.unbind(1)
    theirs = segments == torch.arange(sequences, device=q.device)[:, None]
    scores = torch.einsum("shd,nhd->shn", q.to(k.dtype), k) * scale
    scores = scores.masked_fill(~theirs[:, None], float("-inf"))
    lse = scores.logsumexp(-1)
    return k, v, (scores - lse.masked_fill(lse.isneginf(), 0.0)[..., None]).exp(), lse
