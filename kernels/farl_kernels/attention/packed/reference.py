"""What the raw ops of packed attention compute, in plain PyTorch over a T x T mask."""

from __future__ import annotations

import torch
from torch import Tensor

from farl_kernels.attention.packing import segment_ids
from farl_kernels.precision import accumulation_dtype


def forward(
    qkv: Tensor, qkv_bias: Tensor | None, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """qkv [T, 3, H, D] -> out [T, H, D], and the natural log-sum-exp of the scores, float32 [H, T], -inf past the end.

    (Of float64, float64.)
    """
    q, k, v, allowed = _operands(qkv, qkv_bias, cu_seqlens, causal)
    probabilities, lse = _probabilities(q, k, allowed, scale)
    return (probabilities @ v).transpose(0, 1).to(qkv.dtype).contiguous(), lse.contiguous()


def backward(
    grad: Tensor,
    qkv: Tensor,
    qkv_bias: Tensor | None,
    cu_seqlens: Tensor,
    out: Tensor,
    lse: Tensor,
    max_seqlen: int,
    causal: bool,
    scale: float,
    bias_grad: bool,
) -> tuple[Tensor, Tensor]:
    """grad [T, H, D] -> that of qkv, and with `bias_grad` that of the bias, float32 [3, H, D] (else empty)."""
    q, k, v, allowed = _operands(qkv, qkv_bias, cu_seqlens, causal)
    probabilities, _ = _probabilities(q, k, allowed, scale)
    live = allowed.any(-1)
    do = grad.to(q.dtype).masked_fill(~live[:, None, None], 0.0).transpose(0, 1)
    dp = do @ v.mT
    ds = probabilities * (dp - (do * (probabilities @ v)).sum(-1, keepdim=True)) * scale
    dqkv = torch.stack([ds @ k, ds.mT @ q, probabilities.mT @ do]).permute(2, 0, 1, 3)
    return dqkv.to(qkv.dtype).contiguous(), dqkv.sum(0) if bias_grad else dqkv.new_empty(0)


def _operands(
    qkv: Tensor, qkv_bias: Tensor | None, cu_seqlens: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k and v, [H, T, D], with what is past the end set to 0, and which keys a token attends, bool [T, T]."""
    segments = segment_ids(cu_seqlens, qkv.shape[0])
    past_end = segments == cu_seqlens.shape[0] - 1
    allowed = (segments[:, None] == segments[None, :]) & ~past_end[:, None]
    rows = qkv.to(accumulation_dtype(qkv.dtype)).masked_fill(past_end[:, None, None, None], 0.0)
    if qkv_bias is not None:
        rows = rows + qkv_bias.to(rows.dtype)
    q, k, v = rows.permute(1, 2, 0, 3).unbind(0)
    return q, k, v, allowed.tril() if causal else allowed


def _probabilities(q: Tensor, k: Tensor, allowed: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    scores = (q @ k.mT * scale).masked_fill(~allowed, float("-inf"))
    lse = scores.logsumexp(-1)
    return (scores - lse.masked_fill(lse.isneginf(), 0.0)[..., None]).exp(), lse
