"""Starts the kernels of quick_gelu and gelu. Tensors are [..., C]; any strides."""

from __future__ import annotations

import torch
from torch import Tensor

from farl_kernels import tables
from farl_kernels.activation import kernels
from farl_kernels.launch import launch, multiprocessors


def forward(x: Tensor, bias: Tensor | None, quick: bool) -> Tensor:
    """[..., C] in the dtype of x, contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x = _rows(x)
    rows, columns = x.shape
    config = _configuration("forward", quick, x)
    launch(
        kernels.activation_forward_kernel,
        (-(-rows // config["ROWS"]) * -(-columns // config["COLUMNS"]),),
        x,
        None if bias is None else bias.contiguous(),
        out,
        rows,
        columns,
        x.stride(0),
        QUICK=quick,
        **config,
    )
    return out


def backward(
    grad: Tensor, x: Tensor, bias: Tensor | None, quick: bool, want_x: bool, want_bias: bool
) -> tuple[Tensor, Tensor]:
    """dx [..., C] in the dtype of x, and d_bias [C] in float32; empty where not wanted."""
    dx = torch.empty(x.shape if want_x else (0,), dtype=x.dtype, device=x.device)
    grad, x = _rows(grad), _rows(x)
    rows, columns = x.shape
    config = _configuration("backward", quick, x)
    across = -(-columns // config["COLUMNS"])
    resident = config.pop("PROGRAMS") * multiprocessors(x.device)
    down = min(-(-rows // config["ROWS"]), max(1, resident // max(1, across)))
    sums = torch.empty(down, columns, dtype=torch.float32, device=x.device) if want_bias else None
    launch(
        kernels.activation_backward_kernel,
        (across, down),
        grad,
        x,
        None if bias is None else bias.contiguous(),
        dx if want_x else None,
        sums,
        rows,
        columns,
        grad.stride(0),
        x.stride(0),
        QUICK=quick,
        **config,
    )
    return dx, x.new_empty(0, dtype=torch.float32) if sums is None else sums.sum(0)


def _configuration(kernel: str, quick: bool, x: Tensor) -> tables.Config:
    """Options of a launch: narrow rows get a narrow tile with more of them."""
    bucket = f"{'quick_gelu' if quick else 'gelu'}_{8 * x.element_size()}"
    config = tables.lookup("activation", kernel, bucket, x.device)
    while config["COLUMNS"] >= 2 * x.shape[1] and config["COLUMNS"] > 16:
        config["COLUMNS"] //= 2
        config["ROWS"] *= 2
    return config


def _rows(x: Tensor) -> Tensor:
    """[..., C] as [rows, C] with unit stride in a row; a copy only where the strides leave no other way."""
    columns = x.shape[-1] if x.ndim else 1
    x = x.reshape(x.numel() // columns if columns else 0, columns)
    return x if x.stride(1) == 1 else x.contiguous()
