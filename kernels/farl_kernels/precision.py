"""In which dtype the ops compute, with and without autocast."""

from __future__ import annotations

import contextlib

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: the dtype in which values of `dtype` are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast asks for on `device`; None where it is off, or unknown as for meta tensors."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context in which autocast leaves the operations on `device` alone."""
    if autocast_dtype(device) is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of a kernel's products: for float32 what ``torch.set_float32_matmul_precision`` asks for.

    "highest", PyTorch's default, is "ieee"; "high" and "medium" are "tf32". 16-bit products are exact either way.
    """
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"
