"""How a Triton kernel is started: on CUDA tensors, interpreted on CPU tensors, or only recorded.

Kernels live in the `kernels.py` of each op and are started by the functions of its `launchers.py`, always through
`launch`. Those two modules import triton, so they are themselves imported only when a kernel is wanted: the package
works without triton. Under TRITON_INTERPRET=1, set before triton is imported, kernels run on CPU tensors: slow, exact
in float32 and float16, and wrong in bfloat16 (`tl.dot` works on the bit patterns there, in triton 3.6 - 3.9).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
# Ampere: the first with bfloat16 tensor cores and asynchronous copies.
OLDEST_CAPABILITY = (8, 0)

_recording: list[Launch] | None = None


@dataclass(frozen=True)
class Launch:
    """One start of a kernel: `args` are the positional ones, `options` constexprs, num_warps and num_stages."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


def refuses(x: Tensor) -> str | None:
    """Why Triton kernels cannot run on the device of `x`, or None. Float64 is left to the references."""
    if x.dtype == torch.float64:
        return "the kernels compute in float32, the tensors are float64"
    if x.device.type == "meta":
        return None
    if not HAS_TRITON:
        return "triton is not installed (pip install triton; Linux only)"
    if x.device.type == "cpu":
        if not INTERPRETED:
            return "the tensors are on the CPU (TRITON_INTERPRET=1 interprets the kernels there, slowly, for tests)"
        if x.dtype == torch.bfloat16:
            return "triton's interpreter computes wrong bfloat16 products"
        return None
    if x.device.type != "cuda":
        return f"the tensors are on {x.device}, want CUDA"
    # A tracer has no device to ask.
    if not torch.compiler.is_compiling() and _capability(x.device.index) < OLDEST_CAPABILITY:
        return "the GPU is older than Ampere (compute capability 8.0)"
    return None


def declines(x: Tensor) -> str | None:
    """Why Triton kernels are not taken unasked for tensors like `x`, or None."""
    return None if x.is_cuda else "unasked, kernels run on CUDA only"


@functools.cache
def _capability(index: int | None) -> tuple[int, int]:
    # Tensors of a tracer may say "cuda" where there is none.
    return torch.cuda.get_device_capability(index) if torch.cuda.is_available() else OLDEST_CAPABILITY


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many a GPU has; one for the interpreter and for recording, where it says nothing."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Start `kernel` on the device of its first tensor argument; nothing happens on an empty grid."""
    # Explicit, because the default of triton changes in 3.10.
    options.setdefault("enable_fp_fusion", True)
    if _recording is not None:
        _recording.append(Launch(kernel, grid, args, options))
        return
    if math.prod(grid) == 0:
        return
    device = next(x.device for x in args if isinstance(x, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Inside, kernels are not run but listed: with meta tensors a launcher then tells what it would start."""
    global _recording
    before, _recording = _recording, []
    try:
        yield _recording
    finally:
        _recording = before
