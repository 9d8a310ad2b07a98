"""Fused forwards of open_clip's modules; the classes are joined with open_clip's when they are asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from farl_kernels.integrations.swap import Fused, fused_class, is_identity, untouched
from farl_kernels.integrations.torch_modules import (
    FusedNorm,
    MultiheadAttention,
    QuickGELUForward,
    add_norm,
)


class FusedLayerNorm(FusedNorm):
    """add_layer_norm."""

    home = "open_clip.transformer:LayerNorm"
    keeps_dtype = True

    def forward(self, x: Tensor) -> Tensor:
        return self.normalise(x)


class FusedLayerNormFp32(FusedNorm):
    """add_layer_norm."""

    home = "open_clip.transformer:LayerNormFp32"
    keeps_dtype = True

    def forward(self, x: Tensor) -> Tensor:
        return self.normalise(x)


class FusedQuickGELU(QuickGELUForward):
    """quick_gelu."""

    home = "open_clip.transformer:QuickGELU"

    def forward(self, x: Tensor) -> Tensor:
        return self.activate(x)


class CausalMask:
    """Names the buffer of a tower that was found to be the causal mask.

    A block knows the mask when it gets this very tensor, without reading it. The buffer is looked up anew at every
    call, because `.to(device)` puts another tensor in its place.
    """

    def __init__(self, owner: nn.Module, name: str) -> None:
        self.owner = owner
        self.name = name

    def is_mask(self, mask: Tensor | None) -> bool:
        return mask is not None and mask is self.owner._buffers[self.name]

    def __deepcopy__(self, memo: dict[int, Any]) -> CausalMask:
        # With its tower a block gets the tower's copy; copied alone, it stays with the tower that there is.
        return CausalMask(memo.get(id(self.owner), self.owner), self.name)


class FusedResidualAttentionBlock(Fused):
    """residual add + LayerNorm in one op."""

    home = "open_clip.transformer:ResidualAttentionBlock"
    causal_mask: CausalMask | None = None

    def forward(
        self,
        q_x: Tensor,
        k_x: Tensor | None = None,
        v_x: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        if k_x is not None or v_x is not None or hasattr(self, "ln_1_kv"):
            return self.original.forward(self, q_x, k_x, v_x, attn_mask)
        normalised, _ = add_norm(self.ln_1, q_x, None)
        attended, bias = self._attend(normalised, attn_mask)
        if not is_identity(self.ls_1):
            attended, bias = self.ls_1(attended if bias is None else attended + bias), None
        normalised, x = add_norm(self.ln_2, attended, q_x, x_bias=bias)
        return x + self.ls_2(self.mlp(normalised))

    def _attend(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        causal = self.causal_mask is not None and self.causal_mask.is_mask(mask)
        # A mask of another length is an error, which the original reports.
        length = x.shape[1 if self.attn.batch_first else 0]
        known = mask is None or (causal and len(mask) == length)
        if known and isinstance(self.attn, MultiheadAttention) and untouched(self.attn):
            return self.attn.unbiased(x, causal_mask=mask)
        return self.attention(x, attn_mask=mask), None


class FusedPatchDropout(Fused):
    """chosen and gathered on the device.

    The original draws on the CPU and indexes with CPU tensors, which stops the host in every step. The patches kept
    have the same distribution, from the random numbers of the device.
    """

    home = "open_clip.transformer:PatchDropout"

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.prob == 0.0:
            return x
        first = 1 if self.exclude_first_token else 0
        batch, tokens = x.shape[0], x.shape[1] - first
        count = max(1, int(tokens * (1 - self.prob)))
        kept = torch.rand(batch, tokens, device=x.device).topk(count, dim=1).indices + first
        if first:
            kept = torch.cat([kept.new_zeros(batch, 1), kept], dim=1)
        return x.gather(1, kept[:, :, None].expand(-1, -1, x.shape[2]))


def __getattr__(name: str) -> type[Fused]:
    return fused_class(__name__, name)
