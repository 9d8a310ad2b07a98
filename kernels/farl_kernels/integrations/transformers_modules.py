"""Fused forwards of CLIP's and ViT's modules in transformers, and an attention implementation of our own.

The classes are joined with the library's when they are asked for. Attention goes through the library's own door: a
function registered under `NAME` in its attention interface, with the function that makes its masks. They are
registered with the first class that is asked for; an unpickled model asks for its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from farl_kernels import gelu, masked_attention
from farl_kernels.integrations.swap import Fused, fused_class
from farl_kernels.integrations.torch_modules import (
    FusedActivation,
    QuickGELUForward,
    add_norm,
    linear_activation,
)

NAME = "farl_kernels"
# Arguments of the interface that change nothing here; with any other that is set, the call is PyTorch's.
_HARMLESS = {"output_attentions", "output_hidden_states", "return_dict", "use_cache", "position_ids"}


class FusedGELUActivation(FusedActivation):
    """gelu."""

    home = "transformers.activations:GELUActivation"
    op = staticmethod(gelu)

    def forward(self, input: Tensor) -> Tensor:
        return self.activate(input)


class FusedQuickGELUActivation(QuickGELUForward):
    """quick_gelu."""

    home = "transformers.activations:QuickGELUActivation"

    def forward(self, input: Tensor) -> Tensor:
        return self.activate(input)


class FusedCLIPMLP(Fused):
    """linear + activation with the bias inside."""

    home = "transformers.models.clip.modeling_clip:CLIPMLP"

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(linear_activation(self.fc1, self.activation_fn, hidden_states))


class FusedViTMLP(Fused):
    """linear + activation with the bias inside."""

    home = "transformers.models.vit.modeling_vit:ViTMLP"

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(linear_activation(self.fc1, self.activation_fn, hidden_states))


class FusedCLIPEncoderLayer(Fused):
    """residual add + LayerNorm in one op."""

    home = "transformers.models.clip.modeling_clip:CLIPEncoderLayer"

    def forward(self, hidden_states: Tensor, attention_mask: Tensor, **kwargs: Any) -> Tensor:
        normalised, _ = add_norm(self.layer_norm1, hidden_states, None)
        attended, _ = self.self_attn(hidden_states=normalised, attention_mask=attention_mask, **kwargs)
        normalised, residual = add_norm(self.layer_norm2, attended, hidden_states)
        return residual + self.mlp(normalised)


class FusedViTLayer(Fused):
    """residual add + LayerNorm in one op."""

    home = "transformers.models.vit.modeling_vit:ViTLayer"

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        normalised, _ = add_norm(self.layernorm_before, hidden_states, None)
        attended, _ = self.attention(normalised, attention_mask, **kwargs)
        normalised, residual = add_norm(self.layernorm_after, self.dropout(attended), hidden_states)
        return self.dropout(self.mlp(normalised)) + residual


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention interface: query, key, value [B, H, N, D] -> [B, N, H, D].

    `attention_mask` is what :func:`mask` made: a key mask [B, N] beside `is_causal`, [B, 1, 1, N] without it; or a
    mask [B, 1, M, N] of the caller, for which PyTorch's attention runs, as for dropout and options not known here.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    key_mask = None
    if attention_mask is not None and attention_mask.ndim == 2:
        key_mask = attention_mask
    elif attention_mask is not None and attention_mask.shape[1:3] == (1, 1) and attention_mask.dtype == torch.bool:
        key_mask, causal = attention_mask[:, 0, 0], False
    options = any(value is not None and name not in _HARMLESS for name, value in kwargs.items())
    known = attention_mask is None or key_mask is not None
    if known and not dropout and not options and key.shape[:2] == query.shape[:2]:
        backend = getattr(module, "fused_backend", None)
        out = masked_attention(query, key, value, causal=causal, key_mask=key_mask, scale=scaling, backend=backend)
        return out.transpose(1, 2), None
    if attention_mask is not None and attention_mask.ndim == 2:
        lower = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        attention_mask = attention_mask[:, None, None, :] & lower if causal else attention_mask[:, None, None, :]
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
    )


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask for :func:`attention`: None or a key mask where it is causal or full, else the one for PyTorch.

    No value is read, where the masks of "sdpa" ask the device whether there is any padding.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

    mask_function = mask_function or causal_mask_function
    causal = mask_function is causal_mask_function
    padding_fits = attention_mask is None or tuple(attention_mask.shape) == (batch_size, kv_length)
    if (
        (causal or mask_function is bidirectional_mask_function)
        and isinstance(q_offset, int)
        and (q_length, q_offset, kv_offset, local_size) == (kv_length, 0, 0, None)
        and padding_fits
    ):
        if attention_mask is None:
            return None
        attention_mask = attention_mask.to(torch.bool)
        return attention_mask if causal else attention_mask[:, None, None, :]
    # PyTorch's function would take the mask that is left out for a causal one, and reads values to leave it out.
    kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size, **kwargs
    )


def __getattr__(name: str) -> type[Fused]:
    made = fused_class(__name__, name)

    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, mask)
    return made
