"""`accelerate` for the towers of open_clip."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from farl_kernels.integrations.swap import Fused, Report, check_backend, check_model, origin, restore, swap

__all__ = ["accelerate", "restore"]

EXAMPLE = "open_clip.create_model('ViT-B-16')"


def accelerate(model: nn.Module, *, backend: str | None = None) -> Report:
    """Run the attention, LayerNorms, MLPs and residual adds of open_clip's towers on fused ops, in place.

    Known: `ResidualAttentionBlock` in image and text towers, QuickGELU and GELU, LayerScale, batch first or not. The
    causal mask of a text tower is read once, here, and known again by its identity; any other mask (padding, CoCa's
    class token) runs the original attention. A timm image tower is accelerated as by `integrations.timm`. Parameters,
    state-dict keys and results stay (to rounding; in 16 bits biases are added to rounded products). Patch
    dropout keeps its distribution, but draws other numbers, on the device.

    Args:
        model: a model of open_clip, one of its towers, or any module that holds one.
        backend: for every op called, as in the ops themselves; ops without it refuse. None = the fastest that fits.

    Returns:
        What was replaced and what was left, with the reasons; ``report.undo()`` or ``restore(model)`` takes it back.

    Raises:
        ValueError: there are no open_clip modules in it, or `backend` is the backend of no op.
        ImportError: open_clip is not installed.
    """
    check_backend(backend)
    model = check_model("open_clip", model, EXAMPLE)
    report = Report(f"accelerate (open_clip {type(model).__name__})", _model=model, _undo=restore)
    rules = _rules()
    if any(origin(module).__module__.startswith("timm.") for module in model.modules()):
        from farl_kernels.integrations import timm

        rules = {**timm.rules(), **rules}
    swap(model, rules, report, backend)
    _recognise_masks(model, report)
    return report


def _rules() -> dict[type[nn.Module], Any]:
    from open_clip import transformer

    from farl_kernels.integrations import open_clip_modules as fused
    from farl_kernels.integrations.torch_modules import TORCH_RULES, FusedNorm, layer_norm_rule

    def block(block: Any) -> type[Fused] | str:
        if hasattr(block, "ln_1_kv"):
            return "it attends the tokens of another tower"
        return fused.ResidualAttentionBlock if isinstance(block.ln_2, FusedNorm) else "its ln_2 is not fused"

    return {
        **TORCH_RULES,
        transformer.LayerNorm: layer_norm_rule(fused.LayerNorm),
        transformer.LayerNormFp32: layer_norm_rule(fused.LayerNormFp32),
        transformer.QuickGELU: fused.QuickGELU,
        transformer.PatchDropout: fused.PatchDropout,
        transformer.ResidualAttentionBlock: block,
        transformer.CustomResidualAttentionBlock: "its attention may scale or normalise queries, keys and heads",
        transformer.Attention: "it may scale or normalise queries, keys and heads",
        transformer.AttentionalPooler: "queries of its own, of another length",
    }


def _recognise_masks(model: nn.Module, report: Report) -> None:
    """Tell the blocks of each tower whether the mask that they will be given is the causal one."""
    from farl_kernels.integrations.open_clip_modules import CausalMask, FusedResidualAttentionBlock

    for name, owner in model.named_modules():
        mask, tower = owner._buffers.get("attn_mask"), getattr(owner, "transformer", None)
        if mask is None or tower is None:
            continue
        blocks = [block for block in tower.modules() if isinstance(block, FusedResidualAttentionBlock)]
        where = f"{name}.attn_mask" if name else "attn_mask"
        if not is_causal_mask(mask):
            report.notes.append(f"{where} is not a causal mask: attention under it runs as before")
        elif getattr(owner, "use_pad_mask", False) or getattr(owner, "cls_emb", None) is not None:
            report.notes.append(f"{where} is combined with a padding mask in every call: that attention runs as before")
        else:
            for block in blocks:
                block.causal_mask = CausalMask(owner, "attn_mask")
            if blocks:
                report.notes.append(f"{where} is the causal mask of {len(blocks)} blocks, known by identity")


def is_causal_mask(mask: torch.Tensor) -> bool:
    """Whether an additive mask [N, N] is 0 up to the diagonal and -inf above; reads the values, so not for a step."""
    if mask.ndim != 2 or mask.shape[0] != mask.shape[1] or mask.is_meta:
        return False
    return torch.equal(mask, torch.full_like(mask, float("-inf")).triu(1))
