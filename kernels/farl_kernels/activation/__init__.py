"""QuickGELU and GELU, with the bias of the layer before."""

from __future__ import annotations

from farl_kernels.activation.op import gelu, quick_gelu

__all__ = ["gelu", "quick_gelu"]
