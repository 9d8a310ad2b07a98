"""Registration of the raw ops with PyTorch: `torch.ops.farl_kernels.<name>`, opaque to the compiler.

A raw op is functional (or says in its schema what it writes), has no autograd of its own, and takes the backend as its
last argument: "triton" runs the launcher, "reference" the plain PyTorch version, each on CPU and CUDA tensors. The
public ops wrap raw ones in one `torch.autograd.Function`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("farl_kernels", "DEF")


def define(
    schema: str, *, triton: Callable[..., Any], reference: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Register a raw op and return it (the default overload).

    Args:
        schema: ``name(Tensor x, ..., str backend) -> ...``; the last argument is the backend.
        triton: the launcher, called with all arguments but the backend. Import kernels inside it.
        reference: the same in plain PyTorch.
        fake: gets all arguments, the backend too, and returns empty tensors of the right shapes, dtypes and strides.
    """
    name = schema.partition("(")[0]

    def run(*args: Any) -> Any:
        *inputs, backend = args
        return (triton if backend == "triton" else reference)(*inputs)

    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"farl_kernels::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.farl_kernels, name).default


def refuse_double_backward(op: str) -> None:
    """Raise if the gradient being taken is itself to be differentiated: its formula is not recorded.

    (`once_differentiable` would drop the terms without a word where the saved tensors do not require grad.)
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f'{op}: for gradients of gradients use backend="reference"')
