"""Calls that use the table entries of packed attention."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

from farl_kernels.attention.packed import launchers
from farl_kernels.cases import Case
from farl_kernels.tables import Config

# 320 captions of 77 tokens at most, 18 on average; 64 views of ViT-L/14 (257 tokens), or of 448 pixels (785).
SHAPES = {"text": (320, 18, 77, 8), "long": (64, 257, 785, 12)}


def _configs(*tiles: tuple[int, int, int]) -> tuple[Config, ...]:
    return tuple(
        {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
        for (m, n, warps), stages in product(tiles, (1, 2, 3))
    )


HALF = _configs((64, 64, 4), (64, 32, 4), (64, 16, 4), (64, 32, 8), (128, 64, 8), (128, 32, 8))
FLOAT = _configs((32, 32, 4), (16, 32, 4), (16, 16, 4), (32, 16, 8), (16, 16, 8))


def cases() -> list[Case]:
    entries = [("half", dim, kind) for dim, kind in product((64, 128), SHAPES)]
    entries += [("float", dim, "text") for dim in (64, 128)]
    return [
        Case(
            launchers.OP,
            kernel,
            f"{dtype}-d{dim}" + (f"-{kind}" if dtype == "half" else ""),
            _prepare(dtype, dim, kind, kernel),
            candidates=HALF if dtype == "half" else FLOAT,
            hgmma=dtype == "half",
            streams=dtype == "half",
        )
        for (dtype, dim, kind), kernel in product(entries, ("forward", "backward"))
    ]


def _prepare(dtype: str, dim: int, kind: str, kernel: str) -> Callable[[torch.device], Callable[[], Any]]:
    def prepare(device: torch.device) -> Callable[[], Any]:
        settings: dict[str, Any] = {"device": device, "dtype": torch.bfloat16 if dtype == "half" else torch.float32}
        sequences, mean, longest, heads = SHAPES[kind]
        causal, scale, tokens = kind == "text", dim**-0.5, sequences * mean + 240
        qkv = torch.randn(tokens, 3, heads, dim, **settings)
        cu_seqlens = _offsets(sequences, mean, longest, device)
        # Captions at head dim 64 are the models' own, and they give the projection's bias.
        bias = torch.randn(3, heads, dim, **settings) if (dtype, dim, kind) == ("half", 64, "text") else None
        if kernel == "forward":
            return lambda: launchers.forward(qkv, bias, cu_seqlens, longest, causal, scale)
        out, grad = (torch.randn(tokens, heads, dim, **settings) for _ in range(2))
        lse = torch.full((heads, tokens), 4.0, device=device)
        return lambda: launchers.backward(
            grad, qkv, bias, cu_seqlens, out, lse, longest, causal, scale, bias is not None
        )

    return prepare


def _offsets(sequences: int, mean: int, longest: int, device: torch.device) -> Tensor:
    """Offsets of sequences whose lengths go up and down around the mean."""
    spread = min(mean, longest - mean) - 1
    lengths = [mean + (spread if i % 2 else -spread) * (i // 2 % 8) // 8 for i in range(sequences)]
    offsets = [sum(lengths[:i]) for i in range(sequences + 1)]
    return torch.tensor(offsets, dtype=torch.int32, device=device)
