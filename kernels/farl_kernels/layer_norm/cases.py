"""The table entries of add_layer_norm in use: a batch of 256 images of 197 tokens, all gradients wanted.

In 16 bits FaRL's convention (cast before the affine) and CLIP's are two kernels with one table entry: a case runs both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from farl_kernels.cases import Case
from farl_kernels.tables import Config

ROWS = 256 * 197
# A typical width for each number of pieces that a row is cut into.
WIDTHS = {2: 1024, 3: 768}
# Values of `cast_first`; in float32 it changes nothing.
CONVENTIONS = {torch.bfloat16: (True, False), torch.float32: (True,)}


def cases() -> list[Case]:
    return [
        Case(
            "layer_norm",
            kernel,
            f"{pieces}_pieces_{8 * dtype.itemsize}",
            functools.partial(prepare, columns, dtype),
            _candidates(kernel, 8 * dtype.itemsize),
        )
        for pieces, columns in WIDTHS.items()
        for dtype in CONVENTIONS
        for kernel, prepare in (("forward", _forward), ("backward", _backward))
    ]


def _candidates(kernel: str, bits: int) -> tuple[Config, ...]:
    found: list[Config] = []
    for num_warps in (1, 2, 4, 8):
        # 16 bytes a lane and piece, half or twice as much.
        for tile in (num_warps * size // bits for size in (2048, 4096, 8192)):
            config = {"TILE": tile, "num_warps": num_warps, "num_stages": 1}
            if kernel == "forward":
                found.append(config)
            else:
                found += [config | {"PROGRAMS": warps // num_warps} for warps in (8, 12, 16, 24)]
    return tuple(found)


def _forward(columns: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Any]:
    from farl_kernels.layer_norm import launchers

    x, residual = (torch.randn(ROWS, columns, device=device, dtype=dtype) for _ in range(2))
    weight, bias, x_bias = (torch.randn(columns, device=device) for _ in range(3))
    return lambda: [
        launchers.forward(x, residual, weight, bias, x_bias, None, 1e-5, cast_first)
        for cast_first in CONVENTIONS[dtype]
    ]


def _backward(columns: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Any]:
    from farl_kernels.layer_norm import launchers

    upstream, d_summed, summed = (torch.randn(ROWS, columns, device=device, dtype=dtype) for _ in range(3))
    mean, rstd = (torch.rand(ROWS, device=device) for _ in range(2))
    weight = torch.randn(columns, device=device)
    wanted = [True, False, True, True, True]
    return lambda: [
        launchers.backward(upstream, d_summed, summed, mean, rstd, weight, None, dtype, cast_first, wanted)
        for cast_first in CONVENTIONS[dtype]
    ]
