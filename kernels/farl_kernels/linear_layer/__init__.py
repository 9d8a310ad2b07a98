"""A linear layer that computes in 16 bits with float32 weights, without autocast."""

from farl_kernels.linear_layer.op import LINEAR, linear

__all__ = ["LINEAR", "linear"]
