"""The two kinds of image tower under a `Backbone`: `farl.model`'s, and timm's. Both keep only what is read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from farl.model import ModelConfig, resize_position_embedding
from farl.model.vision import VisionTower

POSITION = "positional_embedding"


class Features(NamedTuple):
    """Outputs of the chosen blocks, in their order.

    Attributes:
        maps: patch tokens, [B, C, h, w] each.
        class_tokens: [B, C] each; of a tower without a class token the mean over its patches.
    """

    maps: list[Tensor]
    class_tokens: list[Tensor]


class ClipTrunk(nn.Module):
    """The image tower of a `FaRL` model up to the last block that is read.

    Args:
        config: of the model.
        resolution: side of the images in pixels.
        blocks: those whose outputs are given, counted from 0.
    """

    def __init__(self, config: ModelConfig, resolution: int, blocks: Sequence[int]) -> None:
        super().__init__()
        self.blocks = tuple(blocks)
        self.tower = VisionTower(replace(config, mim=None, vision=replace(config.vision, image_size=resolution)))
        # A parameter without a gradient would make DDP wait for it.
        del self.tower.ln_post, self.tower.proj
        del self.tower.transformer.resblocks[max(blocks) + 1 :]

    def forward(self, images: Tensor) -> Features:
        """Normalised float [B, 3, R, R] to features; no norm is applied to them."""
        tower = self.tower
        stream = tower.embed(images)
        found: dict[int, Tensor] = {}
        for index in range(max(self.blocks) + 1):
            stream = tower.transformer.run(tower.transformer.block(index), stream)
            if index in self.blocks:
                found[index] = stream.value()
        grid = tower.config.grid
        maps = [found[index][:, 1:].transpose(1, 2).unflatten(2, grid) for index in self.blocks]
        return Features(maps, [found[index][:, 0] for index in self.blocks])

    def load(self, weights: Mapping[str, Tensor], grid: tuple[int, int]) -> None:
        """Take a whole `VisionTower`'s weights, whose position embedding has `grid` rows and columns."""
        wanted = self.tower.state_dict()
        given = {name: weights[name] for name in wanted}
        given[POSITION] = resize_position_embedding(given[POSITION], grid, self.tower.config.grid)
        self.tower.load_state_dict(given)

    def layers(self) -> list[list[nn.Parameter]]:
        """Parameters of the embeddings, then of each block."""
        return _split_layers(self, self.tower.transformer.resblocks)

    def recompute(self, value: bool) -> None:
        """Whether the backward pass recomputes each block."""
        self.tower.transformer.checkpoint_activations = value


class TimmTrunk(nn.Module):
    """A plain vision transformer of timm, with the fused ops, up to the last block that is read.

    Raises:
        ValueError: timm has no such model, or not one whose blocks and patches can be found.
    """

    def __init__(self, name: str, resolution: int, blocks: Sequence[int]) -> None:
        super().__init__()
        from farl_kernels.integrations.timm import accelerate

        self.blocks = tuple(blocks)
        self.model = make_timm(name, img_size=resolution)
        self.model.prune_intermediate_layers(sorted(set(blocks)), prune_norm=True, prune_head=True)
        accelerate(self.model)

    def forward(self, images: Tensor) -> Features:
        """As `ClipTrunk.forward`."""
        order = sorted(set(self.blocks))
        outputs = self.model.forward_intermediates(
            images, indices=order, return_prefix_tokens=True, norm=False, intermediates_only=True
        )
        if not self.model.num_prefix_tokens:
            outputs = [(grid, None) for grid in outputs]
        found = dict(zip(order, outputs, strict=True))
        maps = [found[index][0] for index in self.blocks]
        if self.model.cls_token is not None:
            return Features(maps, [found[index][1][:, 0] for index in self.blocks])
        return Features(maps, [grid.mean((2, 3)) for grid in maps])

    def load(self, weights: Mapping[str, Tensor], source: str) -> None:
        """Take a timm model's weights; those of parts that are not read are left out.

        Raises:
            ValueError: a parameter is missing or has another shape.
        """
        # Without the parts that depend on the resolution alone, such as tables of rotary embeddings.
        wanted = dict(self.model.named_parameters())
        given = {name: value.float() for name, value in weights.items() if name in wanted}
        if "pos_embed" in given:
            given["pos_embed"] = _resize_timm_position(given["pos_embed"], self.model)
        missing = [name for name in wanted if name not in given]
        misshapen = [name for name, value in given.items() if value.shape != wanted[name].shape]
        if missing or misshapen:
            what = [f"missing {', '.join(missing)}"] * bool(missing)
            what += [f"of the wrong shape {', '.join(misshapen)}"] * bool(misshapen)
            raise ValueError(f"{source} does not fit: {'; '.join(what)}")
        self.model.load_state_dict(given, strict=False)

    def layers(self) -> list[list[nn.Parameter]]:
        """As `ClipTrunk.layers`."""
        return _split_layers(self, self.model.blocks)

    def recompute(self, value: bool) -> None:
        """As `ClipTrunk.recompute`."""
        self.model.set_grad_checkpointing(value)


def make_timm(name: str, **options: Any) -> Any:
    """timm's model `name` without a classifier. ValueError where it is not a plain vision transformer."""
    import timm

    try:
        model = timm.create_model(name, num_classes=0, **options)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ValueError(f"timm cannot make {name!r} so: {str(error).strip() or type(error).__name__}") from None
    parts = ("blocks", "patch_embed", "forward_intermediates", "prune_intermediate_layers", "num_prefix_tokens")
    if missing := [part for part in parts if not hasattr(model, part)]:
        raise ValueError(f"timm's {name} is not a plain vision transformer (it has no {', '.join(missing)})")
    return model


def _resize_timm_position(position: Tensor, model: Any) -> Tensor:
    """[1, prefix + h*w, C] for the model's grid; only what lies in front of the patches is kept as it is."""
    prefix = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
    side = math.isqrt(position.shape[1] - prefix)
    if side * side != position.shape[1] - prefix:
        return position  # of the wrong shape, which `load` says
    front = torch.zeros_like(position[0, :1])
    patches = torch.cat([front, position[0, prefix:]])
    resized = resize_position_embedding(patches, (side, side), tuple(model.patch_embed.grid_size))
    return torch.cat([position[0, :prefix], resized[1:]])[None]


def _split_layers(trunk: nn.Module, blocks: Iterable[nn.Module]) -> list[list[nn.Parameter]]:
    """Parameters outside `blocks`, then those of each block."""
    inside = [list(block.parameters()) for block in blocks]
    known = {id(parameter) for parameters in inside for parameter in parameters}
    return [[parameter for parameter in trunk.parameters() if id(parameter) not in known], *inside]
