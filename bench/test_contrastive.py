"""Contrastive loss over N pairs in one process: ours, open_clip's, and others that never store N x N.

"forward" is without gradients, "both" a training step's share. Peak memory is that of one call beyond its inputs.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import contrastive_peers as peers
from bench.contest import DTYPE, Contender, Cost, Problem, backend_of, compete, our_names
from bench.timing import CUDA, DEVICE
from farl_kernels import contrastive_loss

DIM = 512
COUNTS = [32_768, 4_096, 5_120, 65_536, 131_072, 262_144] if CUDA else [256, 1024]
SIGMOID_COUNTS = [32_768, 8_192] if CUDA else [1024]
SCALE, BIAS = 1 / 0.07, -10.0
# Noise beside what image and text of a pair share: far from collapsed, far from random.
NOISE = 1.25
TOLERANCE = None if CUDA else 1e-4
MODES = ("both", "forward")


@functools.lru_cache(maxsize=1)
def problem(kind: str, count: int) -> Problem:
    def draw(g: torch.Generator) -> tuple[Tensor, ...]:
        shared = torch.randn(count, DIM, generator=g, device=DEVICE)
        noisy = (shared + NOISE * torch.randn(count, DIM, generator=g, device=DEVICE) for _ in range(2))
        features = tuple(F.normalize(x, dim=1).to(DTYPE) for x in noisy)
        scalars = (SCALE,) if kind == "softmax" else (SCALE, BIAS)
        return (*features, *(torch.tensor(x, device=DEVICE, dtype=torch.float32) for x in scalars))

    product = 2.0 * count * count * DIM
    features = 2 * count * DIM * DTYPE.itemsize
    return Problem(
        f"contrastive loss, {kind}",
        f"N = {count:,}, D = {DIM}",
        draw,
        ours(kind, "reference").solve,
        Cost(product, 3 * product, features, 2 * features),
        wanted=(0, 1, 2) if kind == "softmax" else (0, 1, 2, 3),
        tolerance=TOLERANCE,
    )


def ours(kind: str, backend: str | None, deterministic: bool = False) -> Contender:
    def solve(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None) -> Any:
        return contrastive_loss(
            image, text, scale, kind=kind, logit_bias=bias, backend=backend, deterministic=deterministic
        )

    return Contender(solve, ours=True)


@functools.lru_cache(maxsize=1)
def built(kind: str, name: str) -> Contender:
    if name.startswith("farl_kernels"):
        plain = name.removesuffix(" deterministic")
        return ours(kind, backend_of(plain), deterministic=plain != name)
    return {
        "open_clip": lambda: peers.open_clip(kind, False),
        "open_clip, torch.compile": lambda: peers.open_clip(kind, True),
        "chunked PyTorch": lambda: peers.chunked(False),
        "chunked PyTorch, torch.compile": lambda: peers.chunked(True),
        "memeff (no gradient of the scale)": lambda: peers.memeff(1 / SCALE),
        "Inf-CL": peers.inf_cl,
    }[name]()


OURS = our_names("triton", "reference")
DETERMINISTIC = [f"{name} deterministic" for name in OURS[:1]]
PEERS = ["open_clip", "open_clip, torch.compile"]
CHUNKED = ["chunked PyTorch", "chunked PyTorch, torch.compile", "memeff (no gradient of the scale)", "Inf-CL"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OURS + PEERS + CHUNKED + DETERMINISTIC)
@pytest.mark.parametrize("count", COUNTS)
def test_softmax(benchmark: Any, count: int, name: str, mode: str) -> None:
    compete(benchmark, problem("softmax", count), name, functools.partial(built, "softmax", name), mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OURS + PEERS)
@pytest.mark.parametrize("count", SIGMOID_COUNTS)
def test_sigmoid(benchmark: Any, count: int, name: str, mode: str) -> None:
    compete(benchmark, problem("sigmoid", count), name, functools.partial(built, "sigmoid", name), mode)
