"""The image towers that downstream heads stand on: ours, FaRL's, CLIP's, or a ViT of timm, behind one interface."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from farl.downstream.trunks import ClipTrunk, Features, TimmTrunk, make_timm
from farl.model import IMAGE_MEAN, IMAGE_STD, MODELS, ModelConfig, load_pretrained
from farl.model.vision import VisionTower
from farl.model.weight_files import read_weights

__all__ = ["Backbone", "Features", "default_blocks", "load_backbone", "restore_backbone"]

SCRATCH = "farl-b16"
# FaRL's own choices, by depth: base, large, huge.
FARL_BLOCKS = {12: (3, 5, 7, 11), 24: (7, 11, 15, 23), 32: (8, 14, 20, 31)}


class Backbone(nn.Module):
    """A vision transformer that gives the outputs of chosen blocks. `load_backbone` and `restore_backbone` make it.

    Attributes:
        resolution: side, in pixels, that images are resized to.
        patch_size: side of a patch in pixels. grid: rows and columns of patches.
        width: C. depth: blocks of the whole tower.
        blocks: those that are given, counted from 0; one may come twice.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, trunk: ClipTrunk | TimmTrunk, about: dict[str, Any]) -> None:
        super().__init__()
        self.trunk = trunk
        self.resolution: int = about["resolution"]
        self.patch_size: int = about["patch_size"]
        self.grid = (self.resolution // self.patch_size, self.resolution // self.patch_size)
        self.width: int = about["width"]
        self.depth: int = about["depth"]
        self.blocks = tuple(about["blocks"])
        self._about = about
        self.register_buffer("mean", torch.tensor(about["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(about["std"]).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Features:
        """Features of the chosen blocks, without a norm.

        Args:
            images: float [B, 3, H, W], RGB in 0..1; resized (bilinear, align_corners=False) where they are not
                `resolution` x `resolution`, as in FaRL's `farl/network/transformers.py`.
        """
        if images.shape[2:] != (self.resolution, self.resolution):
            images = F.interpolate(images, (self.resolution, self.resolution), mode="bilinear", align_corners=False)
        return self.trunk((images - self.mean) / self.std)

    def parameter_groups(self, lr: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
        """Groups for an optimizer, with "lr" and "name": the embeddings, then each block.

        The last block used has `lr`; every layer before has `layer_decay` times the rate of the next one (layer-wise
        decay, as BEiT's fine-tuning has it). Frozen parameters are left out.
        """
        layers = self.trunk.layers()
        names = ["embeddings", *(f"block {index}" for index in range(len(layers) - 1))]
        groups = []
        for index, (name, parameters) in enumerate(zip(names, layers, strict=True)):
            trained = [parameter for parameter in parameters if parameter.requires_grad]
            if trained:
                groups.append({"params": trained, "lr": lr * layer_decay ** (len(layers) - 1 - index), "name": name})
        return groups

    def freeze(self) -> None:
        """Take no gradients from here on."""
        self.requires_grad_(False)

    def recompute_activations(self, value: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.trunk.recompute(value)

    def about(self) -> dict[str, Any]:
        """Plain values from which `restore_backbone` makes the same architecture, and where its weights came from."""
        return dict(self._about)


def load_backbone(init: str | Path, *, resolution: int, blocks: Sequence[int] | None = None) -> Backbone:
    """A backbone in fp32 on the CPU from any weights.

    Args:
        init: a run folder or checkpoint of `farl.train`, a file in CLIP's or FaRL's layout (text tower and masked
            branch are dropped), "timm:NAME" (weights of timm's hub), "timm:NAME:FILE" (weights of a file),
            "scratch" (random, the sizes of farl-b16) or "scratch:NAME" (of a named model, such as farl-tiny). Random
            weights come from torch's generator.
        resolution: side of the images in pixels, a multiple of the patch size. The position embedding is resized here,
            once (bicubic, align_corners=False, as FaRL does).
        blocks: blocks to give, counted from 0; None takes `default_blocks`.

    Raises:
        ValueError: no such weights, or sizes that do not fit. OSError: a file cannot be read.
    """
    init = str(init)
    kind, _, rest = init.partition(":")
    if kind == "timm":
        name, _, file = rest.partition(":")
        weights = _timm_weights(name, file)
        backbone = _timm_backbone(name, resolution, blocks, init)
        assert isinstance(backbone.trunk, TimmTrunk)
        backbone.trunk.load(weights, init)
        return backbone
    if kind == "scratch":
        config = MODELS.get(rest or SCRATCH)
        if config is None:
            raise ValueError(f"--init {init}: there is no model {rest!r}; use one of {', '.join(MODELS)}")
        tower: VisionTower = VisionTower(replace(config, mim=None))
    else:
        model = load_pretrained(init)
        config, tower = model.config, model.visual
    backbone = _clip_backbone(config, resolution, blocks, init)
    assert isinstance(backbone.trunk, ClipTrunk)
    backbone.trunk.load(tower.state_dict(), config.vision.grid)
    return backbone


def restore_backbone(about: Mapping[str, Any]) -> Backbone:
    """The architecture that said `about`, with random weights, for `load_state_dict`.

    Raises:
        ValueError: `about` is not that of a backbone.
    """
    try:
        resolution, blocks, init = about["resolution"], about["blocks"], about["init"]
        if about["kind"] == "timm":
            return _timm_backbone(about["name"], resolution, blocks, init)
        return _clip_backbone(ModelConfig.from_dict(about["model"]), resolution, blocks, init)
    except KeyError as error:
        raise ValueError(f"not the description of a backbone: {error} is missing") from None


def default_blocks(depth: int) -> tuple[int, ...]:
    """FaRL's choice for 12, 24 and 32 blocks, else the last block of each quarter (one may come twice)."""
    return FARL_BLOCKS.get(depth) or tuple(math.ceil(depth * quarter / 4) - 1 for quarter in range(1, 5))


def _clip_backbone(config: ModelConfig, resolution: int, blocks: Sequence[int] | None, init: str) -> Backbone:
    vision = config.vision
    chosen = _check(resolution, blocks, vision.patch_size, vision.layers)
    about = {
        "kind": "clip",
        "init": init,
        "model": replace(config, mim=None).to_dict(),
        "resolution": resolution,
        "blocks": chosen,
        "width": vision.width,
        "patch_size": vision.patch_size,
        "depth": vision.layers,
        "mean": list(IMAGE_MEAN),
        "std": list(IMAGE_STD),
    }
    return Backbone(ClipTrunk(config, resolution, chosen), about)


def _timm_backbone(name: str, resolution: int, blocks: Sequence[int] | None, init: str) -> Backbone:
    with torch.device("meta"):
        native = make_timm(name)
    patch_size, depth = native.patch_embed.patch_size[0], len(native.blocks)
    chosen = _check(resolution, blocks, patch_size, depth)
    about = {
        "kind": "timm",
        "init": init,
        "name": name,
        "resolution": resolution,
        "blocks": chosen,
        "width": native.embed_dim,
        "patch_size": patch_size,
        "depth": depth,
        "mean": list(native.pretrained_cfg["mean"]),
        "std": list(native.pretrained_cfg["std"]),
    }
    return Backbone(TimmTrunk(name, resolution, chosen), about)


def _timm_weights(name: str, file: str) -> Mapping[str, Tensor]:
    if not file:
        try:
            return make_timm(name, pretrained=True).state_dict()
        except OSError as error:
            raise ValueError(
                f"the weights of timm:{name} could not be fetched ({type(error).__name__}): give a file, "
                f"timm:{name}:FILE"
            ) from error
    content = read_weights(Path(file))
    for wrapper in ("state_dict", "model"):
        if isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    return {key.removeprefix("module."): value for key, value in content.items() if isinstance(value, Tensor)}


def _check(resolution: int, blocks: Sequence[int] | None, patch_size: int, depth: int) -> list[int]:
    """The blocks, after a look at both."""
    if resolution < patch_size or resolution % patch_size:
        below = max(patch_size, resolution // patch_size * patch_size)
        raise ValueError(
            f"the resolution is {resolution}: it must be a multiple of the patch size {patch_size}, such as {below}"
        )
    chosen = list(default_blocks(depth) if blocks is None else blocks)
    if not chosen or not all(0 <= index < depth for index in chosen):
        raise ValueError(f"blocks {chosen} must lie in 0..{depth - 1}")
    return chosen
