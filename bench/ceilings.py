"""The two ceilings of a machine, measured: memory bandwidth by a copy, arithmetic by a large matrix product.

``python -m bench.ceilings`` prints them as JSON, with the machine.
"""

from __future__ import annotations

import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from bench import machine
from bench.timing import CUDA, DEVICE

COPY_BYTES = 2 << 30 if CUDA else 64 << 20
GEMM_SIZE = 8192 if CUDA else 1024
GEMM_DTYPE = torch.bfloat16 if CUDA else torch.float32


@functools.cache
def measured() -> dict[str, Any]:
    """``bytes_per_second`` (read + written) and ``flop_per_second``, with what they were measured on.

    Random data: a product of zeros runs faster than any real one.
    """
    source = torch.randn(COPY_BYTES // 4, device=DEVICE)
    target = torch.empty_like(source)
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE, device=DEVICE, dtype=GEMM_DTYPE) for _ in range(2))
    out = torch.empty_like(a)
    # The product first: it brings the clocks up.
    product = _seconds(lambda: torch.mm(a, b, out=out))
    copy = _seconds(lambda: target.copy_(source))
    if not torch.equal(source[:1000], target[:1000]):
        raise RuntimeError("the copy did not copy")
    return {
        "bytes_per_second": 2 * COPY_BYTES / copy,
        "flop_per_second": 2 * GEMM_SIZE**3 / product,
        "copy": f"{COPY_BYTES >> 20} MiB copied on the device, bytes read and written",
        "gemm": f"{GEMM_SIZE} x {GEMM_SIZE} x {GEMM_SIZE}, {str(GEMM_DTYPE).removeprefix('torch.')}, random data",
    }


def _seconds(call: Callable[[], object], repeats: int = 11) -> float:
    times = []
    for index in range(repeats + 3):
        if CUDA:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            seconds = start.elapsed_time(end) * 1e-3
        else:
            begun = time.perf_counter()
            call()
            seconds = time.perf_counter() - begun
        if index >= 3:
            times.append(seconds)
    # A GPU's first products run at clocks that it does not keep. A CPU's slower ones were disturbed by other work.
    return statistics.median(times) if CUDA else min(times)


if __name__ == "__main__":
    print(json.dumps({"machine": machine.describe(), "ceilings": measured()}, indent=2))
