"""The Triton backend of add_layer_norm: raw ops, their gradient, and when it serves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from farl_kernels import launch
from farl_kernels.layer_norm import reference
from farl_kernels.layer_norm.reference import residual_dtype
from farl_kernels.library import define, refuse_double_backward

# A row is kept in registers.
WIDEST = 4096


def _launch_forward(*args: Any) -> tuple[Tensor, ...]:
    from farl_kernels.layer_norm import launchers

    return launchers.forward(*args)


def _launch_backward(*args: Any) -> tuple[Tensor, ...]:
    from farl_kernels.layer_norm import launchers

    return launchers.backward(*args)


def _fake_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    x_bias: Tensor | None,
    row_scale: Tensor | None,
    eps: float,
    cast_first: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    added = not (residual is None and x_bias is None and row_scale is None)
    summed = torch.empty(x.shape if added else (0,), dtype=residual_dtype(x, residual), device=x.device)
    statistic = torch.promote_types(summed.dtype, torch.float32)
    mean = torch.empty(x.shape[:-1], dtype=statistic, device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), summed, mean, torch.empty_like(mean)


def _fake_backward(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    want_residual, want_x, *want_sums = wanted
    return (
        torch.empty(summed.shape if want_residual else (0,), dtype=summed.dtype, device=summed.device),
        torch.empty(summed.shape if want_x else (0,), dtype=dtype, device=summed.device),
        torch.empty(sum(want_sums), summed.shape[-1], dtype=mean.dtype, device=summed.device),
    )


forward = define(
    "add_layer_norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? x_bias, "
    "Tensor? row_scale, float eps, bool cast_first, str backend) "
    "-> (Tensor normalised, Tensor summed, Tensor mean, Tensor rstd)",
    triton=_launch_forward,
    reference=reference.forward,
    fake=_fake_forward,
)
backward = define(
    "add_layer_norm_backward(Tensor? d_normalised, Tensor? d_summed, Tensor summed, Tensor mean, Tensor rstd, "
    "Tensor? weight, Tensor? row_scale, ScalarType dtype, bool cast_first, bool[] wanted, str backend) "
    "-> (Tensor d_residual, Tensor dx, Tensor sums)",
    triton=_launch_backward,
    reference=reference.backward,
    fake=_fake_backward,
)


class _AddLayerNorm(torch.autograd.Function):
    """Keeps the sum, which is a result (or x itself), and two numbers a row."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x, residual, weight, bias, x_bias, row_scale, eps, cast_first, backend
    ):
        normalised, summed, mean, rstd = forward(x, residual, weight, bias, x_bias, row_scale, eps, cast_first, backend)
        added = not (residual is None and x_bias is None and row_scale is None)
        ctx.save_for_backward(summed if added else x, mean, rstd, weight, row_scale)
        ctx.dtype, ctx.cast_first, ctx.backend = x.dtype, cast_first, backend
        ctx.dtypes = [None if p is None else p.dtype for p in (weight, bias, x_bias)]
        ctx.set_materialize_grads(False)
        return (normalised, summed) if added else normalised

    @staticmethod
    def backward(ctx, d_normalised, d_summed=None):  # type: ignore[no-untyped-def]
        refuse_double_backward("add_layer_norm")
        if d_normalised is None and d_summed is None:
            return (None,) * 9
        summed, mean, rstd, weight, row_scale = ctx.saved_tensors
        need_x, need_residual, *need_parameters = ctx.needs_input_grad[:5]
        if d_normalised is None:
            need_parameters[:2] = False, False
        # One tensor is both gradients then, as in PyTorch's own addition: autograd copies it before it changes either.
        same = row_scale is None and ctx.dtype == summed.dtype
        d_residual, dx, sums = backward(
            d_normalised,
            d_summed,
            summed,
            mean,
            rstd,
            weight,
            row_scale,
            ctx.dtype,
            ctx.cast_first,
            [need_residual or (same and need_x), need_x and not same, *need_parameters],
            ctx.backend,
        )
        if same:
            dx = d_residual
        rows = iter(sums.unbind(0))
        parameters = [
            next(rows).to(dtype) if need else None for need, dtype in zip(need_parameters, ctx.dtypes, strict=True)
        ]
        return dx if need_x else None, d_residual if need_residual else None, *parameters, None, None, None, None


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    affine_dtype: torch.dtype | None,
    x_bias: Tensor | None,
    row_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """x [..., C] -> (normalised [..., C] in the dtype of x, new residual [..., C])."""
    found = _AddLayerNorm.apply(x, residual, weight, bias, x_bias, row_scale, eps, affine_dtype is None, "triton")
    # An input that comes back is left to autograd outside of the Function, which would have to make a view of it.
    return found if isinstance(found, tuple) else (found, x)


def refuses(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    x_bias: Tensor | None,
    row_scale: Tensor | None,
    **_: Any,
) -> str | None:
    """Why the kernels cannot serve, or None."""
    for tensor in (x, residual, weight, bias, x_bias, row_scale):
        reason = None if tensor is None else launch.refuses(tensor)
        if reason is not None:
            return reason
    return None if x.shape[-1] <= WIDEST else f"rows of {x.shape[-1]} do not fit in registers, want at most {WIDEST}"


def declines(x: Tensor, *_: Any, **__: Any) -> str | None:
    """Why the kernels are not taken unasked, or None."""
    return launch.declines(x)
