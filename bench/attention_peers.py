"""Other people's attention, each in the layout that suits it best and with its set-up outside the timed part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.contest import Contender, Tensors, compiled, need, need_gpu

# OpenAI CLIP's and open_clip's context: what captions are padded to there.
CONTEXT = 77


@dataclass(frozen=True)
class Packing:
    """Captions end to end: int32 `cu_seqlens` [S + 1] on the device, and the same numbers on the host."""

    cu_seqlens: Tensor
    ends: tuple[int, ...]

    @property
    def lengths(self) -> list[int]:
        return [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)]

    @property
    def total(self) -> int:
        return self.ends[-1]

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Of every packed token its sequence and its place in it."""
        lengths = torch.tensor(self.lengths, device=self.cu_seqlens.device)
        sequence = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        return sequence, torch.arange(self.total, device=lengths.device) - self.cu_seqlens[:-1].long()[sequence]


def apart(solve: Callable[[Tensor, Tensor, Tensor], Tensor], **settings: Any) -> Contender:
    """A contender on q, k and v apart, so that no peer pays for putting dqkv together."""
    return Contender(
        solve,
        leaves=lambda inputs: tuple(x.contiguous() for x in inputs[0].unbind(-3)),
        gradients=lambda grads: (torch.stack(grads, -3),),
        **settings,
    )


def heads_first(x: Tensor) -> Tensor:
    """[B, N, H, D] -> [B, H, N, D], a view; the layout that PyTorch's kernels read without a copy."""
    return x.transpose(1, 2)


def sdpa(backend: SDPBackend) -> Contender:
    """scaled_dot_product_attention by one of its kernels; q, k, v [B, N, H, D]."""

    if backend is not SDPBackend.FLASH_ATTENTION:
        need_gpu()

    def solve(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(heads_first(q), heads_first(k), heads_first(v)).transpose(1, 2)

    return apart(solve)


def flex() -> Contender:
    """FlexAttention without a mask."""
    from torch.nn.attention.flex_attention import flex_attention

    attend = compiled(flex_attention)
    return apart(lambda q, k, v: attend(*map(heads_first, (q, k, v))).transpose(1, 2))


def xformers() -> Contender:
    """xformers' memory_efficient_attention, its own choice of kernel."""
    ops = need("xformers.ops")
    need_gpu()
    return apart(lambda q, k, v: ops.memory_efficient_attention(q, k, v))


def flash_attn() -> Contender:
    """The flash-attn package, on packed qkv as it likes it."""
    package = need("flash_attn")
    need_gpu()
    return Contender(lambda qkv: package.flash_attn_qkvpacked_func(qkv))


def varlen(batch: int, tokens: int) -> Contender:
    """torch.nn.attention.varlen on sequences of one length."""
    need_gpu()
    varlen_attn = need("torch.nn.attention.varlen").varlen_attn
    ends = torch.arange(0, (batch + 1) * tokens, tokens, device="cuda", dtype=torch.int32)

    def solve(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = (x.flatten(0, 1) for x in (q, k, v))
        return varlen_attn(*flat, ends, ends, tokens, tokens).unflatten(0, (batch, tokens))

    return apart(solve)


def packed_varlen(packing: Packing) -> Contender:
    """torch.nn.attention.varlen on packed captions; q, k, v [T, H, D]."""
    need_gpu()
    varlen_attn = need("torch.nn.attention.varlen").varlen_attn
    ends, longest = packing.cu_seqlens, packing.longest
    return apart(lambda q, k, v: varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(-1, 0)))


def packed_flash_attn(packing: Packing) -> Contender:
    """The flash-attn package on packed captions."""
    attend = need("flash_attn").flash_attn_varlen_qkvpacked_func
    need_gpu()
    return Contender(lambda qkv: attend(qkv, packing.cu_seqlens, packing.longest, causal=True))


def packed_xformers(packing: Packing) -> Contender:
    """xformers with its block-diagonal causal mask."""
    ops = need("xformers.ops")
    need_gpu()
    mask = need("xformers.ops.fmha.attn_bias").BlockDiagonalCausalMask.from_seqlens(packing.lengths)
    return apart(lambda q, k, v: ops.memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask)[0])


def packed_flex(packing: Packing) -> Contender:
    """FlexAttention with a document mask, made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attend = compiled(flex_attention)
    document = packing.rows()[0]

    def allowed(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (document[query] == document[key]) & (query >= key)

    mask = create_block_mask(allowed, None, None, packing.total, packing.total, device=document.device)

    def solve(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(*(x.transpose(0, 1)[None] for x in (q, k, v)), block_mask=mask)
        return out[0].transpose(0, 1)

    return apart(solve)


def padded_sdpa(packing: Packing, length: int) -> Contender:
    """Captions padded to `length`, as CLIP's text towers do it; causal, so that padding needs no mask."""
    sequence, place = packing.rows()
    count = len(packing.lengths)

    def pad(x: Tensor) -> Tensor:
        padded = x.new_zeros(count, length, *x.shape[1:])
        padded[sequence, place] = x
        return padded

    def solve(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(heads_first(q), heads_first(k), heads_first(v), is_causal=True)
        return out.transpose(1, 2)

    return Contender(
        solve,
        leaves=lambda inputs: tuple(pad(x) for x in inputs[0].unbind(-3)),
        outputs=lambda outputs: tuple(x[sequence, place] for x in outputs),
        cotangents=lambda given: tuple(pad(x) for x in given),
        gradients=lambda grads: (torch.stack([x[sequence, place] for x in grads], -3),),
    )


def query_sdpa(backend: SDPBackend | None) -> Contender:
    """One query a sequence: q [S, H, D], k and v [S, N, H, D] apart."""
    if backend is SDPBackend.EFFICIENT_ATTENTION:
        need_gpu()

    def leaves(inputs: Tensors) -> Tensors:
        return (inputs[0][:, :, None].contiguous(), *(x.contiguous() for x in inputs[1].unbind(2)))

    def solve(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(q, heads_first(k), heads_first(v))[:, :, 0]
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(q, heads_first(k), heads_first(v))[:, :, 0]

    def gradients(grads: Tensors) -> Tensors:
        return grads[0][:, :, 0], torch.stack(grads[1:], 2)

    return Contender(solve, leaves=leaves, gradients=gradients)
