"""Files that other libraries load: weights, and the description of the sizes beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farl.export.layouts import Format, export_state_dict
from farl.model.config import IMAGE_MEAN, IMAGE_STD, ModelConfig
from farl.model.farl import FaRL

_TIMM_ARCHITECTURE = {
    "quick_gelu": "vit_base_patch16_clip_quickgelu_224",
    "gelu": "vit_base_patch16_clip_224",
}


def export_model(model: FaRL, out: str | Path, format: Format, *, drop_mim: bool = False) -> list[Path]:
    """Write `model` for another library and return the files.

    - "openai-clip": `out` is a file, .pt (or .pth: a plain state dict) or .safetensors, whose metadata tell
      `load_pretrained` the sizes and the activation.
    - "open-clip": `out` is a folder for ``open_clip.create_model("local-dir:OUT")``.
    - "timm": a folder for ``timm.create_model("local-dir:OUT", pretrained=True)``; image tower with its projection.
    - "transformers": a folder for ``CLIPModel.from_pretrained(OUT)`` and ``CLIPImageProcessor``. Text is pooled there
      at the first token of id vocab_size - 1, which is the end-of-text token of CLIP's vocabulary.

    Args:
        drop_mim: with "openai-clip", leave out the masked branch; OpenAI's own strict loader wants that.
    """
    out = Path(out)
    weights = export_state_dict(model, format, drop_mim=drop_mim)
    if format == "openai-clip":
        if out.suffix not in (".pt", ".pth", ".safetensors"):
            raise ValueError(f"{out}: a file for openai-clip ends in .pt, .pth or .safetensors")
        out.parent.mkdir(parents=True, exist_ok=True)
        return [_write_weights(out, weights, metadata={"model_config": json.dumps(model.config.to_dict())})]
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; {format} needs a folder")
    out.mkdir(parents=True, exist_ok=True)
    if format == "open-clip":
        return [
            _write_json(out / "open_clip_config.json", open_clip_config(model.config)),
            _write_weights(out / "open_clip_model.safetensors", weights),
        ]
    if format == "timm":
        return [
            _write_json(out / "config.json", timm_config(model.config)),
            _write_weights(out / "model.safetensors", weights),
        ]
    return [
        _write_json(out / "config.json", transformers_config(model.config)),
        _write_json(out / "preprocessor_config.json", _preprocessor_config(model.config)),
        _write_weights(out / "model.safetensors", weights, metadata={"format": "pt"}),
    ]


def open_clip_config(config: ModelConfig) -> dict[str, Any]:
    """The content of open_clip_config.json."""
    vision, text = config.vision, config.text
    return {
        "model_cfg": {
            "embed_dim": config.embed_dim,
            "quick_gelu": config.activation == "quick_gelu",
            "vision_cfg": {
                "image_size": vision.image_size,
                "patch_size": vision.patch_size,
                "width": vision.width,
                "layers": vision.layers,
                "head_width": vision.width // vision.heads,
                "mlp_ratio": vision.mlp_ratio,
            },
            "text_cfg": {
                "context_length": text.context_length,
                "vocab_size": text.vocab_size,
                "width": text.width,
                "heads": text.heads,
                "layers": text.layers,
                "mlp_ratio": text.mlp_ratio,
            },
        },
        "preprocess_cfg": {
            "mean": list(IMAGE_MEAN),
            "std": list(IMAGE_STD),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }


def timm_config(config: ModelConfig) -> dict[str, Any]:
    """The content of timm's config.json: a registered architecture and what differs from it."""
    vision = config.vision
    return {
        "architecture": _TIMM_ARCHITECTURE[config.activation],
        "num_classes": config.embed_dim,
        "num_features": vision.width,
        "model_args": {
            "img_size": vision.image_size,
            "patch_size": vision.patch_size,
            "embed_dim": vision.width,
            "depth": vision.layers,
            "num_heads": vision.heads,
            "mlp_ratio": vision.mlp_ratio,
        },
        "pretrained_cfg": {
            "num_classes": config.embed_dim,
            "input_size": [3, vision.image_size, vision.image_size],
            "pool_size": None,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "mean": list(IMAGE_MEAN),
            "std": list(IMAGE_STD),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def transformers_config(config: ModelConfig) -> dict[str, Any]:
    """The content of the config.json of transformers' `CLIPModel`."""
    vision, text = config.vision, config.text
    common = {"hidden_act": config.activation, "layer_norm_eps": 1e-5, "projection_dim": config.embed_dim}
    end = text.vocab_size - 1
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "torch_dtype": "float32",
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": text.vocab_size,
            "hidden_size": text.width,
            "intermediate_size": round(text.width * text.mlp_ratio),
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "max_position_embeddings": text.context_length,
            "bos_token_id": end - 1,
            "eos_token_id": end,
            "pad_token_id": 0,
            **common,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": vision.width,
            "intermediate_size": round(vision.width * vision.mlp_ratio),
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "num_channels": 3,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            **common,
        },
    }


def _preprocessor_config(config: ModelConfig) -> dict[str, Any]:
    size = config.vision.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
    }


def _write_json(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path


def _write_weights(path: Path, weights: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    # A reader never meets half a file.
    temporary = path.with_name(f".writing-{path.name}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(weights, temporary, metadata=metadata)
        else:
            torch.save(weights, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
