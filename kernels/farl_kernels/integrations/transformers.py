"""`accelerate` for CLIP and ViT of transformers."""

from __future__ import annotations

from typing import Any

from torch import nn

from farl_kernels.integrations import swap as _swap
from farl_kernels.integrations.swap import Change, Fused, Left, Report, check_backend, check_model, swap, top_modules

__all__ = ["accelerate", "restore"]

EXAMPLE = "transformers.CLIPModel or transformers.ViTModel"
OLDEST = 5


def accelerate(model: nn.Module, *, backend: str | None = None) -> Report:
    """Run the attention, LayerNorms, MLPs and residual adds of transformers' CLIP and ViT on fused ops, in place.

    Attention is set by the library's attention interface where it was "sdpa": causal and padding masks are fused and
    never read by the host, masks of your own and attention dropout run PyTorch's. Models on "eager" keep their
    attention, which returns the weights. Parameters, state-dict keys and results stay (to rounding; in 16 bits
    biases are added to rounded products). Saved configurations do not name the fused attention.

    Args:
        model: CLIPModel, CLIPVisionModel, CLIPTextModel, ViTModel, one of them with a head, or what holds one.
        backend: for every op called, as in the ops themselves; ops without it refuse. None = the fastest that fits.

    Returns:
        What was replaced and what was left, with the reasons; ``report.undo()`` or ``restore(model)`` takes it back.

    Raises:
        ValueError: there are no transformers modules in it, or `backend` is the backend of no op.
        ImportError: transformers is not installed, or is older than 5.
    """
    check_backend(backend)
    model = check_model("transformers", model, EXAMPLE)
    import transformers

    if int(transformers.__version__.partition(".")[0]) < OLDEST:
        raise ImportError(f"accelerate: transformers is {transformers.__version__}, want {OLDEST} or newer")
    report = Report(f"accelerate (transformers {type(model).__name__})", _model=model, _undo=restore)
    swap(model, _rules(), report, backend)
    _set_attention(model, report, backend)
    return report


def restore(model: nn.Module) -> int:
    """Give every accelerated module its own class back, and the models their attention; the number of modules changed.

    Raises:
        ValueError: another tool has changed the class of an accelerated module since.
    """
    from farl_kernels.integrations.transformers_modules import NAME

    changed = _swap.restore(model)
    ours = [module for _, module in _attentions(model) if module.config._attn_implementation == NAME]
    for part in _known_models(model):
        if part.config._attn_implementation == NAME:
            part.set_attn_implementation("sdpa")
    for module in ours:
        module.__dict__.pop("fused_backend", None)
    return changed + len(ours)


def _rules() -> dict[type[nn.Module], Any]:
    from transformers import activations
    from transformers.models.clip import modeling_clip
    from transformers.models.vit import modeling_vit

    from farl_kernels.integrations import transformers_modules as fused
    from farl_kernels.integrations.torch_modules import TORCH_RULES, FusedActivation, FusedNorm

    def mlp(kind: type[Fused]) -> Any:
        def rule(module: Any) -> type[Fused] | str:
            activation = module.activation_fn
            return kind if isinstance(activation, FusedActivation) else f"there is no fused {type(activation).__name__}"

        return rule

    def layer(kind: type[Fused], norm: str) -> Any:
        def rule(module: Any) -> type[Fused] | str:
            return kind if isinstance(getattr(module, norm), FusedNorm) else f"its {norm} is not fused"

        return rule

    return {
        **TORCH_RULES,
        activations.GELUActivation: fused.GELUActivation,
        activations.QuickGELUActivation: fused.QuickGELUActivation,
        modeling_clip.CLIPMLP: mlp(fused.CLIPMLP),
        modeling_vit.ViTMLP: mlp(fused.ViTMLP),
        modeling_clip.CLIPEncoderLayer: layer(fused.CLIPEncoderLayer, "layer_norm2"),
        modeling_vit.ViTLayer: layer(fused.ViTLayer, "layernorm_after"),
        # Not by class, but by the attention interface.
        modeling_clip.CLIPAttention: lambda module: None,
        modeling_vit.ViTAttention: lambda module: None,
    }


def _known_models(model: nn.Module) -> list[Any]:
    from transformers.models.clip.modeling_clip import CLIPPreTrainedModel
    from transformers.models.vit.modeling_vit import ViTPreTrainedModel

    return list(top_modules(model, (CLIPPreTrainedModel, ViTPreTrainedModel)))


def _attentions(model: nn.Module) -> list[tuple[str, Any]]:
    from transformers.models.clip.modeling_clip import CLIPAttention
    from transformers.models.vit.modeling_vit import ViTAttention

    return [(name, module) for name, module in model.named_modules() if type(module) in (CLIPAttention, ViTAttention)]


def _set_attention(model: nn.Module, report: Report, backend: str | None) -> None:
    """Choose our attention in the models of known kinds that run "sdpa", and note every attention in the report."""
    from farl_kernels.integrations.transformers_modules import NAME

    for part in _known_models(model):
        if all(_why_not(module) is None for _, module in _attentions(part)):
            part.set_attn_implementation(NAME)
    for name, module in _attentions(model):
        kind = type(module).__name__
        if module.config._attn_implementation == NAME:
            report.replaced.append(Change(name, kind, "masked_attention"))
            if backend is not None:
                module.fused_backend = backend
        else:
            reason = _why_not(module) or "another attention of this model is left, and they share the setting"
            report.left.append(Left(name, kind, reason))


def _why_not(attention: Any) -> str | None:
    """Why an attention is left."""
    from farl_kernels.integrations.transformers_modules import NAME

    chosen = attention.config._attn_implementation
    if chosen == "eager":
        return "attn_implementation is 'eager', which returns the weights; it can be had with 'sdpa'"
    if chosen not in ("sdpa", NAME):
        return f"attn_implementation {chosen!r} was chosen; it can be had with 'sdpa'"
    # CLIP and ViT name it differently.
    dropout = attention.dropout if hasattr(attention, "dropout") else attention.attention_dropout
    return "attention dropout > 0" if dropout > 0 else None
