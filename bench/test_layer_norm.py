"""LayerNorm alone, and as the model uses it: bias of the layer before + residual + LayerNorm, both results kept."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

from bench.contest import (
    DTYPE,
    MODES,
    Contender,
    Cost,
    NotMeasuredError,
    Problem,
    backend_of,
    compete,
    compiled,
    need,
    need_gpu,
    our_names,
    randn,
)
from bench.timing import CUDA
from farl_kernels import add_layer_norm

EPS = 1e-5
# rows, width
SHAPES = {
    "width 768": (256 * 197 if CUDA else 4 * 197, 768),
    "width 1024": (128 * 257 if CUDA else 2 * 257, 1024),
}
OURS = our_names("triton", "torch", "reference", "apex")


def eager_add(x: Tensor, residual: Tensor, x_bias: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    summed = residual + (x + x_bias)
    return F.layer_norm(summed, weight.shape, weight, bias, EPS), summed


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


@functools.lru_cache(maxsize=1)
def problem(shape: str, added: bool) -> Problem:
    rows, width = SHAPES[shape]
    unit = rows * width * DTYPE.itemsize
    label = f"{shape}, {rows} rows"
    if not added:
        # Forward: x in, y out. Backward: x and dy in, dx out.
        cost = Cost(forward_bytes=2 * unit, backward_bytes=3 * unit)
        draw = randn((rows, width), (width,), (width,))
        return Problem("LayerNorm", label, draw, eager, cost, wanted=(0, 1, 2))
    # Forward: x and residual in, y and sum out. Backward: sum, dy and dsum in; dx and dresidual are one tensor.
    cost = Cost(forward_bytes=4 * unit, backward_bytes=4 * unit)
    draw = randn((rows, width), (rows, width), (width,), (width,), (width,))
    return Problem("bias + residual + LayerNorm", label, draw, eager_add, cost, wanted=(0, 1, 2, 3, 4))


def ours(backend: str | None, added: bool) -> Contender:
    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return add_layer_norm(x, None, weight, bias, eps=EPS, backend=backend)[0]

    def add(x: Tensor, residual: Tensor, x_bias: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return add_layer_norm(x, residual, weight, bias, eps=EPS, x_bias=x_bias, backend=backend)

    return Contender(add if added else plain, ours=True)


def liger() -> Contender:
    module = need("liger_kernel.transformers.functional")
    need_gpu()
    return Contender(lambda x, weight, bias: module.liger_layer_norm(x, weight, bias, EPS))


def apex() -> Contender:
    module = need("apex.normalization.fused_layer_norm")
    need_gpu()
    return Contender(lambda x, weight, bias: module.fused_layer_norm_affine(x, weight, bias, weight.shape, EPS))


def quack() -> Contender:
    module = need("quack.rmsnorm")
    need_gpu()

    def solve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return module.layernorm_fwd(x, weight.float(), bias.float(), EPS)

    # It wants its parameters in float32 and has no backward pass.
    return Contender(solve, modes=("forward",))


PLAIN_PEERS = {"Liger-Kernel": liger, "apex": apex, "quack": quack}
PEERS = ["eager PyTorch", "torch.compile", *PLAIN_PEERS]


@functools.lru_cache(maxsize=1)
def built(name: str, shape: str, added: bool) -> Contender:
    if name.startswith("farl_kernels"):
        return ours(backend_of(name), added)
    if name in PLAIN_PEERS:
        if added:
            raise NotMeasuredError("has no LayerNorm with residual")
        return PLAIN_PEERS[name]()
    function = eager_add if added else eager
    return Contender(compiled(function) if name == "torch.compile" else function)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OURS + PEERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("added", [True, False], ids=["add", "plain"])
def test_layer_norm(benchmark: Any, added: bool, shape: str, name: str, mode: str) -> None:
    compete(benchmark, problem(shape, added), name, functools.partial(built, name, shape, added), mode)
