"""The public attention functions: arguments are checked here, then the op goes to a backend."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from farl_kernels.attention import custom_ops, reference, sdpa, segments, xformers_backend
from farl_kernels.attention.padded import packed_by, single_query_by
from farl_kernels.attention.single_query import custom_ops as single_query
from farl_kernels.checks import check_device, describe
from farl_kernels.dispatch import Op
from farl_kernels.precision import autocast_dtype, without_autocast

# Backends in order of preference: the first that neither refuses nor declines a call serves it.
MASKED_ATTENTION = Op("masked_attention")
MASKED_ATTENTION.register("triton", custom_ops.attention, custom_ops.refuses, custom_ops.declines)
MASKED_ATTENTION.register("sdpa", sdpa.attention)
MASKED_ATTENTION.register("reference", reference.attention)
MASKED_ATTENTION.register("xformers", xformers_backend.attention, xformers_backend.refuses)

MASKED_ATTENTION_PACKED = Op("masked_attention_packed")
MASKED_ATTENTION_PACKED.register(
    "triton", custom_ops.attention_packed, custom_ops.refuses_packed, custom_ops.declines_packed
)
MASKED_ATTENTION_PACKED.register("sdpa", packed_by(sdpa.attention))
MASKED_ATTENTION_PACKED.register("reference", reference.attention_packed)
MASKED_ATTENTION_PACKED.register("xformers", packed_by(xformers_backend.attention), xformers_backend.refuses)

SINGLE_QUERY_ATTENTION = Op("single_query_attention")
SINGLE_QUERY_ATTENTION.register(
    "triton", single_query.attention_single_query, single_query.refuses, single_query.declines
)
SINGLE_QUERY_ATTENTION.register("segments", segments.attention_single_query, segments.refuses)
SINGLE_QUERY_ATTENTION.register("sdpa", single_query_by(sdpa.attention))
SINGLE_QUERY_ATTENTION.register("reference", reference.attention_single_query)
SINGLE_QUERY_ATTENTION.register("xformers", single_query_by(xformers_backend.attention), xformers_backend.refuses)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(q k^T * scale) v over the keys that may be attended.

    Args:
        q: [B, H, M, D], bf16, fp16, fp32 or fp64, any strides.
        k, v: [B, H, N, D], dtype and device of q. M != N only without `causal`.
        causal: query i attends keys 0..i.
        key_mask: bool [B, N], True = may be attended. A query without any key gives 0 and passes no gradient.
        scale: multiplies the scores; None = D ** -0.5.
        backend: None (the fastest that fits), "triton" (head dims 16 to 128 that are multiples of 8; CUDA),
            "sdpa", "reference" or "xformers".

    Returns:
        [B, H, M, D] in the dtype of q (under autocast: in the autocast dtype, as for F.scaled_dot_product_attention).

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, or a backend that cannot serve the call.
    """
    op = "masked_attention"
    _check_float(op, "q", q, 4, "[B, H, M, D]")
    for name, x in (("k", k), ("v", v)):
        _check_like(op, name, x, "q", q, (q.shape[0], q.shape[1], k.shape[2] if k.ndim == 4 else "N", q.shape[3]))
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError(f"{op}: causal wants as many keys as queries, got M = {q.shape[2]} and N = {k.shape[2]}")
    _check_key_mask(op, key_mask, (k.shape[0], k.shape[2]), q.device)
    q, k, v = _autocast(q), _autocast(k), _autocast(v)
    for name, x in (("k", k), ("v", v)):
        _check_dtype(op, name, x, "q", q)
    with without_autocast(q.device):
        return MASKED_ATTENTION(backend, q, k, v, causal=causal, key_mask=key_mask, scale=_scale(scale, q))


def masked_attention_packed(
    qkv: Tensor,
    *,
    qkv_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    causal: bool = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Self-attention on the output of one qkv projection, for sequences of one length or packed end to end.

    Args:
        qkv: [B, N, 3, H, D], or [T, 3, H, D] with `cu_seqlens`; bf16, fp16, fp32 or fp64.
        qkv_bias: [3, H, D], cast to the dtype of qkv, added to every token and differentiated inside; None if the
            projection added it.
        cu_seqlens: int32 [S + 1] on the device of qkv, cumulative lengths from 0; T may exceed cu_seqlens[-1]:
            tokens past it are never read, their output and gradient are 0.
        max_seqlen: upper bound of the lengths, wanted with `cu_seqlens`. The host never reads a CUDA `cu_seqlens`,
            so a bound that is too small is an error on CPU and a wrong result elsewhere.
        causal: a token attends itself and those before it in its sequence.
        key_mask: bool [B, N], True = may be attended; not with `cu_seqlens`.
        scale: multiplies the scores; None = D ** -0.5.
        backend: as for :func:`masked_attention`.

    Returns:
        [B, N, H, D], or [T, H, D].

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, or a backend that cannot serve the call.
    """
    op = "masked_attention_packed"
    if cu_seqlens is None:
        _check_float(op, "qkv", qkv, 5, "[B, N, 3, H, D]")
        _check_key_mask(op, key_mask, (qkv.shape[0], qkv.shape[1]), qkv.device)
        if max_seqlen is not None:
            raise ValueError(f"{op}: max_seqlen is given without cu_seqlens; give both or neither")
    else:
        _check_float(op, "qkv", qkv, 4, "[T, 3, H, D]")
        max_seqlen = _check_cu_seqlens(op, cu_seqlens, max_seqlen, qkv.shape[0], qkv.device)
        if key_mask is not None:
            raise ValueError(f"{op}: key_mask does not go with cu_seqlens; leave masked tokens out of the packing")
    if qkv.shape[-3] != 3:
        raise ValueError(f"{op}: qkv has shape {tuple(qkv.shape)}, want 3 (q, k, v) in the dimension before the heads")
    bias_shape = tuple(qkv.shape[-3:])
    if qkv_bias is not None and (tuple(qkv_bias.shape) != bias_shape or qkv_bias.device != qkv.device):
        raise ValueError(
            f"{op}: qkv_bias is {tuple(qkv_bias.shape)} on {qkv_bias.device}, want {bias_shape} on {qkv.device}"
        )
    qkv = _autocast(qkv)
    with without_autocast(qkv.device):
        return MASKED_ATTENTION_PACKED(
            backend,
            qkv,
            qkv_bias=None if qkv_bias is None else qkv_bias.to(qkv.dtype),
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            causal=causal,
            key_mask=key_mask,
            scale=_scale(scale, qkv),
        )


def single_query_attention(
    q: Tensor,
    kv: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of one query a sequence (a class or end-of-text token) over all keys of that sequence.

    Args:
        q: [S, H, D], bf16, fp16, fp32 or fp64.
        kv: [S, N, 2, H, D], or [T, 2, H, D] with `cu_seqlens` and `max_seqlen` as in
            :func:`masked_attention_packed`; dtype and device of q. A sequence without tokens gives 0.
        scale: multiplies the scores; None = D ** -0.5.
        backend: as for :func:`masked_attention`; also "segments", sums over packed tokens, the fastest on CPU.

    Returns:
        [S, H, D].

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, or a backend that cannot serve the call.
    """
    op = "single_query_attention"
    _check_float(op, "q", q, 3, "[S, H, D]")
    if cu_seqlens is None:
        if max_seqlen is not None:
            raise ValueError(f"{op}: max_seqlen is given without cu_seqlens; give both or neither")
        n = kv.shape[1] if kv.ndim == 5 else "N"
        _check_like(op, "kv", kv, "q", q, (q.shape[0], n, 2, q.shape[1], q.shape[2]))
    else:
        total = kv.shape[0] if kv.ndim == 4 else "T"
        _check_like(op, "kv", kv, "q", q, (total, 2, q.shape[1], q.shape[2]))
        max_seqlen = _check_cu_seqlens(op, cu_seqlens, max_seqlen, kv.shape[0], q.device)
        if cu_seqlens.shape[0] != q.shape[0] + 1:
            raise ValueError(f"{op}: cu_seqlens has {cu_seqlens.shape[0]} entries, want S + 1 = {q.shape[0] + 1}")
    q, kv = _autocast(q), _autocast(kv)
    _check_dtype(op, "kv", kv, "q", q)
    with without_autocast(q.device):
        return SINGLE_QUERY_ATTENTION(
            backend, q, kv, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, scale=_scale(scale, q)
        )


def _scale(scale: float | None, q: Tensor) -> float:
    return q.shape[-1] ** -0.5 if scale is None else float(scale)


def _autocast(x: Tensor) -> Tensor:
    """`x` in the autocast dtype, if one is active. As for F.scaled_dot_product_attention, float64 stays what it is."""
    dtype = autocast_dtype(x.device)
    return x if dtype is None or x.dtype == torch.float64 else x.to(dtype)


def _check_float(op: str, name: str, x: Tensor, ndim: int, form: str) -> None:
    if x.ndim != ndim:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, want {form}")
    if not x.is_floating_point() or x.shape[-1] == 0:
        raise ValueError(f"{op}: {name} is {describe(x)}, want floating point with a head dim >= 1")


def _check_like(op: str, name: str, x: Tensor, like_name: str, like: Tensor, shape: tuple[int | str, ...]) -> None:
    if x.ndim != len(shape) or any(want != got for want, got in zip(shape, x.shape, strict=True)):
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, want [{', '.join(map(str, shape))}]")
    check_device(op, name, x, like_name, like)


def _check_dtype(op: str, name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """After autocast, which may have made one dtype of several."""
    if x.dtype != like.dtype:
        raise ValueError(f"{op}: {name} is {x.dtype}, want {like.dtype}, the dtype of {like_name}")


def _check_key_mask(op: str, key_mask: Tensor | None, shape: tuple[int, int], device: torch.device) -> None:
    if key_mask is None:
        return
    if key_mask.dtype != torch.bool or tuple(key_mask.shape) != shape or key_mask.device != device:
        raise ValueError(
            f"{op}: key_mask is {describe(key_mask)} on {key_mask.device}, "
            f"want torch.bool {shape} on {device} (True = may be attended)"
        )


def _check_cu_seqlens(op: str, cu_seqlens: Tensor, max_seqlen: int | None, total: int, device: torch.device) -> int:
    """The bound of the lengths to work with: on CPU the true maximum, elsewhere `max_seqlen` as given."""
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"{op}: cu_seqlens is {describe(cu_seqlens)}, want torch.int32 [S + 1]")
    if cu_seqlens.device != device:
        raise ValueError(f"{op}: cu_seqlens is on {cu_seqlens.device}, want {device}")
    if not isinstance(max_seqlen, int | torch.SymInt) or max_seqlen < 1:
        raise ValueError(f"{op}: max_seqlen is {max_seqlen!r}, want an int >= 1 that no sequence exceeds")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return max_seqlen
    # On the CPU the values can be read without waiting for anything.
    ends = cu_seqlens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(ends)]
    if ends[0] != 0 or ends[-1] > total or min(lengths, default=0) < 0:
        raise ValueError(
            f"{op}: cu_seqlens runs from {ends[0]} to {ends[-1]}, want ascending from 0 to T = {total} at most"
        )
    longest = max(lengths, default=0)
    if longest > max_seqlen:
        raise ValueError(f"{op}: max_seqlen is {max_seqlen}, but a sequence has {longest} tokens")
    return max(longest, 1)
