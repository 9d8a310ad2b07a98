"""The table entries of quick_gelu and gelu in use: the MLP of ViT-B/16 on 256 images of 197 tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from farl_kernels.cases import Case
from farl_kernels.tables import Config

ROWS, COLUMNS = 256 * 197, 3072


def cases() -> list[Case]:
    return [
        Case(
            "activation",
            kernel,
            f"{'quick_gelu' if quick else 'gelu'}_{8 * dtype.itemsize}",
            functools.partial(prepare, quick, dtype),
            _candidates(kernel),
        )
        for quick in (True, False)
        for dtype in (torch.bfloat16, torch.float32)
        for kernel, prepare in (("forward", _forward), ("backward", _backward))
    ]


def _candidates(kernel: str) -> tuple[Config, ...]:
    found: list[Config] = []
    for columns in (256, 512, 1024):
        for size in (2048, 4096):
            config = {"ROWS": size // columns, "COLUMNS": columns, "num_warps": 4, "num_stages": 1}
            if kernel == "forward":
                found.append(config)
            else:
                found += [config | {"PROGRAMS": programs} for programs in (4, 6, 8, 12)]
    return tuple(found)


def _forward(quick: bool, dtype: torch.dtype, device: torch.device) -> Callable[[], Any]:
    from farl_kernels.activation import launchers

    x, bias = torch.randn(ROWS, COLUMNS, device=device, dtype=dtype), torch.randn(COLUMNS, device=device)
    return lambda: launchers.forward(x, bias, quick)


def _backward(quick: bool, dtype: torch.dtype, device: torch.device) -> Callable[[], Any]:
    from farl_kernels.activation import launchers

    grad, x = (torch.randn(ROWS, COLUMNS, device=device, dtype=dtype) for _ in range(2))
    bias = torch.randn(COLUMNS, device=device)
    return lambda: launchers.backward(grad, x, bias, quick, True, True)
