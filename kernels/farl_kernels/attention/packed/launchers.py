"""Starts the kernels of packed attention."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from farl_kernels import tables
from farl_kernels.attention.arguments import block_of, kernel_rows
from farl_kernels.attention.packed import kernels
from farl_kernels.launch import launch
from farl_kernels.precision import dot_precision

OP = "attention_packed"
# Sequences up to this length share tiles; longer ones fill tiles of their own.
TEXT_LENGTH = 128


def bucket(qkv: Tensor, max_seqlen: int) -> str:
    """Which table entry serves: by dtype, head dim and, in 16 bits, length."""
    kind = "float" if qkv.dtype == torch.float32 else "half"
    length = "" if kind == "float" else "-text" if max_seqlen <= TEXT_LENGTH else "-long"
    return f"{kind}-d{64 if qkv.shape[-1] <= 64 else 128}{length}"


def forward(
    qkv: Tensor, qkv_bias: Tensor | None, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """See :func:`farl_kernels.attention.packed.reference.forward`."""
    tokens, _, heads, dim = qkv.shape
    out = qkv.new_empty(tokens, heads, dim)
    lse = qkv.new_empty(heads, tokens, dtype=torch.float32)
    qkv = kernel_rows(qkv, 0)
    config = tables.lookup(OP, "forward", bucket(qkv, max_seqlen), qkv.device)
    launch(
        kernels.attention_packed_forward_kernel,
        (triton.cdiv(tokens, config["BLOCK_M"]) * heads,),
        *qkv.unbind(1),
        None if qkv_bias is None else qkv_bias.contiguous(),
        cu_seqlens.contiguous(),
        out,
        lse,
        qkv.stride(0),
        qkv.stride(2),
        tokens,
        cu_seqlens.shape[0] - 1,
        heads,
        scale,
        **_constants(qkv, cu_seqlens, causal),
        **config,
    )
    return out, lse


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
    """See :func:`farl_kernels.attention.packed.reference.backward`."""
    tokens, _, heads, dim = qkv.shape
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    qkv, grad = kernel_rows(qkv, 0), kernel_rows(grad, 0)
    config = tables.lookup(OP, "backward", bucket(qkv, max_seqlen), qkv.device)
    tiles = triton.cdiv(tokens, config["BLOCK_M"])
    sums = qkv.new_empty(tiles, 2, heads, dim, dtype=torch.float32) if bias_grad else None
    launch(
        kernels.attention_packed_backward_kernel,
        (tiles * heads * 2,),
        *qkv.unbind(1),
        None if qkv_bias is None else qkv_bias.contiguous(),
        cu_seqlens.contiguous(),
        out,
        lse,
        grad,
        dqkv,
        sums,
        qkv.stride(0),
        qkv.stride(2),
        grad.stride(0),
        grad.stride(1),
        tokens,
        cu_seqlens.shape[0] - 1,
        heads,
        scale,
        **_constants(qkv, cu_seqlens, causal),
        **config,
    )
    if sums is None:
        return dqkv, qkv.new_empty(0, dtype=torch.float32)
    dq_bias, dv_bias = sums.sum(0).unbind(0)
    return dqkv, torch.stack([dq_bias, torch.zeros_like(dq_bias), dv_bias])


def _constants(qkv: Tensor, cu_seqlens: Tensor, causal: bool) -> dict[str, object]:
    # Of the bits of an index into cu_seqlens the upper half is found by comparisons, the lower by bisection. (All of
    # them in float32: there, in the compiler's hands, the comparisons double the registers of the whole kernel.)
    bits = (cu_seqlens.shape[0] - 1).bit_length()
    steps = bits if qkv.dtype == torch.float32 else bits // 2
    return {
        "D": qkv.shape[-1],
        "BLOCK_D": block_of(qkv.shape[-1]),
        "MARKS": 1 << bits - steps,
        "STEPS": steps,
        "CAUSAL": causal,
        "PRECISION": dot_precision(qkv.dtype),
    }
