"""The table entries of long attention in use: images of 448 pixels in patches of 16, 785 tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from farl_kernels.cases import Case
from farl_kernels.tables import Config

BATCH, TOKENS = 64, 785
HEADS = {64: 12, 128: 8}


def cases() -> list[Case]:
    return [
        Case(
            "attention_long",
            kernel,
            f"{kind}-d{dim}",
            functools.partial(_prepare, kernel, kind, dim),
            _candidates(kernel, kind),
            hgmma=kind == "half" and kernel != "delta",
            streams=kind == "half" and kernel != "delta",
        )
        for kind in ("half", "float")
        for dim in HEADS
        for kernel in ("forward", "delta", "backward")
    ]


def _candidates(kernel: str, kind: str) -> tuple[Config, ...]:
    if kernel == "delta":
        return tuple(
            {"BLOCK_M": rows, "num_warps": warps, "num_stages": 1} for rows in (16, 32, 64, 128) for warps in (2, 4, 8)
        )
    if kind == "half":
        shapes = ((64, 32, 4), (64, 64, 4), (128, 32, 8), (128, 64, 8), (128, 128, 8))
    else:
        shapes = ((16, 32, 4), (32, 16, 4), (32, 32, 4), (64, 32, 8))
    rows_name = "BLOCK_M" if kernel == "forward" else "BLOCK"
    return tuple(
        {rows_name: rows, "STEP": step, "num_warps": warps, "num_stages": stages}
        for rows, step, warps in shapes
        for stages in (1, 2, 3)
    )


def _prepare(kernel: str, kind: str, dim: int, device: torch.device) -> Callable[[], Any]:
    from farl_kernels.attention.long import launchers
    from farl_kernels.attention.short import launchers as short

    heads, scale = HEADS[dim], dim**-0.5
    dtype = torch.bfloat16 if kind == "half" else torch.float32
    qkv = torch.randn(BATCH, TOKENS, 3, heads, dim, device=device, dtype=dtype)
    q, k, v = qkv.unbind(2)
    if kernel == "forward":
        return lambda: launchers.forward(q, k, v, None, None, False, scale)
    out, grad = (torch.randn(BATCH, TOKENS, heads, dim, device=device, dtype=dtype) for _ in range(2))
    if kernel == "delta":
        return lambda: launchers.delta_of(out, None, grad)
    lse, delta = (torch.randn(BATCH, heads, TOKENS, device=device) for _ in range(2))
    dqkv = torch.empty_like(qkv)

    def run() -> Any:
        # Without the launch that computes delta, which has an entry of its own.
        dq, dk, dv = dqkv.unbind(2)
        short.backward(
            grad, q, k, v, None, None, out, lse, False, scale, dq, dk, dv, False, op=launchers.OP, delta=delta
        )
        return dqkv

    return run
