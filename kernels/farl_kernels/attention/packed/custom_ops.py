"""The packed attention kernels as PyTorch ops, and the autograd function over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from farl_kernels import launch, library
from farl_kernels.attention.arguments import refuses_head_dim
from farl_kernels.attention.packed import reference
from farl_kernels.precision import accumulation_dtype


def _triton_forward(*args: Any) -> tuple[Tensor, Tensor]:
    from farl_kernels.attention.packed import launchers

    return launchers.forward(*args)


def _triton_backward(*args: Any) -> tuple[Tensor, Tensor]:
    from farl_kernels.attention.packed import launchers

    return launchers.backward(*args)


def _fake_forward(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    tokens, _, heads, dim = qkv.shape
    return qkv.new_empty(tokens, heads, dim), qkv.new_empty(heads, tokens, dtype=accumulation_dtype(qkv.dtype))


def _fake_backward(grad: Tensor, qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, bias_grad, _ = rest
    bias_shape = qkv.shape[1:] if bias_grad else (0,)
    return qkv.new_empty(qkv.shape), qkv.new_empty(bias_shape, dtype=accumulation_dtype(qkv.dtype))


FORWARD = library.define(
    "attention_packed_forward(Tensor qkv, Tensor? qkv_bias, Tensor cu_seqlens, SymInt max_seqlen, bool causal, "
    "float scale, str backend) -> (Tensor, Tensor)",
    triton=_triton_forward,
    reference=reference.forward,
    fake=_fake_forward,
)
BACKWARD = library.define(
    "attention_packed_backward(Tensor grad, Tensor qkv, Tensor? qkv_bias, Tensor cu_seqlens, Tensor out, Tensor lse, "
    "SymInt max_seqlen, bool causal, float scale, bool bias_grad, str backend) -> (Tensor, Tensor)",
    triton=_triton_backward,
    reference=reference.backward,
    fake=_fake_backward,
)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        qkv_bias: Tensor | None,
        cu_seqlens: Tensor,
        max_seqlen: int,
        causal: bool,
        scale: float,
        backend: str,
    ) -> Tensor:
        out, lse = FORWARD(qkv, qkv_bias, cu_seqlens, max_seqlen, causal, scale, backend)
        ctx.save_for_backward(qkv, qkv_bias, cu_seqlens, out, lse)
        ctx.options = max_seqlen, causal, scale, backend
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        library.refuse_double_backward("masked_attention_packed")
        qkv, qkv_bias, cu_seqlens, out, lse = ctx.saved_tensors
        max_seqlen, causal, scale, backend = ctx.options
        wants_qkv, wants_bias = ctx.needs_input_grad[:2]
        dqkv, dbias = BACKWARD(
            grads[0], qkv, qkv_bias, cu_seqlens, out, lse, max_seqlen, causal, scale, wants_bias, backend
        )
        return dqkv if wants_qkv else None, dbias.to(qkv.dtype) if wants_bias else None, None, None, None, None, None


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
    """The "triton" backend of masked_attention_packed where `cu_seqlens` is given: [T, 3, H, D] -> [T, H, D]."""
    assert cu_seqlens is not None and max_seqlen is not None
    return _PackedAttention.apply(qkv, qkv_bias, cu_seqlens, max_seqlen, causal, scale, "triton")


def refuses(qkv: Tensor, *, cu_seqlens: Tensor | None, **kwargs: Any) -> str | None:
    """Why these kernels cannot serve, or None."""
    if cu_seqlens is None:
        return "these kernels want cu_seqlens"
    return refuses_head_dim(qkv.shape[-1]) or launch.refuses(qkv)


def declines(qkv: Tensor, **kwargs: Any) -> str | None:
    """Why these kernels are not taken unasked, or None."""
    if qkv.dtype == torch.float32:
        return "in float32 PyTorch's kernels are preferred until these have been measured against them"
    return launch.declines(qkv)
