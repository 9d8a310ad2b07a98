"""The table entries of short attention in use: a batch of images of 197 tokens, or of captions of 77 (causal)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from farl_kernels.cases import Case
from farl_kernels.tables import Config

# Sequences, tokens and whether they are causal.
SHAPES = {"n128": (320, 77, True), "n256": (256, 197, False)}
HEADS = {64: 12, 128: 8}


def cases() -> list[Case]:
    return [
        Case(
            "attention_short",
            kernel,
            f"half-d{dim}-{size}",
            functools.partial(prepare, dim, *SHAPES[size]),
            _candidates(kernel),
            hgmma=True,
            streams=kernel == "backward",
        )
        for dim in HEADS
        for size in SHAPES
        for kernel, prepare in (("forward", _forward), ("backward", _backward))
    ]


def _candidates(kernel: str) -> tuple[Config, ...]:
    if kernel == "forward":
        return tuple(
            {"BLOCK_M": rows, "TILES": tiles, "num_warps": warps, "num_stages": 2}
            for rows, warps in ((64, 4), (64, 8), (128, 8))
            for tiles in (1, 2, 4)
            if rows * tiles <= 256
        )
    return tuple(
        {"BLOCK": rows, "STEP": step, "num_warps": warps, "num_stages": stages}
        for rows, step, warps in ((64, 16, 4), (64, 32, 4), (64, 64, 4), (128, 16, 8), (128, 32, 8), (128, 64, 8))
        for stages in (1, 2, 3)
    )


def _qkv(dim: int, batch: int, n: int, device: torch.device) -> torch.Tensor:
    return torch.randn(batch, n, 3, HEADS[dim], dim, device=device, dtype=torch.bfloat16)


def _bias(dim: int, device: torch.device) -> torch.Tensor | None:
    """Head dim 64 is the models' own, and they give the projection's bias."""
    return torch.randn(3, HEADS[dim], dim, device=device, dtype=torch.bfloat16) if dim == 64 else None


def _forward(dim: int, batch: int, n: int, causal: bool, device: torch.device) -> Callable[[], Any]:
    from farl_kernels.attention.short import launchers

    q, k, v = _qkv(dim, batch, n, device).unbind(2)
    bias = _bias(dim, device)
    return lambda: launchers.forward(q, k, v, bias, None, causal, dim**-0.5)


def _backward(dim: int, batch: int, n: int, causal: bool, device: torch.device) -> Callable[[], Any]:
    from farl_kernels.attention.short import launchers

    qkv = _qkv(dim, batch, n, device)
    out, grad = (torch.randn(batch, n, HEADS[dim], dim, device=device, dtype=qkv.dtype) for _ in range(2))
    lse = torch.randn(batch, HEADS[dim], n, device=device)
    dqkv, bias = torch.empty_like(qkv), _bias(dim, device)

    def run() -> Any:
        q, k, v = qkv.unbind(2)
        dq, dk, dv = dqkv.unbind(2)
        wants = bias is not None
        dbias = launchers.backward(grad, q, k, v, bias, None, out, lse, causal, dim**-0.5, dq, dk, dv, wants)
        return (dqkv, dbias) if wants else dqkv

    return run
