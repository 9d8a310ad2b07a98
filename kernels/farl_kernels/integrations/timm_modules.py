"""Fused forwards of timm's modules; the classes are joined with timm's when they are asked for."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from farl_kernels import gelu, masked_attention, masked_attention_packed
from farl_kernels.integrations.swap import Fused, fused_class, is_identity, untouched
from farl_kernels.integrations.torch_modules import (
    Branch,
    FusedActivation,
    FusedNorm,
    QuickGELUForward,
    add_norm,
    branch,
    linear_activation,
    product,
)
from farl_kernels.precision import accumulation_dtype


class FusedLayerNorm(FusedNorm):
    """add_layer_norm."""

    home = "timm.layers:LayerNorm"

    def forward(self, x: Tensor) -> Tensor:
        return self.normalise(x)


class FusedLayerNormFp32(FusedNorm):
    """add_layer_norm."""

    home = "timm.layers:LayerNormFp32"
    keeps_dtype = True

    def forward(self, x: Tensor) -> Tensor:
        return self.normalise(x)


class FusedGELU(FusedActivation):
    """gelu."""

    home = "timm.layers:GELU"
    op = staticmethod(gelu)

    def forward(self, input: Tensor) -> Tensor:
        return self.activate(input)


class FusedQuickGELU(QuickGELUForward):
    """quick_gelu."""

    home = "timm.layers.activations:QuickGELU"

    def forward(self, input: Tensor) -> Tensor:
        return self.activate(input)


class FusedMlp(Fused):
    """linear + activation with the bias inside."""

    home = "timm.layers:Mlp"

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.drop1(linear_activation(self.fc1, self.act, x)))
        return self.drop2(self.fc2(x))


class _Attention(Branch):
    """What timm's attentions share: heads, then norm, gate and projection."""

    def _projected(self, x: Tensor, **options: Any) -> Tensor | None:
        """What goes into the projection, or None where the original forward has to run."""
        if self.training and self.attn_drop.p > 0:
            return None
        # From the input, before anything else is computed: the order of the original.
        layer = getattr(self, "gate", None)  # not in every version
        gate = None if layer is None else layer(x).sigmoid()
        out = self.norm(self._heads(x, **options))
        return out if gate is None else out * gate

    def _heads(self, x: Tensor, **options: Any) -> Tensor:
        raise NotImplementedError

    def _plain(self) -> bool:
        return is_identity(self.q_norm) and is_identity(self.k_norm)

    def _packed(self, qkv: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
        shape = (3, self.num_heads, qkv.shape[-1] // (3 * self.num_heads))
        return masked_attention_packed(
            qkv.unflatten(2, shape),
            qkv_bias=None if bias is None else bias.view(shape),
            causal=causal,
            backend=self.fused_backend,
        ).flatten(2)

    def _separate(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        return masked_attention(q, k, v, causal=causal, backend=self.fused_backend).transpose(1, 2).flatten(2)

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        """[B, N, n * C] -> n tensors [B, H, N, D] of a fused projection with n = 3."""
        return x.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def _finish(self, out: Tensor, biased: bool) -> tuple[Tensor, Tensor | None]:
        """The projection, its bias left over unless `biased` or dropout comes after it."""
        if biased or (self.training and self.proj_drop.p > 0):
            return self.proj_drop(self.proj(out)), None
        return product(self.proj, out)


class FusedAttention(_Attention):
    """masked_attention."""

    home = "timm.layers:Attention"

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return self._run(x, attn_mask, is_causal, biased=True)[0]

    def unbiased(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        return self._run(x, attn_mask, is_causal, biased=False)

    def _run(self, x: Tensor, attn_mask: Tensor | None, causal: bool, biased: bool) -> tuple[Tensor, Tensor | None]:
        out = self._projected(x, causal=causal) if attn_mask is None else None
        if out is None:
            return self.original.forward(self, x, attn_mask=attn_mask, is_causal=causal), None
        return self._finish(out, biased)

    def _heads(self, x: Tensor, *, causal: bool) -> Tensor:  # type: ignore[override]
        if self._plain():
            return self._packed(*product(self.qkv, x), causal)
        q, k, v = self._split(self.qkv(x))
        return self._separate(self.q_norm(q), self.k_norm(k), v, causal)


class _RotaryAttention(_Attention):
    """Of the EVA family: projections together or apart, and rotary embedding of queries and keys."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        return self._run(x, rope, attn_mask, is_causal, biased=True)[0]

    def unbiased(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        return self._run(x, rope, attn_mask, is_causal, biased=False)

    def _run(
        self, x: Tensor, rope: Tensor | None, attn_mask: Tensor | None, causal: bool, biased: bool
    ) -> tuple[Tensor, Tensor | None]:
        out = self._projected(x, rope=rope, causal=causal) if attn_mask is None else None
        if out is None:
            return self.original.forward(self, x, rope=rope, attn_mask=attn_mask, is_causal=causal), None
        return self._finish(out, biased)

    def _heads(self, x: Tensor, *, rope: Tensor | None, causal: bool) -> Tensor:  # type: ignore[override]
        if self.qkv is not None:
            qkv, bias = self._fused_projection(x)
            if rope is None and self._plain():
                return self._packed(qkv, bias, causal)
            q, k, v = self._split(qkv if bias is None else qkv + bias)
        else:
            q, k, v = (
                linear(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
                for linear in (self.q_proj, self.k_proj, self.v_proj)
            )
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = self._rotate(q, rope).type_as(v), self._rotate(k, rope).type_as(v)
        return self._separate(q, k, v, causal)

    def _fused_projection(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return product(self.qkv, x)

    def _rotate(self, x: Tensor, rope: Tensor) -> Tensor:
        from timm.layers import apply_rot_embed_cat

        prefix, patches = x[:, :, : self.num_prefix_tokens], x[:, :, self.num_prefix_tokens :]
        return torch.cat([prefix, apply_rot_embed_cat(patches, rope, half=getattr(self, "rotate_half", False))], dim=2)


class FusedAttentionRope(_RotaryAttention):
    """masked_attention after the rotary embedding."""

    home = "timm.layers:AttentionRope"


class FusedEvaAttention(_RotaryAttention):
    """masked_attention after the rotary embedding."""

    home = "timm.models.eva:EvaAttention"

    def _fused_projection(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.q_bias is None:
            return product(self.qkv, x)
        # The weight is used directly here in the original too.
        return F.linear(x, self.qkv.weight), torch.cat((self.q_bias, self.k_bias, self.v_bias))


def _add_norm(
    norm: nn.Module, x: Tensor, x_bias: Tensor | None, residual: Tensor, drop_path: nn.Module
) -> tuple[Tensor, Tensor]:
    """norm(residual + drop_path(x + x_bias)), and that sum."""
    from timm.layers import DropPath

    row_scale = None
    if type(drop_path) is DropPath and untouched(drop_path):
        if drop_path.training and drop_path.drop_prob > 0:
            keep = 1 - drop_path.drop_prob
            # Drawn as the original draws it, so that a seed gives the same samples; divided in float32 at least.
            row_scale = x.new_empty(x.shape[0]).bernoulli_(keep).to(accumulation_dtype(x.dtype))
            row_scale = row_scale / keep if drop_path.scale_by_keep else row_scale
    elif not is_identity(drop_path):
        x, x_bias = drop_path(x if x_bias is None else x + x_bias), None
    return add_norm(norm, x, residual, x_bias=x_bias, row_scale=row_scale)


class FusedBlock(Fused):
    """residual add + LayerNorm in one op."""

    home = "timm.models.vision_transformer:Block"

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        options = {"attn_mask": attn_mask, "is_causal": is_causal}
        normalised, _ = add_norm(self.norm1, x, None)
        if is_identity(self.ls1):
            attended, bias = branch(self.attn, normalised, **options)
        else:
            attended, bias = self.ls1(self.attn(normalised, **options)), None
        normalised, x = _add_norm(self.norm2, attended, bias, x, self.drop_path1)
        return x + self.drop_path2(self.ls2(self.mlp(normalised)))


class FusedEvaBlock(Fused):
    """residual add + LayerNorm in one op."""

    home = "timm.models.eva:EvaBlock"

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        options = {"rope": rope, "attn_mask": attn_mask, "is_causal": is_causal}
        normalised, _ = add_norm(self.norm1, x, None)
        if self.gamma_1 is None:
            attended, bias = branch(self.attn, normalised, **options)
        else:
            attended, bias = self.gamma_1 * self.attn(normalised, **options), None
        normalised, x = _add_norm(self.norm2, attended, bias, x, self.drop_path1)
        out = self.mlp(normalised)
        return x + self.drop_path2(out if self.gamma_2 is None else self.gamma_2 * out)


def __getattr__(name: str) -> type[Fused]:
    return fused_class(__name__, name)
