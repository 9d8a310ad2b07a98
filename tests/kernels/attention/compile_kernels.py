"""Compiles the attention kernels with their optional arguments given and left out, and prints what fails.

The interpreter never sees the branches that a call does not take; the compiler sees them all. The table entries' cases,
which the ahead-of-time gate compiles, leave most optional arguments out.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch

from farl_kernels.aot.build import builds, compiled
from farl_kernels.attention.long import launchers as long
from farl_kernels.attention.packed import launchers as packed
from farl_kernels.attention.short import launchers as short
from farl_kernels.attention.single_query import launchers as single_query
from farl_kernels.cases import Case

HEADS, DIM, SCALE = 2, 24, 0.125


def dense(
    module: Any, kernel: str, wanted: str, masked: bool, biased: bool, causal: bool, device: torch.device
) -> Callable[[], Any]:
    """`wanted`: "q", "kv" or "qkv", the gradients."""
    batch, n = 2, 70

    def draw(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, device=device, dtype=torch.float16)

    q, k, v, grad = (draw(batch, n, HEADS, DIM) for _ in range(4))
    bias = draw(3, HEADS, DIM) if biased else None
    mask = torch.empty(batch, n, dtype=torch.bool, device=device) if masked else None
    if kernel == "forward":
        return lambda: module.forward(q, k, v, bias, mask, causal, SCALE)
    lse = torch.empty(batch, HEADS, n, device=device)
    dq = q if "q" in wanted else None
    dk, dv = (k, v) if "kv" in wanted else (None, None)
    return lambda: module.backward(grad, q, k, v, bias, mask, grad, lse, causal, SCALE, dq, dk, dv, biased)


def of_packed(kernel: str, biased: bool, device: torch.device) -> Callable[[], Any]:
    tokens, sequences = 70, 1
    qkv = torch.empty(tokens, 3, HEADS, DIM, device=device, dtype=torch.float16)
    bias = qkv[0] if biased else None
    offsets = torch.empty(sequences + 1, device=device, dtype=torch.int32)
    if kernel == "forward":
        return lambda: packed.forward(qkv, bias, offsets, 60, True, SCALE)
    out, lse = qkv[:, 0].contiguous(), torch.empty(HEADS, tokens, device=device)
    return lambda: packed.backward(out, qkv, bias, offsets, out, lse, 60, True, SCALE, biased)


def of_single_query(kernel: str, with_offsets: bool, wants_kv: bool, device: torch.device) -> Callable[[], Any]:
    sequences, n = 1, 70
    q = torch.empty(sequences, HEADS, DIM, device=device, dtype=torch.float16)
    kv = torch.empty(*(() if with_offsets else (sequences,)), n, 2, HEADS, DIM, device=device, dtype=torch.float16)
    offsets = torch.empty(sequences + 1, device=device, dtype=torch.int32) if with_offsets else None
    if kernel == "forward":
        return lambda: single_query.forward(q, kv, offsets, n, SCALE)
    lse = torch.empty(sequences, HEADS, device=device)
    return lambda: single_query.backward(q, q, kv, offsets, q, lse, n, SCALE, wants_kv)


def cases(everything: bool) -> list[Case]:
    made = []

    def add(op: str, kernel: str, bucket: str, prepare: Callable[..., Any], *arguments: Any) -> None:
        made.append(Case(op, kernel, bucket, functools.partial(prepare, *arguments)))

    add("attention_short", "backward", "half-d64-n128", dense, short, "backward", "q", True, False, False)
    add("attention_short", "backward", "half-d64-n128", dense, short, "backward", "kv", False, False, True)
    if not everything:
        return made
    for masked, biased, causal in itertools.product((False, True), repeat=3):
        for kernel in ("forward", "backward"):
            arguments = kernel, "qkv", masked, biased, causal
            add("attention_short", kernel, "half-d64-n128", dense, short, *arguments)
            add("attention_long", kernel, "half-d64", dense, long, *arguments)
    for kernel, flag in itertools.product(("forward", "backward"), (False, True)):
        add("attention_packed", kernel, "half-d64-text", of_packed, kernel, flag)
        add("attention_single_query", kernel, "half-d64-text", of_single_query, kernel, flag, True)
    add("attention_single_query", "backward", "half-d64-text", of_single_query, "backward", True, False)
    return made


def main(everything: bool) -> int:
    wanted = [build for case in cases(everything) for build in builds(case, "sm_80")]
    failed = [f"{build.name}: {found}" for build, found in compiled(wanted, 1) if isinstance(found, str)]
    print("\n".join(failed) or f"{len(wanted)} kernels")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] == ["everything"]))
