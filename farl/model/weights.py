"""Loading of weights: OpenAI CLIP's layout, FaRL's (the same names with a masked branch), and our own checkpoints."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farl.model.config import MODELS, Activation, MimConfig, ModelConfig, TextConfig, VisionConfig
from farl.model.farl import FaRL
from farl.model.weight_files import read_weights

logger = logging.getLogger(__name__)

HEAD_WIDTH = 64
# Plain numbers beside the weights in the archives of OpenAI's CLIP (clip/model.py, build_model).
CLIP_CONSTANTS = ("input_resolution", "context_length", "vocab_size")
MIM_KEYS = ("visual.mask_token", "visual.lm_transformer.*", "visual.ln_lm.*", "visual.lm_head.*")

_WRAPPERS = ("state_dict", "model", "model_state_dict")
_PREFIXES = ("module.", "_orig_mod.")


def load_pretrained(
    source: str | Path | Mapping[str, Any],
    *,
    activation: Activation | None = None,
    vision_heads: int | None = None,
    text_heads: int | None = None,
    ignore: Sequence[str] = (),
) -> FaRL:
    """A model in fp32 on the CPU, in evaluation mode, with sizes taken from the weights.

    Strict: every parameter must be in the file and every entry of the file must be a parameter, except for those that
    `ignore` names and for the constants in OpenAI's files (`CLIP_CONSTANTS`). Nothing in the file is executed.

    Args:
        source: a .pt, .pth or .safetensors file, a checkpoint of a training run (or the run's folder, for its latest),
            or a state dict; a dict may be wrapped as {"state_dict": ...} and its names may begin with "module.".
        activation: of the MLPs; None takes what a training checkpoint or an exported .safetensors says, else QuickGELU,
            as in CLIP and FaRL.
        vision_heads, text_heads: None takes what the file says, likewise, else those of the named model with a tower of
            that width (H/14 has 16 heads of 80), else width / 64.
        ignore: names, or patterns such as those of `MIM_KEYS`, of entries to leave out.

    A layout with the masked branch is taken for FaRL's, and its LayerNorm for FaRL's; else both are CLIP's.

    Raises:
        ValueError: not such a file, or names or shapes that do not fit; all misfits are in the message.
        OSError: the file cannot be read.
    """
    name = str(source) if isinstance(source, str | Path) else "the state dict"
    content = read_weights(Path(source)) if isinstance(source, str | Path) else source
    weights, recorded = _unwrap(content, name)
    weights = {key: value for key, value in weights.items() if not _matches(key, (*ignore, *CLIP_CONSTANTS))}
    if recorded is not None:
        config = _override(recorded, activation, vision_heads, text_heads, without_mim=not _has_mim(weights))
    else:
        config = _infer_config(weights, name, activation or "quick_gelu", vision_heads, text_heads)
    with torch.device("meta"):
        model = FaRL(config)
    _check_fit(model, weights, name)
    if recorded is None and activation is None:
        logger.warning("%s does not say its activation: QuickGELU assumed, as in CLIP and FaRL", name)
    model.to_empty(device="cpu")
    model.load_state_dict({key: value.float() for key, value in weights.items()})
    return model.eval()


def read_model_config(content: Mapping[str, Any]) -> ModelConfig | None:
    """`ModelConfig.to_dict()` as it lies in a training checkpoint, or None where there is none."""
    for key in ("model_config", "config"):
        found = content.get(key)
        if isinstance(found, Mapping) and "embed_dim" in found:
            return ModelConfig.from_dict(found)
    return None


def _unwrap(content: Mapping[str, Any], name: str) -> tuple[dict[str, Tensor], ModelConfig | None]:
    config = read_model_config(content)
    for wrapper in _WRAPPERS:
        inner = content.get(wrapper)
        if isinstance(inner, Mapping):
            content = inner
            break
    weights: dict[str, Any] = dict(content)
    for prefix in _PREFIXES:
        if weights and all(key.startswith(prefix) for key in weights):
            weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    wrong = [key for key, value in weights.items() if not isinstance(value, Tensor) and key not in CLIP_CONSTANTS]
    if wrong or not weights:
        raise ValueError(f"{name} is not a dict of weights: {_some(wrong) if wrong else 'it is empty'}")
    return weights, config


def _infer_config(
    weights: Mapping[str, Tensor], name: str, activation: Activation, vision_heads: int | None, text_heads: int | None
) -> ModelConfig:
    """Sizes from shapes, after openai/CLIP `clip/model.py`, build_model."""
    telling = {
        "visual.conv1.weight": 4,
        "visual.positional_embedding": 2,
        "visual.proj": 2,
        "visual.transformer.resblocks.0.mlp.c_fc.weight": 2,
        "positional_embedding": 2,
        "token_embedding.weight": 2,
        "text_projection": 2,
        "transformer.resblocks.0.mlp.c_fc.weight": 2,
    }
    if _has_mim(weights):
        telling |= {"visual.lm_head.weight": 2, "visual.lm_transformer.resblocks.0.mlp.c_fc.weight": 2}
    missing = [key for key in telling if key not in weights]
    if missing:
        raise ValueError(f"{name} is not in CLIP's or FaRL's layout: missing {_some(missing)}")
    for key, dimensions in telling.items():
        if weights[key].ndim != dimensions:
            raise ValueError(f"{name}: {key} has shape {list(weights[key].shape)}, wanted {dimensions} dimensions")
    shape = {key: tuple(weights[key].shape) for key in telling}

    width, _, _, patch = shape["visual.conv1.weight"]
    rows = shape["visual.positional_embedding"][0]
    side = math.isqrt(rows - 1)
    if side * side != rows - 1:
        raise ValueError(f"{name}: visual.positional_embedding has {rows} rows, which is not 1 + a square of patches")
    text_width = shape["token_embedding.weight"][1]
    mim = None
    if _has_mim(weights):
        mim = MimConfig(_layers(weights, "visual.lm_transformer."), shape["visual.lm_head.weight"][0])
    return ModelConfig(
        embed_dim=shape["visual.proj"][1],
        vision=VisionConfig(
            image_size=side * patch,
            patch_size=patch,
            width=width,
            layers=_layers(weights, "visual.transformer."),
            heads=vision_heads or _default_heads(width, "vision", name),
            mlp_ratio=shape["visual.transformer.resblocks.0.mlp.c_fc.weight"][0] / width,
        ),
        text=TextConfig(
            width=text_width,
            layers=_layers(weights, "transformer."),
            heads=text_heads or _default_heads(text_width, "text", name),
            context_length=shape["positional_embedding"][0],
            vocab_size=shape["token_embedding.weight"][0],
            mlp_ratio=shape["transformer.resblocks.0.mlp.c_fc.weight"][0] / text_width,
        ),
        mim=mim,
        activation=activation,
        layer_norm_cast="after" if mim is None else "before",
    )


def _override(
    config: ModelConfig,
    activation: Activation | None,
    vision_heads: int | None,
    text_heads: int | None,
    *,
    without_mim: bool,
) -> ModelConfig:
    values = config.to_dict()
    values["activation"] = activation or config.activation
    values["vision"]["heads"] = vision_heads or config.vision.heads
    values["text"]["heads"] = text_heads or config.text.heads
    if without_mim:
        values["mim"] = None
    return ModelConfig.from_dict(values)


def _check_fit(model: FaRL, weights: Mapping[str, Tensor], name: str) -> None:
    wanted = model.state_dict()
    missing = [key for key in wanted if key not in weights]
    unexpected = [key for key in weights if key not in wanted]
    misshapen = [
        f"{key} {list(weights[key].shape)} instead of {list(value.shape)}"
        for key, value in wanted.items()
        if key in weights and weights[key].shape != value.shape
    ]
    problems = [
        f"{kind} {_some(keys)}"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of the wrong shape", misshapen))
        if keys
    ]
    if problems:
        raise ValueError(f"{name} does not fit: {'; '.join(problems)} (unwanted entries can be named in `ignore`)")


def _layers(weights: Mapping[str, Tensor], prefix: str) -> int:
    """1 + the largest block number; a gap shows up as missing keys."""
    pattern = re.compile(re.escape(prefix) + r"resblocks\.(\d+)\.")
    return 1 + max(int(match.group(1)) for key in weights if (match := pattern.match(key)))


def _default_heads(width: int, tower: str, name: str) -> int:
    for config in MODELS.values():
        if config.vision.width == width:
            return config.vision.heads
        if config.text.width == width:
            return config.text.heads
    if width % HEAD_WIDTH:
        raise ValueError(f"{name}: width {width} is not a multiple of {HEAD_WIDTH}: give {tower}_heads")
    return width // HEAD_WIDTH


def _has_mim(weights: Mapping[str, Tensor]) -> bool:
    return any(_matches(key, MIM_KEYS) for key in weights)


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _some(keys: Sequence[str]) -> str:
    """All of them: a message that hides names is no help, and blocks come in dozens at worst."""
    return ", ".join(keys)
