"""QuickGELU and GELU with the bias of the layer before and its gradient, as in the MLP of a ViT block."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.contest import DTYPE, MODES, Contender, Cost, Problem, backend_of, compete, compiled, our_names, randn
from bench.timing import CUDA
from farl_kernels import gelu, quick_gelu

# rows, width of the MLP
SHAPES = {
    "width 3072": (256 * 197 if CUDA else 197, 3072),
    "width 4096": (128 * 257 if CUDA else 257, 4096),
}


def eager_quick_gelu(x: Tensor, bias: Tensor) -> Tensor:
    z = x + bias
    return z * torch.sigmoid(1.702 * z)


def eager_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


OPS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "QuickGELU with bias": (quick_gelu, eager_quick_gelu),
    "GELU with bias": (gelu, eager_gelu),
}
NAMES = [*our_names("triton", "torch"), "eager PyTorch", "torch.compile"]


@functools.lru_cache(maxsize=1)
def problem(op: str, shape: str) -> Problem:
    rows, width = SHAPES[shape]
    unit = rows * width * DTYPE.itemsize
    cost = Cost(forward_bytes=2 * unit, backward_bytes=3 * unit)
    return Problem(op, f"{shape}, {rows} rows", randn((rows, width), (width,)), OPS[op][1], cost, wanted=(0, 1))


@functools.lru_cache(maxsize=1)
def built(op: str, name: str, shape: str) -> Contender:
    ours, eager = OPS[op]
    if name.startswith("farl_kernels"):
        return Contender(functools.partial(ours, backend=backend_of(name)), ours=True)
    return Contender(compiled(eager) if name == "torch.compile" else eager)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", OPS)
def test_activation(benchmark: Any, op: str, shape: str, name: str, mode: str) -> None:
    compete(benchmark, problem(op, shape), name, functools.partial(built, op, name, shape), mode)
