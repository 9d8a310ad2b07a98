"""Starts the kernels of add_layer_norm. Tensors are [..., C]; any strides."""

from __future__ import annotations

import torch
from torch import Tensor

from farl_kernels import tables
from farl_kernels.launch import launch, multiprocessors
from farl_kernels.layer_norm import kernels
from farl_kernels.layer_norm.reference import residual_dtype

MOST_WARPS = 8


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    x_bias: Tensor | None,
    row_scale: Tensor | None,
    eps: float,
    cast_first: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalised, summed (empty where nothing is added to x), mean and rstd (float32, [...]), all contiguous."""
    *leading, columns = x.shape
    added = not (residual is None and x_bias is None and row_scale is None)
    normalised = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    summed = torch.empty(x.shape if added else (0,), dtype=residual_dtype(x, residual), device=x.device)
    mean = torch.empty(leading, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    rows = x.numel() // columns
    config = _configuration("forward", columns, x, summed)
    per_program = config["ROWS"]
    x = _rows(x)
    residual = None if residual is None else _rows(residual)
    launch(
        kernels.add_layer_norm_forward_kernel,
        (-(-rows // per_program),),
        x,
        residual,
        _contiguous(weight),
        _contiguous(bias),
        _contiguous(x_bias),
        _contiguous(row_scale),
        normalised,
        summed if added else None,
        mean,
        rstd,
        rows,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        1 if row_scale is None else max(1, rows // max(1, row_scale.numel())),
        eps,
        C=columns,
        CAST_FIRST=cast_first,
        **config,
    )
    return normalised, summed, mean, rstd


def backward(
    d_normalised: Tensor | None,
    d_summed: Tensor | None,
    summed: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    row_scale: Tensor | None,
    dtype: torch.dtype,
    cast_first: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """d_residual in the dtype of `summed`, dx in `dtype`, and column sums [k, C] in float32.

    `wanted` says which of d_residual, dx, d_weight, d_bias and d_x_bias to make. Those of the last three that are
    wanted are the column sums, in this order; a tensor that is not wanted is empty.
    """
    columns = summed.shape[-1]
    want_residual, want_x, *want_sums = wanted
    d_residual = torch.empty(summed.shape if want_residual else (0,), dtype=summed.dtype, device=summed.device)
    dx = torch.empty(summed.shape if want_x else (0,), dtype=dtype, device=summed.device)
    rows = summed.numel() // columns
    config = _configuration("backward", columns, dx, summed)
    programs = min(-(-rows // config["ROWS"]), config.pop("PROGRAMS") * multiprocessors(summed.device))
    partial = torch.empty(sum(want_sums), programs, columns, dtype=torch.float32, device=summed.device)
    slots = iter(partial)
    d_normalised = None if d_normalised is None else _rows(d_normalised)
    d_summed = None if d_summed is None else _rows(d_summed)
    summed = _rows(summed)
    launch(
        kernels.add_layer_norm_backward_kernel,
        (programs,),
        d_normalised,
        d_summed,
        summed,
        mean,
        rstd,
        _contiguous(weight),
        _contiguous(row_scale),
        d_residual if want_residual else None,
        dx if want_x else None,
        *(next(slots) if want else None for want in want_sums),
        rows,
        0 if d_normalised is None else d_normalised.stride(0),
        0 if d_summed is None else d_summed.stride(0),
        summed.stride(0),
        1 if row_scale is None else max(1, rows // max(1, row_scale.numel())),
        C=columns,
        CAST_FIRST=cast_first,
        **config,
    )
    return d_residual, dx, partial.sum(1)


def _configuration(kernel: str, columns: int, x: Tensor, summed: Tensor) -> tables.Config:
    """Options of a launch: a row is cut into at most three pieces, so that 768 = 3 * 256 leaves no lane idle.

    The number of pieces is what registers depend on, hence the table's key. A tile has TILE columns of as many rows
    as fit; a piece that is longer takes more warps.
    """
    chunk = 8
    while 3 * chunk < columns:
        chunk *= 2
    chunks = -(-columns // chunk)
    # By the wider dtype, so that a lane loads as many values of both: else they would change lanes in shared memory.
    bits = 8 * max(x.element_size(), summed.element_size())
    config = tables.lookup("layer_norm", kernel, f"{max(2, chunks)}_pieces_{bits}", x.device)
    tile = config.pop("TILE")
    more = min(max(1, chunk // tile), max(1, MOST_WARPS // config["num_warps"]))
    config["num_warps"] *= more
    if "PROGRAMS" in config:
        config["PROGRAMS"] = max(1, config["PROGRAMS"] // more)
    return config | {"CHUNK": chunk, "CHUNKS": chunks, "ROWS": max(1, tile // chunk)}


def _rows(x: Tensor) -> Tensor:
    """[..., C] as [rows, C] with unit stride in a row; a copy only where the strides leave no other way."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
