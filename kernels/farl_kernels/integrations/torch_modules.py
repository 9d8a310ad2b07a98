"""Fused classes of PyTorch's own modules, and the pieces that the blocks of all libraries are made of.

The docstring of a fused class starts with the ops that it calls; reports show that sentence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from farl_kernels import add_layer_norm, gelu, masked_attention_packed, quick_gelu
from farl_kernels.integrations.swap import Fused, untouched
from farl_kernels.precision import autocast_dtype

# Linear layers whose forward is F.linear(x, weight, bias). Adapters, quantised and parametrised ones have other types.
_LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)


def is_linear(module: nn.Module) -> bool:
    return type(module) in _LINEAR


def product(linear: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """`linear(x)` without its bias, and the bias, for an op that adds and differentiates it on the way.

    A layer that is more than nn.Linear is called, and no bias is left to add.
    """
    if is_linear(linear) and untouched(linear):
        return F.linear(x, linear.weight), linear.bias  # type: ignore[arg-type]
    return linear(x), None


class FusedNorm(Fused):
    """Base of the fused LayerNorms, for which :func:`add_norm` takes one op."""

    # Whether the original returns the dtype of x under autocast too.
    keeps_dtype = False

    def normalise(self, x: Tensor) -> Tensor:
        """The forward of all of them."""
        if x.shape[-1:] != self.normalized_shape or (not self.keeps_dtype and _widened(x)):
            return self.original.forward(self, x)
        return self.add(x, None, None, None)[0]

    def add(
        self, x: Tensor, residual: Tensor | None, x_bias: Tensor | None, row_scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        # PyTorch's layer_norm applies weight and bias in float32 and rounds once, whatever the dtype of x.
        return add_layer_norm(
            x,
            residual,
            self.weight,
            self.bias,
            eps=self.eps,
            affine_dtype=torch.float32,
            x_bias=x_bias,
            row_scale=row_scale,
            backend=self.fused_backend,
        )


def _widened(x: Tensor) -> bool:
    """Whether autocast makes layer_norm return float32 for x."""
    return x.dtype in (torch.float16, torch.bfloat16) and autocast_dtype(x.device) is not None


def add_norm(
    norm: nn.Module,
    x: Tensor,
    residual: Tensor | None,
    *,
    x_bias: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """norm(residual + row_scale * (x + x_bias)), and that sum; in one op where `norm` is fused and has no hooks.

    Under autocast the first may be in the dtype of x instead of float32: for linear layers, which cast their input.
    """
    if isinstance(norm, FusedNorm) and untouched(norm):
        return norm.add(x, residual, x_bias, row_scale)
    if x_bias is not None:
        x = x + x_bias
    if row_scale is not None:
        x = x * row_scale.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
    if residual is not None:
        x = residual + x
    return norm(x), x


class FusedActivation(Fused):
    """Base of the fused activations; `op` takes a bias to add before."""

    op: Any

    def activate(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The forward of all of them, with the bias of the layer before."""
        return self.op(x, bias, backend=self.fused_backend)


def linear_activation(linear: nn.Module, activation: nn.Module, x: Tensor) -> Tensor:
    """activation(linear(x)), the bias added and differentiated by the activation where both are plain."""
    if isinstance(activation, FusedActivation) and untouched(activation):
        hidden, bias = product(linear, x)
        return activation.activate(hidden, bias)
    return activation(linear(x))


class Branch(Fused):
    """Base of the fused attentions: `unbiased` returns the output and the bias of the projection still to be added."""

    def unbiased(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError


def branch(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """`module(...)`, its last bias left to the caller where that spares a pass."""
    if isinstance(module, Branch) and untouched(module):
        return module.unbiased(*args, **kwargs)
    return module(*args, **kwargs), None


class LayerNorm(FusedNorm, nn.LayerNorm):
    """add_layer_norm."""

    original = nn.LayerNorm

    # Arguments keep the names that they have in the original, here and in the other fused classes.
    def forward(self, input: Tensor) -> Tensor:
        return self.normalise(input)


class GELU(FusedActivation, nn.GELU):
    """gelu."""

    original = nn.GELU
    op = staticmethod(gelu)

    def forward(self, input: Tensor) -> Tensor:
        return self.activate(input)


class QuickGELUForward(FusedActivation):
    """quick_gelu."""

    op = staticmethod(quick_gelu)


class Sequential(Fused, nn.Sequential):
    """linear + activation with the bias inside, then linear.

    Of three layers: linear, activation, linear.
    """

    original = nn.Sequential

    def forward(self, input: Tensor) -> Tensor:
        first, activation, second = self
        return second(linear_activation(first, activation, input))


class MultiheadAttention(Branch, nn.MultiheadAttention):
    """masked_attention_packed.

    For self-attention without weights wanted, with no mask, a bool key padding mask, or the `is_causal` hint.
    """

    original = nn.MultiheadAttention

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        # PyTorch takes is_causal as a statement about attn_mask, and wants both or neither.
        masks_fit = (attn_mask is not None) == is_causal and (
            key_padding_mask is None or (key_padding_mask.dtype == torch.bool and not is_causal)
        )
        if need_weights or not masks_fit or not self._serves(query, key, value):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        heads = self._heads(query, causal=is_causal, key_padding_mask=key_padding_mask)
        return F.linear(heads, self.out_proj.weight, self.out_proj.bias), None

    def unbiased(self, x: Tensor, *, causal_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Self-attention over x without the bias of `out_proj`, and that bias. The mask is None or the causal one."""
        if not self._serves(x, x, x):
            mask = None if causal_mask is None else causal_mask.to(x.dtype)
            return super().forward(x, x, x, need_weights=False, attn_mask=mask)[0], None
        return F.linear(self._heads(x, causal=causal_mask is not None), self.out_proj.weight), self.out_proj.bias

    def _serves(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        # Asked at every call: dropout may be set, and weights may be replaced by an adapter, after `accelerate`.
        return (
            query is key
            and key is value
            and query.ndim == 3
            and not query.is_nested
            and not (self.dropout and self.training)
            and is_linear(self.out_proj)
        )

    def _heads(self, x: Tensor, *, causal: bool, key_padding_mask: Tensor | None = None) -> Tensor:
        qkv = F.linear(x, self.in_proj_weight).unflatten(2, (3, self.num_heads, self.head_dim))
        bias = self.in_proj_bias
        heads = masked_attention_packed(
            qkv if self.batch_first else qkv.transpose(0, 1),
            qkv_bias=None if bias is None else bias.view(3, self.num_heads, self.head_dim),
            causal=causal,
            key_mask=None if key_padding_mask is None else ~key_padding_mask,
            backend=self.fused_backend,
        ).flatten(2)
        return heads if self.batch_first else heads.transpose(0, 1)


def layer_norm_rule(fused: type[Fused]) -> Callable[[Any], type[Fused] | str]:
    """The rule of a LayerNorm class: one normalised dimension, and weights where there is a bias."""

    def rule(norm: Any) -> type[Fused] | str:
        return fused if len(norm.normalized_shape) == 1 else "it normalises several dimensions"

    return rule


def gelu_rule(activation: nn.GELU) -> type[Fused] | str:
    return GELU if activation.approximate == "none" else "the tanh approximation has no fused op"


def multihead_attention_rule(attention: nn.MultiheadAttention) -> type[Fused] | str:
    if attention.dropout > 0:
        return "attention dropout > 0"
    if attention.in_proj_weight is None:
        return "keys and values of other widths"
    if attention.bias_k is not None or attention.add_zero_attn:
        return "it appends keys and values"
    return MultiheadAttention


def sequential_rule(layers: nn.Sequential) -> type[Fused] | str | None:
    """For linear, activation, linear; None for any other sequence."""
    found = list(layers)
    if len(found) == 3 and is_linear(found[0]) and isinstance(found[1], FusedActivation) and is_linear(found[2]):
        return Sequential
    return None


TORCH_RULES: dict[type[nn.Module], Any] = {
    nn.LayerNorm: layer_norm_rule(LayerNorm),
    nn.GELU: gelu_rule,
    nn.MultiheadAttention: multihead_attention_rule,
    nn.Sequential: sequential_rule,
}
