"""LayerNorm by NVIDIA's apex, for those who have it. Never imported unless asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from farl_kernels.layer_norm.torch_fused import add_layer_norm_by

_HOW = "NVIDIA's apex is built from source (https://github.com/NVIDIA/apex); the `apex` on PyPI is another package"


@functools.cache
def load() -> tuple[Callable[..., Tensor] | None, str | None]:
    """apex's fused_layer_norm_affine and None, or None and why it cannot be used here: found out by a trial call."""
    try:
        from apex.normalization.fused_layer_norm import (  # pyrefly: ignore[missing-import]
            fused_layer_norm_affine,
        )

        trial = torch.ones(2, 64, device="cuda")
        fused_layer_norm_affine(trial, trial[0], trial[0], (64,), 1e-5)
    except Exception as error:  # a build for another torch or GPU fails in many ways, all of which mean "not here"
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        return None, f"apex does not run here ({cause}); {_HOW}"
    return fused_layer_norm_affine, None


def refuses(x: Tensor, *args: Any, **kwargs: Any) -> str | None:
    """Why apex cannot serve, or None."""
    reason = load()[1]
    if reason is None and not x.is_cuda:
        return f"apex runs on CUDA tensors, x is on {x.device}"
    return reason


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    fused = load()[0]
    if fused is None or weight is None or bias is None:  # apex fuses the whole affine only
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    return fused(x, weight, bias, (x.shape[-1],), eps)


add_layer_norm = add_layer_norm_by(_layer_norm)
