"""The Triton backend of quick_gelu and gelu: raw ops, their gradient, and when it serves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from farl_kernels import launch
from farl_kernels.activation import reference
from farl_kernels.library import define, refuse_double_backward
from farl_kernels.precision import accumulation_dtype


def _launch_forward(*args: Any) -> Tensor:
    from farl_kernels.activation import launchers

    return launchers.forward(*args)


def _launch_backward(*args: Any) -> tuple[Tensor, Tensor]:
    from farl_kernels.activation import launchers

    return launchers.backward(*args)


def _fake_forward(x: Tensor, bias: Tensor | None, quick: bool, backend: str) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake_backward(
    grad: Tensor, x: Tensor, bias: Tensor | None, quick: bool, want_x: bool, want_bias: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(x.shape if want_x else (0,), dtype=x.dtype, device=x.device),
        torch.empty(x.shape[-1:] if want_bias else (0,), dtype=accumulation_dtype(x.dtype), device=x.device),
    )


forward = define(
    "activation_forward(Tensor x, Tensor? bias, bool quick, str backend) -> Tensor",
    triton=_launch_forward,
    reference=reference.forward,
    fake=_fake_forward,
)
backward = define(
    "activation_backward(Tensor grad, Tensor x, Tensor? bias, bool quick, bool want_x, bool want_bias, str backend) "
    "-> (Tensor dx, Tensor d_bias)",
    triton=_launch_backward,
    reference=reference.backward,
    fake=_fake_backward,
)


class _Activation(torch.autograd.Function):
    """Keeps x alone."""

    @staticmethod
    def forward(ctx, x, bias, quick, backend):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, bias)
        ctx.quick, ctx.backend = quick, backend
        return forward(x, bias, quick, backend)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        refuse_double_backward("quick_gelu" if ctx.quick else "gelu")
        x, bias = ctx.saved_tensors
        want_x, want_bias = ctx.needs_input_grad[:2]
        dx, d_bias = backward(grad, x, bias, ctx.quick, want_x, want_bias, ctx.backend)
        return dx if want_x else None, d_bias.to(bias.dtype) if want_bias else None, None, None


def quick_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., C], bias [C] -> [..., C]."""
    return _Activation.apply(x, bias, True, "triton")


def gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., C], bias [C] -> [..., C]."""
    return _Activation.apply(x, bias, False, "triton")


def refuses(x: Tensor, bias: Tensor | None) -> str | None:
    """Why the kernels cannot serve, or None."""
    return launch.refuses(x) or (None if bias is None else launch.refuses(bias))


def declines(x: Tensor, bias: Tensor | None) -> str | None:
    """Why the kernels are not taken unasked, or None."""
    return launch.declines(x)
