"""Sizes of the towers as plain data, and the sizes that have a name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Activation = Literal["quick_gelu", "gelu"]
LayerNormCast = Literal["after", "before"]

# Mean and standard deviation of pixels in 0..1, red green blue (openai/CLIP `clip/clip.py`).
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class VisionConfig:
    """Image tower: a ViT in CLIP's layout. Sizes of images and patches in pixels, squares both."""

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        _check_positive(self, "vision")
        _check_heads(self, "vision")
        if self.image_size % self.patch_size:
            raise ValueError(f"vision.image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class TextConfig:
    """Text tower: causal, pooled at the end-of-text token, which is the largest id of a caption."""

    width: int
    layers: int
    heads: int
    context_length: int = 77
    vocab_size: int = 49_408
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        _check_positive(self, "text")
        _check_heads(self, "text")


@dataclass(frozen=True)
class MimConfig:
    """Branch of masked image modelling: blocks after the image tower, and the number of visual tokens."""

    layers: int = 1
    vocab_size: int = 8192

    def __post_init__(self) -> None:
        _check_positive(self, "mim")


@dataclass(frozen=True)
class ModelConfig:
    """A FaRL model.

    Attributes:
        embed_dim: length of the features that the contrastive loss compares.
        mim: None leaves the masked branch and its parameters out.
        activation: of the MLPs; "gelu" is the exact (erf) form.
        layer_norm_cast: LayerNorm in half precision casts the fp32 result "after" the affine (CLIP) or "before" it
            (FaRL); the same thing in full precision.
    """

    embed_dim: int
    vision: VisionConfig
    text: TextConfig
    mim: MimConfig | None = field(default_factory=MimConfig)
    activation: Activation = "quick_gelu"
    layer_norm_cast: LayerNormCast = "before"

    def __post_init__(self) -> None:
        if self.embed_dim < 1:
            raise ValueError(f"embed_dim must be positive, not {self.embed_dim}")
        if self.activation not in ("quick_gelu", "gelu"):
            raise ValueError(f'activation must be "quick_gelu" or "gelu", not {self.activation!r}')
        if self.layer_norm_cast not in ("after", "before"):
            raise ValueError(f'layer_norm_cast must be "after" or "before", not {self.layer_norm_cast!r}')

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, for JSON and checkpoints."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`. ValueError for missing or unknown names."""
        try:
            parts = dict(values)
            parts["vision"] = VisionConfig(**parts["vision"])
            parts["text"] = TextConfig(**parts["text"])
            parts["mim"] = None if parts.get("mim") is None else MimConfig(**parts["mim"])
            return cls(**parts)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a model configuration: {error}") from None


def _check_positive(config: VisionConfig | TextConfig | MimConfig, name: str) -> None:
    for size, value in asdict(config).items():
        if value <= 0:
            raise ValueError(f"{name}.{size} must be positive, not {value}")


def _check_heads(config: VisionConfig | TextConfig, name: str) -> None:
    if config.width % config.heads:
        raise ValueError(f"{name}.width {config.width} is not a multiple of heads {config.heads}")


def _farl(
    image_size: int, patch_size: int, vision: tuple[int, int, int], text: tuple[int, int, int], embed_dim: int, mim: int
) -> ModelConfig:
    """`vision` and `text` are (width, layers, heads)."""
    return ModelConfig(
        embed_dim=embed_dim,
        vision=VisionConfig(image_size, patch_size, *vision),
        text=TextConfig(*text),
        mim=MimConfig(vocab_size=mim),
    )


# B/16, L/16 and H/14 are FaRL's own (farl/network/farl/model.py, `load_farl`), with the text towers of CLIP B/16,
# L/14 and open_clip H/14; only the weights of B/16 were released.
MODELS: dict[str, ModelConfig] = {
    "farl-micro": _farl(32, 8, (32, 2, 2), (32, 2, 2), 16, 16),
    "farl-tiny": _farl(64, 8, (128, 6, 2), (128, 4, 2), 128, 512),
    "farl-s16": _farl(224, 16, (384, 12, 6), (384, 12, 6), 384, 8192),
    "farl-b16": _farl(224, 16, (768, 12, 12), (512, 12, 8), 512, 8192),
    "farl-l16": _farl(224, 16, (1024, 24, 16), (768, 12, 12), 512, 8192),
    "farl-h14": _farl(224, 14, (1280, 32, 16), (1024, 24, 16), 512, 8192),
}


def sizes_of(name: str) -> ModelConfig:
    """The sizes of the model called `name`. ValueError if none is."""
    if name not in MODELS:
        raise ValueError(f"there is no model {name!r}; use one of {', '.join(MODELS)}")
    return MODELS[name]
