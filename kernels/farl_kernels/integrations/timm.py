"""`accelerate` for vision transformers of timm."""

from __future__ import annotations

from typing import Any

from torch import nn

from farl_kernels.integrations.swap import Fused, Report, Rules, check_backend, check_model, restore, swap

__all__ = ["accelerate", "restore"]

EXAMPLE = "timm.create_model('vit_base_patch16_224')"


def accelerate(model: nn.Module, *, backend: str | None = None) -> Report:
    """Run the attention, LayerNorms, MLPs and residual adds of a timm ViT on fused ops, in place.

    Known: blocks of `VisionTransformer` (q/k norm, LayerScale, stochastic depth, causal calls) and of `Eva` (rotary
    embedding, one projection or three). A call with an attention mask runs the original attention. Parameters,
    state-dict keys, random draws and results stay (to rounding; in 16 bits biases are added to rounded products).

    Args:
        model: a timm model, or any module that holds one.
        backend: for every op called, as in the ops themselves; ops without it refuse. None = the fastest that fits.

    Returns:
        What was replaced and what was left, with the reasons; ``report.undo()`` or ``restore(model)`` takes it back.

    Raises:
        ValueError: there are no timm modules in it, or `backend` is the backend of no op.
        ImportError: timm is not installed.
    """
    check_backend(backend)
    model = check_model("timm", model, EXAMPLE)
    report = Report(f"accelerate (timm {type(model).__name__})", _model=model, _undo=restore)
    swap(model, rules(), report, backend)
    return report


def rules() -> Rules:
    """Which fused class the modules of timm take."""
    from timm import layers
    from timm.layers.activations import QuickGELU
    from timm.models import eva, vision_transformer

    from farl_kernels.integrations import timm_modules as fused
    from farl_kernels.integrations.torch_modules import TORCH_RULES, FusedActivation, FusedNorm, is_linear

    def layer_norm(norm: Any) -> type[Fused] | str:
        if getattr(norm, "_fast_norm", False):
            return "timm's fast norm computes in 16 bits under autocast"
        return fused.LayerNorm if len(norm.normalized_shape) == 1 else "it normalises several dimensions"

    def attention(kind: type[Fused]) -> Any:
        def rule(attention: Any) -> type[Fused] | str:
            if attention.attn_drop.p > 0:
                return "attention dropout > 0"
            if getattr(attention, "num_kv_groups", 1) > 1:
                return "several heads share keys and values"
            return kind

        return rule

    def mlp(module: Any) -> type[Fused] | str:
        if not isinstance(module.act, FusedActivation):
            return f"there is no fused {type(module.act).__name__}"
        return fused.Mlp if is_linear(module.fc1) else "it is made of convolutions"

    def block(kind: type[Fused]) -> Any:
        def rule(block: Any) -> type[Fused] | str:
            return (
                kind if isinstance(block.norm2, FusedNorm) else f"its norm2, {type(block.norm2).__name__}, is not fused"
            )

        return rule

    gated = "there is no fused gated MLP"
    parallel = "attention and MLP run side by side"
    return {
        **TORCH_RULES,
        layers.LayerNorm: layer_norm,
        layers.LayerNormFp32: fused.LayerNormFp32,
        layers.GELU: fused.GELU,
        layers.GELUTanh: "the tanh approximation has no fused op",
        QuickGELU: fused.QuickGELU,
        layers.Mlp: mlp,
        layers.GluMlp: gated,
        layers.SwiGLU: gated,
        layers.Attention: attention(fused.Attention),
        layers.AttentionRope: attention(fused.AttentionRope),
        eva.EvaAttention: attention(fused.EvaAttention),
        vision_transformer.Block: block(fused.Block),
        eva.EvaBlock: block(fused.EvaBlock),
        vision_transformer.ResPostBlock: "it normalises after the branch",
        eva.EvaBlockPostNorm: "it normalises after the branch",
        vision_transformer.ParallelScalingBlock: parallel,
        vision_transformer.ParallelThingsBlock: parallel,
        layers.PatchDropout: "it draws and gathers on the device already",
        layers.PatchDropoutWithIndices: "it draws and gathers on the device already",
        **_relative_position(),
    }


def _relative_position() -> dict[type[nn.Module], str]:
    from timm.models import beit, swin_transformer

    reason = "it adds a relative position bias to the scores"
    return {beit.Attention: reason, swin_transformer.WindowAttention: reason}
