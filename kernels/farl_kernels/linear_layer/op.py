"""The public linear layer: arguments are checked here, then the op goes to a backend."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from farl_kernels.checks import check_device, describe
from farl_kernels.dispatch import Op
from farl_kernels.linear_layer import reference, torch_fused
from farl_kernels.precision import autocast_dtype

# Backends in order of preference: the first that does not refuse a call serves it.
LINEAR = Op("linear")
LINEAR.register("torch", torch_fused.linear)
LINEAR.register("reference", reference.linear)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """``x @ weight.T + bias`` in the dtype of x, whatever that of the weight: 16-bit products, float32 parameters.

    The weight is cast for the product (and kept so for the backward pass). Its gradient is the product's own float32
    sum: under autocast it would be rounded to 16 bits and then cast. On a CPU without matrix units for bfloat16 the
    products of 16-bit numbers are taken in float32, which measures 1.3 to 1.7 times as fast there.

    Where nothing is to be cast, and under autocast, it is `torch.nn.functional.linear`.

    Args:
        x: [..., C], floating point.
        weight: [D, C], floating point; float32 for mixed precision.
        bias: [D], floating point, or None.
        backend: None (the fastest that fits), "torch", or "reference": the plain casts, differentiable any number of
            times.

    Returns:
        [..., D] in the dtype of x. Where dtypes differ, the gradient cannot itself be differentiated except with
        ``backend="reference"``; trying raises RuntimeError.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device.
    """
    op = "linear"
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"{op}: weight is {describe(weight)}, want floating point [D, C]")
    if x.ndim < 1 or not x.is_floating_point() or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: x is {describe(x)}, want floating point [..., {weight.shape[1]}], as wide as weight's rows"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise ValueError(f"{op}: bias is {describe(bias)}, want floating point [{len(weight)}], one for each row of it")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            check_device(op, name, parameter, "x", x)
    if autocast_dtype(x.device) is not None:
        return F.linear(x, weight, bias)
    return LINEAR(backend, x, weight, bias)
