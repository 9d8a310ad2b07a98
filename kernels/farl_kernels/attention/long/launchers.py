"""Attention over any number of keys: q [B, M, H, D], k and v [B, N, H, D], any strides."""

from __future__ import annotations

import torch
from torch import Tensor

from farl_kernels import tables
from farl_kernels.attention.arguments import batch_row_head, block_of, bucket_of, kernel_mask, kernel_rows
from farl_kernels.attention.long.kernels import attention_long_delta_kernel, attention_long_forward_kernel
from farl_kernels.attention.short import launchers as short
from farl_kernels.launch import launch
from farl_kernels.precision import dot_precision

OP = "attention_long"


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, key_mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """out [B, M, H, D] and the base-2 log-sum-exp of the scores [B, H, M], float32; `bias` is [3, H, D] or None."""
    q, k, v = kernel_rows(q), kernel_rows(k), kernel_rows(v)
    batch, m, heads, head_dim = q.shape
    out = torch.empty(batch, m, heads, head_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, m, dtype=torch.float32, device=q.device)
    config = tables.lookup(OP, "forward", bucket_of(q), q.device)
    tiles = -(-m // config["BLOCK_M"])
    launch(
        attention_long_forward_kernel,
        (tiles * heads * batch,),
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
        k.shape[1],
        tiles,
        scale,
        D=head_dim,
        BLOCK_D=block_of(head_dim),
        CAUSAL=causal,
        PRECISION=dot_precision(q.dtype),
        **config,
    )
    return out, lse


def delta_of(out: Tensor, bias: Tensor | None, grad: Tensor) -> Tensor:
    """rowsum(grad * (out - bias of v)) [B, H, M], float32, of two [B, M, H, D]."""
    out, grad = out.contiguous(), kernel_rows(grad)
    batch, m, heads, head_dim = out.shape
    delta = torch.empty(batch, heads, m, dtype=torch.float32, device=out.device)
    config = tables.lookup(OP, "delta", bucket_of(out), out.device)
    tiles = -(-m // config["BLOCK_M"])
    launch(
        attention_long_delta_kernel,
        (tiles * heads * batch,),
        out,
        None if bias is None else bias.contiguous(),
        grad,
        delta,
        *batch_row_head(grad),
        heads,
        m,
        tiles,
        D=head_dim,
        BLOCK_D=block_of(head_dim),
        **config,
    )
    return delta


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
) -> Tensor | None:
    """As in :func:`farl_kernels.attention.short.launchers.backward`."""
    # Each tile of keys reads it for all queries, so that with many tiles it pays to compute it once.
    delta = delta_of(out, bias, grad)
    return short.backward(
        grad, q, k, v, bias, key_mask, out, lse, causal, scale, dq, dk, dv, bias_grad, op=OP, delta=delta
    )
