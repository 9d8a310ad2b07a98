"""Fused ops for vision transformers and CLIP-like training.

Every op is a plain function on tensors, right in float64 through its reference backend, with a `backend` argument that
is None (the fastest that fits), "reference", or a name from its own list. `use_backend` sets it for a whole model.
"""

from farl_kernels.activation import gelu, quick_gelu
from farl_kernels.attention import (
    MaskedAttention,
    masked_attention,
    masked_attention_packed,
    single_query_attention,
)
from farl_kernels.contrastive import ContrastiveLoss, contrastive_loss, gather_features
from farl_kernels.dispatch import use_backend
from farl_kernels.layer_norm import add_layer_norm
from farl_kernels.linear_layer import linear
from farl_kernels.patch_masking import mask_patches, patchify, sample_block_masks
from farl_kernels.token_loss import masked_token_cross_entropy

__all__ = [
    "ContrastiveLoss",
    "MaskedAttention",
    "add_layer_norm",
    "contrastive_loss",
    "gather_features",
    "gelu",
    "linear",
    "mask_patches",
    "masked_attention",
    "masked_attention_packed",
    "masked_token_cross_entropy",
    "patchify",
    "quick_gelu",
    "sample_block_masks",
    "single_query_attention",
    "use_backend",
]
