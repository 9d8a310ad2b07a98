"""Residual addition fused with LayerNorm."""

from __future__ import annotations

from farl_kernels.layer_norm.op import add_layer_norm

__all__ = ["add_layer_norm"]
