"""Runs the ahead-of-time gate on a kernel of our own, several times: a process without TRITON_INTERPRET.

Argument 1 is a JSON list of [configuration, arguments of the gate], each a run; what they did is written as JSON to the
file that argument 2 names.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import triton
import triton.language as tl

from farl_kernels import cases, launch, tables
from farl_kernels.aot.__main__ import main


@triton.jit
def fake_product_kernel(a, b, c, length, stride, BLOCK: tl.constexpr):
    lane, inner = tl.arange(0, BLOCK), tl.arange(0, 64)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, length, 64):
        x = tl.load(a + lane[:, None] * stride + start + inner[None, :])
        y = tl.load(b + lane[:, None] * stride + start + inner[None, :])
        total = tl.dot(x, tl.trans(y), total)
    tl.store(c + lane[:, None] * BLOCK + lane[None, :], total)


def prepare(device: torch.device) -> Callable[[], torch.Tensor]:
    a = torch.empty(256, 1024, dtype=torch.float16, device=device)
    c = torch.empty(256, 256, device=device)

    def run() -> torch.Tensor:
        config = tables.lookup("fake", "product", "any", device)
        launch.launch(fake_product_kernel, (1,), a, a, c, 1024, a.stride(0), **config)
        return c

    return run


if __name__ == "__main__":
    cases.FOLDERS = ("fake",)
    cases._of = lambda folder: [cases.Case("fake", "product", "any", prepare, hgmma=True, streams=True)]
    results = []
    for config, arguments in json.loads(sys.argv[1]):
        with (
            tables.override("fake", "product", "any", config),
            contextlib.redirect_stdout(io.StringIO()) as out,
            contextlib.redirect_stderr(io.StringIO()) as err,
        ):
            status = main(arguments)
        results.append({"status": status, "out": out.getvalue(), "err": err.getvalue()})
    Path(sys.argv[2]).write_text(json.dumps(results))
