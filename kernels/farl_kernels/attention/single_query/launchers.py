"""Starts the kernels of single-query attention."""

from __future__ import annotations

import torch
from torch import Tensor

from farl_kernels import tables
from farl_kernels.attention.arguments import block_of, kernel_rows
from farl_kernels.attention.single_query import kernels
from farl_kernels.launch import launch

OP = "attention_single_query"
# Up to this many keys a sequence is read in a few small blocks.
TEXT_LENGTH = 128


def bucket(kv: Tensor, length: int) -> str:
    """Which table entry serves: by dtype, head dim and number of keys."""
    kind = "float" if kv.dtype == torch.float32 else "half"
    return f"{kind}-d{64 if kv.shape[-1] <= 64 else 128}-{'text' if length <= TEXT_LENGTH else 'long'}"


def forward(q: Tensor, kv: Tensor, cu_seqlens: Tensor | None, max_seqlen: int, scale: float) -> tuple[Tensor, Tensor]:
    """See :func:`farl_kernels.attention.single_query.reference.forward`."""
    sequences, heads, dim = q.shape
    out, lse = q.new_empty(q.shape), q.new_empty(sequences, heads, dtype=torch.float32)
    q, kv = kernel_rows(q, 0), kernel_rows(kv, kv.ndim - 4)
    k, v = kv.unbind(-3)
    launch(
        kernels.attention_single_query_forward_kernel,
        (sequences * heads,),
        q,
        k,
        v,
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        out,
        lse,
        q.stride(0),
        q.stride(1),
        kv.stride(0),
        kv.stride(-4),
        kv.stride(-2),
        kv.shape[-4],
        heads,
        scale,
        D=dim,
        BLOCK_D=block_of(dim),
        **tables.lookup(OP, "forward", bucket(kv, max_seqlen), kv.device),
    )
    return out, lse


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
    """See :func:`farl_kernels.attention.single_query.reference.backward`."""
    sequences, heads, dim = q.shape
    dq, dkv = q.new_empty(q.shape), kv.new_empty(kv.shape) if wants_kv else None
    if sequences == 0:
        return dq, kv.new_empty(0) if dkv is None else dkv.zero_()
    q, kv, grad = kernel_rows(q, 0), kernel_rows(kv, kv.ndim - 4), kernel_rows(grad, 0)
    k, v = kv.unbind(-3)
    launch(
        kernels.attention_single_query_backward_kernel,
        (sequences * heads,),
        q,
        k,
        v,
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        out,
        lse,
        grad,
        dq,
        dkv,
        q.stride(0),
        q.stride(1),
        kv.stride(0),
        kv.stride(-4),
        kv.stride(-2),
        grad.stride(0),
        grad.stride(1),
        kv.shape[-4],
        kv.shape[0],
        sequences,
        heads,
        scale,
        D=dim,
        BLOCK_D=block_of(dim),
        **tables.lookup(OP, "backward", bucket(kv, max_seqlen), kv.device),
    )
    return dq, kv.new_empty(0) if dkv is None else dkv
