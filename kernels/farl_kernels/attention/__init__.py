"""Masked attention: padded, packed (variable length) and with a single query, for any ViT or text tower."""

from __future__ import annotations

from farl_kernels.attention.module import MaskedAttention
from farl_kernels.attention.op import masked_attention, masked_attention_packed, single_query_attention

__all__ = ["MaskedAttention", "masked_attention", "masked_attention_packed", "single_query_attention"]
