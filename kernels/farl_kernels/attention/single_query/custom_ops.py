"""The single-query attention kernels as PyTorch ops, and the autograd function over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from farl_kernels import launch, library
from farl_kernels.attention.arguments import refuses_head_dim
from farl_kernels.attention.single_query import reference
from farl_kernels.precision import accumulation_dtype


def _triton_forward(*args: Any) -> tuple[Tensor, Tensor]:
    from farl_kernels.attention.single_query import launchers

    return launchers.forward(*args)


def _triton_backward(*args: Any) -> tuple[Tensor, Tensor]:
    from farl_kernels.attention.single_query import launchers

    return launchers.backward(*args)


def _fake_forward(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=accumulation_dtype(q.dtype))


def _fake_backward(grad: Tensor, q: Tensor, kv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, wants_kv, _ = rest
    return q.new_empty(q.shape), kv.new_empty(kv.shape if wants_kv else (0,))


FORWARD = library.define(
    "attention_single_query_forward(Tensor q, Tensor kv, Tensor? cu_seqlens, SymInt max_seqlen, float scale, "
    "str backend) -> (Tensor, Tensor)",
    triton=_triton_forward,
    reference=reference.forward,
    fake=_fake_forward,
)
BACKWARD = library.define(
    "attention_single_query_backward(Tensor grad, Tensor q, Tensor kv, Tensor? cu_seqlens, Tensor out, Tensor lse, "
    "SymInt max_seqlen, float scale, bool wants_kv, str backend) -> (Tensor, Tensor)",
    triton=_triton_backward,
    reference=reference.backward,
    fake=_fake_backward,
)


class _SingleQueryAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, cu_seqlens: Tensor | None, max_seqlen: int, scale: float, backend: str
    ) -> Tensor:
        out, lse = FORWARD(q, kv, cu_seqlens, max_seqlen, scale, backend)
        ctx.save_for_backward(q, kv, cu_seqlens, out, lse)
        ctx.options = max_seqlen, scale, backend
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        library.refuse_double_backward("single_query_attention")
        q, kv, cu_seqlens, out, lse = ctx.saved_tensors
        max_seqlen, scale, backend = ctx.options
        wants_q, wants_kv = ctx.needs_input_grad[:2]
        dq, dkv = BACKWARD(grads[0], q, kv, cu_seqlens, out, lse, max_seqlen, scale, wants_kv, backend)
        return dq if wants_q else None, dkv if wants_kv else None, None, None, None, None


def attention_single_query(
    q: Tensor, kv: Tensor, *, cu_seqlens: Tensor | None, max_seqlen: int | None, scale: float
) -> Tensor:
    """The "triton" backend: q [S, H, D], kv [S, N, 2, H, D], or [T, 2, H, D] with `cu_seqlens` -> [S, H, D]."""
    length = kv.shape[1] if max_seqlen is None else max_seqlen
    return _SingleQueryAttention.apply(q, kv, cu_seqlens, length, scale, "triton")


def refuses(q: Tensor, kv: Tensor, **kwargs: Any) -> str | None:
    """Why these kernels cannot serve, or None."""
    return refuses_head_dim(q.shape[-1]) or launch.refuses(q)


def declines(q: Tensor, kv: Tensor, **kwargs: Any) -> str | None:
    """Why these kernels are not taken unasked, or None."""
    return launch.declines(q)
