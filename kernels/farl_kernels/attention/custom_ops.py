"""Attention over keys of one number as PyTorch ops, and the autograd functions over them.

Everything is [B, N, H, D] here: views of one packed projection and separate tensors are the same to the kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from farl_kernels import launch, library
from farl_kernels.attention import reference
from farl_kernels.attention.arguments import refuses_head_dim
from farl_kernels.attention.packed import custom_ops as packed

# Up to this many, the keys and values of a head are held on chip.
SHORT = 256


def _launchers(q: Tensor, keys: int) -> Any:
    # In float32 the keys of a head are too much for the registers.
    if keys <= SHORT and q.dtype != torch.float32:
        from farl_kernels.attention.short import launchers
    else:
        from farl_kernels.attention.long import launchers
    return launchers


def _triton_forward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    return _launchers(q, k.shape[1]).forward(q, k, v, None, key_mask, causal, scale)


def _triton_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    need_q: bool,
    need_kv: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _fake_backward(grad, q, k, v, key_mask, out, lse, causal, scale, need_q, need_kv, "")
    wanted = dq if need_q else None, dk if need_kv else None, dv if need_kv else None
    run = _launchers(q, k.shape[1]).backward
    run(grad, q, k, v, None, key_mask, out, lse, causal, scale, *wanted, False)
    return dq, dk, dv


def _reference_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    need_q: bool,
    need_kv: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = reference.attention_backward(grad, q, k, v, key_mask, out, lse, causal, scale)
    return dq if need_q else q.new_empty(0), dk if need_kv else k.new_empty(0), dv if need_kv else v.new_empty(0)


def _triton_qkv_forward(
    qkv: Tensor, bias: Tensor | None, key_mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    return _launchers(qkv, qkv.shape[1]).forward(*qkv.unbind(2), bias, key_mask, causal, scale)


def _triton_qkv_backward(
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
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    run = _launchers(qkv, qkv.shape[1]).backward
    dbias = run(grad, *qkv.unbind(2), bias, key_mask, out, lse, causal, scale, *dqkv.unbind(2), bias_grad)
    return dqkv, lse.new_empty(0) if dbias is None else dbias


def _fake_forward(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, m, heads, _ = q.shape
    # Float64 is for the reference alone.
    statistics = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(batch, heads, m, dtype=statistics)


def _fake_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    need_q: bool,
    need_kv: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    needs = ((q, need_q), (k, need_kv), (v, need_kv))
    dq, dk, dv = (torch.empty(x.shape if need else (0,), dtype=x.dtype, device=x.device) for x, need in needs)
    return dq, dk, dv


def _fake_qkv_forward(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _fake_forward(qkv[:, :, 0])


def _fake_qkv_backward(grad: Tensor, qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    lse, bias_grad = rest[3], rest[6]
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device), lse.new_empty(
        qkv.shape[2:] if bias_grad else (0,)
    )


FORWARD = library.define(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? key_mask, bool causal, float scale, str backend)"
    " -> (Tensor, Tensor)",
    triton=_triton_forward,
    reference=reference.attention_forward,
    fake=_fake_forward,
)
BACKWARD = library.define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor out, Tensor lse, "
    "bool causal, float scale, bool need_q, bool need_kv, str backend) -> (Tensor, Tensor, Tensor)",
    triton=_triton_backward,
    reference=_reference_backward,
    fake=_fake_backward,
)
QKV_FORWARD = library.define(
    "attention_qkv_forward(Tensor qkv, Tensor? bias, Tensor? key_mask, bool causal, float scale, str backend)"
    " -> (Tensor, Tensor)",
    triton=_triton_qkv_forward,
    reference=reference.attention_qkv_forward,
    fake=_fake_qkv_forward,
)
QKV_BACKWARD = library.define(
    "attention_qkv_backward(Tensor grad, Tensor qkv, Tensor? bias, Tensor? key_mask, Tensor out, Tensor lse, "
    "bool causal, float scale, bool bias_grad, str backend) -> (Tensor, Tensor)",
    triton=_triton_qkv_backward,
    reference=reference.attention_qkv_backward,
    fake=_fake_qkv_backward,
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        causal: bool,
        scale: float,
        backend: str,
    ) -> Tensor:
        out, lse = FORWARD(q, k, v, key_mask, causal, scale, backend)
        ctx.save_for_backward(q, k, v, key_mask, out, lse)
        ctx.options = causal, scale, backend
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        library.refuse_double_backward("masked_attention")
        q, k, v, key_mask, out, lse = ctx.saved_tensors
        causal, scale, backend = ctx.options
        need_q, need_k, need_v = ctx.needs_input_grad[:3]
        dq, dk, dv = BACKWARD(grads[0], q, k, v, key_mask, out, lse, causal, scale, need_q, need_k or need_v, backend)
        return dq if need_q else None, dk if need_k else None, dv if need_v else None, None, None, None, None


class _QkvAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        bias: Tensor | None,
        key_mask: Tensor | None,
        causal: bool,
        scale: float,
        backend: str,
    ) -> Tensor:
        out, lse = QKV_FORWARD(qkv, bias, key_mask, causal, scale, backend)
        ctx.save_for_backward(qkv, bias, key_mask, out, lse)
        ctx.options = causal, scale, backend
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        library.refuse_double_backward("masked_attention_packed")
        qkv, bias, key_mask, out, lse = ctx.saved_tensors
        causal, scale, backend = ctx.options
        need_qkv, need_bias = ctx.needs_input_grad[:2]
        dqkv, dbias = QKV_BACKWARD(grads[0], qkv, bias, key_mask, out, lse, causal, scale, need_bias, backend)
        return dqkv if need_qkv else None, dbias.to(bias.dtype) if need_bias else None, None, None, None, None


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, key_mask: Tensor | None, scale: float) -> Tensor:
    """The "triton" backend of masked_attention: q [B, H, M, D], k and v [B, H, N, D] -> [B, H, M, D].

    The result is a view of [B, M, H, D], so that putting the heads side by side again copies nothing.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return _Attention.apply(q, k, v, key_mask, causal, scale, "triton").transpose(1, 2)


def refuses(q: Tensor, *args: Any, **kwargs: Any) -> str | None:
    """Why the kernels cannot serve, or None."""
    return refuses_head_dim(q.shape[-1]) or launch.refuses(q)


def declines(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> str | None:
    """Why the kernels are not taken unasked, or None."""
    return launch.declines(q) or _declines(q, k.shape[2])


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
    """The "triton" backend of masked_attention_packed: [B, N, 3, H, D] -> [B, N, H, D], or packed with `cu_seqlens`."""
    if cu_seqlens is None:
        return _QkvAttention.apply(qkv, qkv_bias, key_mask, causal, scale, "triton")
    return packed.attention_packed(
        qkv,
        qkv_bias=qkv_bias,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        causal=causal,
        key_mask=key_mask,
        scale=scale,
    )


def refuses_packed(qkv: Tensor, *, cu_seqlens: Tensor | None, **kwargs: Any) -> str | None:
    """As :func:`refuses`."""
    return refuses(qkv) if cu_seqlens is None else packed.refuses(qkv, cu_seqlens=cu_seqlens, **kwargs)


def declines_packed(qkv: Tensor, *, cu_seqlens: Tensor | None, **kwargs: Any) -> str | None:
    """As :func:`declines`."""
    if cu_seqlens is not None:
        return packed.declines(qkv, cu_seqlens=cu_seqlens, **kwargs)
    return launch.declines(qkv) or _declines(qkv, qkv.shape[1])


def _declines(x: Tensor, keys: int) -> str | None:
    if keys > SHORT:
        return f"over {SHORT} keys PyTorch's kernels are preferred until these have been measured against them"
    if x.dtype == torch.float32:
        return "in float32 PyTorch's kernels are preferred until these have been measured against them"
    return None
