"""Cross-entropy of a linear layer onto 8,192 visual tokens, at 75 masked patches an image.

Implementations differ in where they do the backward's work: some (ours among them) make the gradient in the forward
pass when one is wanted. So "forward" is timed without gradients, and "both" is the figure of training; a backward pass
alone would mean something else for each.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.contest import (
    DTYPE,
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
from bench.timing import CUDA, DEVICE
from farl_kernels import masked_token_cross_entropy

MASKED = 75
# images, width, vocabulary
SHAPES = {
    "75 masked patches of 256 images, 768 to 8192": (256, 768, 8192),
    "75 masked patches of 1024 images, 768 to 8192": (1024, 768, 8192),
    "75 masked patches of 4 images, 192 to 2048": (4, 192, 2048),
}
MODES = ("both", "forward")


def eager(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    # Softmax in float32, as autocast does it.
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)


@functools.lru_cache(maxsize=1)
def problem(shape: str) -> Problem:
    images, width, vocabulary = SHAPES[shape]
    rows = MASKED * images

    def draw(g: torch.Generator) -> tuple[Tensor, ...]:
        hidden, weight, bias = randn((rows, width), (vocabulary, width), (vocabulary,))(g)
        targets = torch.randint(0, vocabulary, (rows,), generator=g, device=DEVICE)
        return hidden, weight * width**-0.5, bias, targets

    product = 2.0 * rows * width * vocabulary
    inputs = (rows * width + vocabulary * width) * DTYPE.itemsize
    cost = Cost(product, 2 * product, inputs, 2 * inputs)
    return Problem("linear + cross-entropy", shape, draw, eager, cost, wanted=(0, 1, 2))


def ours(backend: str | None) -> Contender:
    def solve(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        return masked_token_cross_entropy(hidden, weight, bias, targets, backend=backend)[0]

    return Contender(solve, ours=True)


def liger() -> Contender:
    module = need("liger_kernel.transformers.fused_linear_cross_entropy")
    need_gpu()
    loss = module.LigerFusedLinearCrossEntropyLoss()
    return Contender(lambda hidden, weight, bias, targets: loss(weight, hidden, targets, bias))


def quack() -> Contender:
    cross_entropy = need("quack.cross_entropy").cross_entropy
    need_gpu()

    def solve(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(F.linear(hidden, weight, bias), targets, reduction="mean", inplace_backward=True)

    return Contender(solve)


def native() -> Contender:
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise NotMeasuredError(f"torch {torch.__version__} has no linear_cross_entropy")

    def solve(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        return function(hidden, weight, targets, linear_bias=bias)

    return Contender(solve)


PEERS = {
    "eager PyTorch": lambda: Contender(eager),
    "torch.compile": lambda: Contender(compiled(eager)),
    "torch linear_cross_entropy": native,
    "Liger-Kernel": liger,
    "quack": quack,
}
OURS = our_names("triton", "reference")


@functools.lru_cache(maxsize=1)
def built(name: str, shape: str) -> Contender:
    return PEERS[name]() if name in PEERS else ours(backend_of(name))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [*OURS, *PEERS])
@pytest.mark.parametrize("shape", [name for name in SHAPES if ("of 4 images" in name) != CUDA])
def test_token_loss(benchmark: Any, shape: str, name: str, mode: str) -> None:
    compete(benchmark, problem(shape), name, functools.partial(built, name, shape), mode)
