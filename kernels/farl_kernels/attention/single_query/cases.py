"""Calls that use the table entries of single-query attention."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch

from farl_kernels.attention.single_query import launchers
from farl_kernels.cases import Case


def cases() -> list[Case]:
    # Nothing is streamed ahead: a block is one batch of wide loads, and other blocks of the SM work meanwhile.
    candidates = tuple(
        {"BLOCK_N": n, "num_warps": warps, "num_stages": 1} for n, warps in product((8, 16, 32, 64, 128), (1, 2, 4, 8))
    )
    return [
        Case(launchers.OP, kernel, f"{dtype}-d{dim}-{kind}", _prepare(dtype, dim, kind, kernel), candidates)
        for dtype, dim, kind, kernel in product(("half", "float"), (64, 128), ("text", "long"), ("forward", "backward"))
    ]


def _prepare(dtype: str, dim: int, kind: str, kernel: str) -> Callable[[torch.device], Callable[[], Any]]:
    def prepare(device: torch.device) -> Callable[[], Any]:
        settings: dict[str, Any] = {"device": device, "dtype": torch.bfloat16 if dtype == "half" else torch.float32}
        if kind == "text":
            # 320 captions of 18 tokens and room for more.
            sequences, heads, longest = 320, 8, 77
            kv = torch.randn(6000, 2, heads, dim, **settings)
            cu_seqlens = torch.arange(0, 18 * (sequences + 1), 18, device=device, dtype=torch.int32)
        else:
            # The class tokens of ViT-B/16.
            sequences, heads, longest = 512, 12, 197
            kv, cu_seqlens = torch.randn(sequences, longest, 2, heads, dim, **settings), None
        q, out, grad = (torch.randn(sequences, heads, dim, **settings) for _ in range(3))
        lse = torch.full((sequences, heads), 4.0, device=device)
        scale = dim**-0.5
        if kernel == "forward":
            return lambda: launchers.forward(q, kv, cu_seqlens, longest, scale)
        return lambda: launchers.backward(grad, q, kv, cu_seqlens, out, lse, longest, scale, True)

    return prepare
