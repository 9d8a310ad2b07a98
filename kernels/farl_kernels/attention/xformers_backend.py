"""Attention by xformers, for those who have it. Never imported unless asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from farl_kernels.attention.reference import allowed_keys


@functools.cache
def load() -> tuple[Any, str | None]:
    """xformers.ops and None, or None and why xformers cannot be used here: found out by a trial call."""
    try:
        import xformers.ops as ops  # pyrefly: ignore[missing-import]

        device = "cuda" if torch.cuda.is_available() else "cpu"
        trial = torch.zeros(1, 8, 1, 32, device=device, dtype=torch.float16 if device == "cuda" else torch.float32)
        ops.memory_efficient_attention(trial, trial, trial)
    except Exception as error:  # a build for another torch or GPU fails in many ways, all of which mean "not here"
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        return None, f"xformers does not run here ({cause}); install a build of it that fits torch {torch.__version__}"
    return ops, None


def refuses(*args: Any, **kwargs: Any) -> str | None:
    """Why xformers cannot serve, or None."""
    return load()[1]


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, key_mask: Tensor | None, scale: float) -> Tensor:
    """q [B, H, M, D], k and v [B, H, N, D] -> [B, H, M, D]."""
    ops, _ = load()
    heads_last = [x.transpose(1, 2) for x in (q, k, v)]
    run: Callable[..., Tensor] = functools.partial(ops.memory_efficient_attention, *heads_last, scale=scale)
    if key_mask is None:
        return run(attn_bias=ops.LowerTriangularMask() if causal else None).transpose(1, 2)
    m, n = q.shape[2], k.shape[2]
    allowed = allowed_keys(m, n, causal=causal, key_mask=key_mask, device=q.device)
    assert allowed is not None
    dead = ~allowed.any(-1, keepdim=True)
    # xformers wants an additive mask whose rows start at multiples of 8 elements.
    bias = q.new_zeros(q.shape[0], 1, m, -(-n // 8) * 8)[..., :n].masked_fill_(~(allowed | dead), float("-inf"))
    return run(attn_bias=bias.expand(-1, q.shape[1], -1, -1)).transpose(1, 2).masked_fill(dead, 0.0)
