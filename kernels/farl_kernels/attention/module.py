"""Multi-head self-attention with the parameters of torch.nn.MultiheadAttention: CLIP's weights load as they are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from farl_kernels.attention.op import masked_attention_packed


class MaskedAttention(nn.Module):
    """Self-attention on [B, N, C], or on packed tokens [T, C] with `cu_seqlens`.

    Parameters `in_proj_weight` [3C, C], `in_proj_bias` [3C], `out_proj.weight` [C, C], `out_proj.bias` [C], initialised
    as in torch.nn.MultiheadAttention.

    Args:
        dim: C, a multiple of `num_heads`.
        num_heads: H.
        bias: whether both projections have a bias.
        backend: as for :func:`farl_kernels.masked_attention`.

    Raises:
        ValueError: `dim` is no multiple of `num_heads`, or what :func:`farl_kernels.masked_attention_packed` refuses.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        bias: bool = True,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"MaskedAttention: dim {dim} is no multiple of num_heads {num_heads}")
        self.dim, self.num_heads, self.backend = dim, num_heads, backend
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim, device=device, dtype=dtype))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * dim, device=device, dtype=dtype)) if bias else None
        self.out_proj = nn.Linear(dim, dim, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.in_proj_weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        x: Tensor,
        key_mask: Tensor | None = None,
        *,
        causal: bool = False,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """x [B, N, C], or [T, C] with `cu_seqlens`; the rest as in :func:`masked_attention_packed`. Same shape out."""
        if x.ndim != (3 if cu_seqlens is None else 2) or x.shape[-1] != self.dim:
            form = f"[B, N, {self.dim}]" if cu_seqlens is None else f"[T, {self.dim}] (cu_seqlens is given)"
            raise ValueError(f"MaskedAttention: x has shape {tuple(x.shape)}, want {form}")
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        out = masked_attention_packed(
            qkv.unflatten(-1, (3, self.num_heads, self.dim // self.num_heads)),
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            causal=causal,
            key_mask=key_mask,
            backend=self.backend,
        )
        return self.out_proj(out.flatten(-2))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}"
