"""Parameter names and shapes of the same model in other libraries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from farl.model.farl import FaRL

Format = Literal["openai-clip", "open-clip", "timm", "transformers"]
FORMATS: tuple[str, ...] = get_args(Format)

_MIM_PREFIXES = ("visual.mask_token", "visual.lm_transformer.", "visual.ln_lm.", "visual.lm_head.")

# timm `VisionTransformer`; after timm/models/vision_transformer.py, _convert_openai_clip.
_TIMM_NAMES = (
    ("conv1.weight", "patch_embed.proj.weight"),
    ("positional_embedding", "pos_embed"),
    ("class_embedding", "cls_token"),
    ("transformer.resblocks.", "blocks."),
    ("attn.in_proj_", "attn.qkv."),
    ("attn.out_proj.", "attn.proj."),
    ("mlp.c_fc.", "mlp.fc1."),
    ("mlp.c_proj.", "mlp.fc2."),
    ("ln_pre.", "norm_pre."),
    ("ln_post.", "norm."),
    ("ln_1.", "norm1."),
    ("ln_2.", "norm2."),
)
# transformers `CLIPModel`; "pre_layrnorm" is spelt so there.
_TRANSFORMERS_NAMES = (
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
    ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.ln_pre.", "vision_model.pre_layrnorm."),
    ("visual.ln_post.", "vision_model.post_layernorm."),
    ("visual.proj", "visual_projection.weight"),
    ("transformer.resblocks.", "text_model.encoder.layers."),
    ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final.", "text_model.final_layer_norm."),
    ("text_projection", "text_projection.weight"),
)
_TRANSFORMERS_PARTS = (
    (".attn.", ".self_attn."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
)


def export_state_dict(model: FaRL, format: Format, *, drop_mim: bool = False) -> dict[str, Tensor]:
    """The weights of `model` under the names of another library; copies, contiguous, on the CPU.

    Args:
        format: "openai-clip": the names of the released FaRL files, masked branch included, for `load_pretrained` and
            a `clip` model's load_state_dict(strict=False); with `drop_mim` exactly OpenAI CLIP's.
            "open-clip": open_clip's `CLIP`. "timm": `VisionTransformer` as in vit_base_patch16_clip_quickgelu_224, the
            image tower alone, with the projection as `head`. "transformers": `CLIPModel`.
        drop_mim: leave out the masked branch; the formats but the first never have it.
    """
    weights = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in model.state_dict().items()}
    if format == "openai-clip" and not drop_mim:
        return weights
    weights = {key: value for key, value in weights.items() if not key.startswith(_MIM_PREFIXES)}
    convert: Mapping[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
        "openai-clip": dict,
        "open-clip": dict,
        "timm": _to_timm,
        "transformers": _to_transformers,
    }
    if format not in convert:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, not {format!r}")
    return convert[format](weights)


def _to_timm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    converted: dict[str, Tensor] = {}
    for key, value in weights.items():
        if not key.startswith("visual."):
            continue
        name = key.removeprefix("visual.")
        if name == "proj":
            # timm's classifier always has a bias.
            converted["head.weight"] = value.t().contiguous()
            converted["head.bias"] = torch.zeros(value.shape[1], dtype=value.dtype)
            continue
        name = _replace(name, _TIMM_NAMES)
        if name == "pos_embed":
            value = value[None]
        elif name == "cls_token":
            value = value[None, None]
        converted[name] = value
    return converted


def _to_transformers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    converted: dict[str, Tensor] = {}
    for key, value in weights.items():
        if key in ("visual.proj", "text_projection"):
            value = value.t().contiguous()
        old = next((old for old, _ in _TRANSFORMERS_NAMES if key.startswith(old)), None)
        name = key if old is None else dict(_TRANSFORMERS_NAMES)[old] + key.removeprefix(old)
        name = _replace(name, _TRANSFORMERS_PARTS)
        if ".in_proj_" in name:
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                converted[name.replace("in_proj_", f"{part}_proj.")] = piece.contiguous()
        else:
            converted[name] = value
    return converted


def _replace(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for old, new in pairs:
        name = name.replace(old, new)
    return name
