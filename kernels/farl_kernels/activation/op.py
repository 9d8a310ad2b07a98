"""The public activations: arguments are checked here, then the op goes to a backend."""

from __future__ import annotations

from torch import Tensor

from farl_kernels.activation import custom_ops, reference, torch_fused
from farl_kernels.checks import check_device, describe
from farl_kernels.dispatch import Op

# Backends in order of preference: the first that does not refuse a call serves it.
QUICK_GELU = Op("quick_gelu")
QUICK_GELU.register("triton", custom_ops.quick_gelu, custom_ops.refuses, custom_ops.declines)
QUICK_GELU.register("torch", torch_fused.quick_gelu)
QUICK_GELU.register("reference", reference.quick_gelu)

GELU = Op("gelu")
GELU.register("triton", custom_ops.gelu, custom_ops.refuses, custom_ops.declines)
GELU.register("torch", torch_fused.gelu)
GELU.register("reference", reference.gelu)


def quick_gelu(x: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """CLIP's QuickGELU, z * sigmoid(1.702 z) with z = x + bias.

    Args:
        x: [..., C], bf16, fp16, fp32 or fp64.
        bias: [C], bias of the layer before, added and differentiated here; cast to the dtype of x.
        backend: None (the fastest that fits), "triton", "torch" or "reference".

    Returns:
        [..., C] in the dtype of x. The gradient cannot itself be differentiated, nor taken by torch.func, except with
        ``backend="reference"``; trying raises RuntimeError.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device.
    """
    _check("quick_gelu", x, bias)
    return QUICK_GELU(backend, x, bias)


def gelu(x: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """GELU in its exact erf form, z * Phi(z) with z = x + bias.

    Arguments, result and errors as for :func:`quick_gelu`; with ``backend="torch"`` too it is differentiable any number
    of times.
    """
    _check("gelu", x, bias)
    return GELU(backend, x, bias)


def _check(op: str, x: Tensor, bias: Tensor | None) -> None:
    if not x.is_floating_point():
        raise ValueError(f"{op}: x is {x.dtype}, want floating point")
    if bias is None:
        return
    if x.ndim < 1 or bias.shape != x.shape[-1:] or not bias.is_floating_point():
        raise ValueError(
            f"{op}: bias is {describe(bias)}, want floating point {tuple(x.shape[-1:])}, "
            f"the last dimension of x {tuple(x.shape)}"
        )
    check_device(op, "bias", bias, "x", x)
