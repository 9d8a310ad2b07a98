"""The packed and the single-query op, built from any backend that serves padded q, k and v."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from farl_kernels.attention.packing import PaddedLayout

# (q [B, H, M, D], k [B, H, N, D], v, *, causal, key_mask, scale) -> [B, H, M, D]
Attention = Callable[..., Tensor]


def packed_by(attention: Attention) -> Callable[..., Tensor]:
    """A backend of masked_attention_packed that pads, runs `attention` and takes the padding out again."""

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
        if qkv_bias is not None:
            qkv = qkv + qkv_bias
        if cu_seqlens is None:
            return _unbound(attention, qkv, causal=causal, key_mask=key_mask, scale=scale)
        assert max_seqlen is not None
        if 0 in qkv.shape or cu_seqlens.shape[0] == 1:
            return qkv[:, 0].masked_fill(qkv.new_ones((), dtype=torch.bool), 0.0)
        layout = PaddedLayout.build(cu_seqlens, qkv.shape[0], max_seqlen)
        # Padding stands to the right, where a causal query never looks.
        key_mask = None if causal else layout.key_mask
        return layout.unpad(_unbound(attention, layout.pad(qkv), causal=causal, key_mask=key_mask, scale=scale))

    return attention_packed


def single_query_by(attention: Attention) -> Callable[..., Tensor]:
    """A backend of single_query_attention on top of `attention`."""

    def attention_single_query(
        q: Tensor, kv: Tensor, *, cu_seqlens: Tensor | None, max_seqlen: int | None, scale: float
    ) -> Tensor:
        key_mask = None
        if cu_seqlens is not None:
            assert max_seqlen is not None
            if 0 in kv.shape or 0 in q.shape:
                return q.masked_fill(q.new_ones((), dtype=torch.bool), 0.0)
            layout = PaddedLayout.build(cu_seqlens, kv.shape[0], max_seqlen)
            kv, key_mask = layout.pad(kv), layout.key_mask
        k, v = (part.transpose(1, 2) for part in kv.unbind(2))
        return attention(q[:, :, None], k, v, causal=False, key_mask=key_mask, scale=scale)[:, :, 0]

    return attention_single_query


def _unbound(attention: Attention, qkv: Tensor, *, causal: bool, key_mask: Tensor | None, scale: float) -> Tensor:
    # unbind, not indexing: its backward is one stack, where three selects would each fill a whole zero tensor.
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    return attention(q, k, v, causal=causal, key_mask=key_mask, scale=scale).transpose(1, 2)
