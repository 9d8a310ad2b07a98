"""The image tower of CLIP ViT-B/16 (Radford et al. 2021) with FaRL's initialisation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from farl.model.blocks import LayerNorm, Stream, Transformer, take_first
from farl.model.config import IMAGE_MEAN, IMAGE_STD, ModelConfig
from farl_kernels.linear_layer import linear
from farl_kernels.patch_masking import mask_patches, patchify
from farl_kernels.precision import autocast_dtype


class VisionTower(nn.Module):
    """Images to features. Parameter names are those under `visual.` in the released checkpoints.

    The residual stream has the dtype of the computation: of autocast (as in open_clip's image tower), else
    `compute_dtype`, else of the parameters.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        vision = config.vision
        self.config = vision
        self.compute_dtype: torch.dtype | None = None
        scale = vision.width**-0.5
        self.conv1 = nn.Conv2d(3, vision.width, vision.patch_size, stride=vision.patch_size, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(vision.width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(vision.num_patches + 1, vision.width))
        self.ln_pre = LayerNorm(vision.width, config.layer_norm_cast)
        self.transformer = make_transformer(config, vision.layers)
        self.ln_post = LayerNorm(vision.width, config.layer_norm_cast)
        self.proj = nn.Parameter(scale * torch.randn(vision.width, config.embed_dim))
        self.apply(init_weights)

    def forward(self, images: Tensor) -> Tensor:
        """Features [n, embed_dim], not normalised.

        Args:
            images: uint8 [n, H, W, 3], or float [n, 3, H, W] already normalised; H = W = the model's image size.
        """
        stream = self.transformer.all_but_last(self.embed(images))
        last = self.transformer.last
        return self.pool(self.transformer.run(last.at_rows, stream, take_first))

    def visual_features(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Outputs of the given blocks (counted from 0) as grids [n, C, h, w], in the order asked for.

        No norm is applied (FaRL `farl/network/transformers.py`). At another resolution than the model's, the position
        embedding is resized bicubically.

        Args:
            images: as in `forward`, but of any size that is a multiple of the patch size.
        """
        if not blocks or not all(0 <= index < self.config.layers for index in blocks):
            raise ValueError(f"blocks {list(blocks)} must lie in 0..{self.config.layers - 1}")
        rows, columns = self._grid_of(images)
        stream = self.embed(images, any_size=True)
        found: dict[int, Tensor] = {}
        for index in range(max(blocks) + 1):
            stream = self.transformer.run(self.transformer.block(index), stream)
            if index in blocks:
                found[index] = stream.value()[:, 1:].transpose(1, 2).unflatten(2, (rows, columns))
        return [found[index] for index in blocks]

    def embed(self, images: Tensor, *, any_size: bool = False) -> Stream:
        """Class token and patches with their positions, after `ln_pre`: [n, 1 + P, C]."""
        x = self.embed_patches(images, any_size=any_size)
        position = self.positional_embedding
        if any_size:
            position = resize_position_embedding(position, self.config.grid, self._grid_of(images))
        tokens = mask_patches(
            x,
            None,
            mask_token=None,
            class_token=self.class_embedding,
            position_embedding=position,
            mode="plain",
        )
        return self.start(tokens)

    def embed_patches(self, images: Tensor, *, any_size: bool = False) -> Tensor:
        """Patch embeddings [n, P, C] without class token and positions."""
        grid = self._grid_of(images)
        if grid != self.config.grid and not any_size:
            size = self.config.image_size
            height, width = self._size_of(images)
            raise ValueError(f"images of {height} x {width} pixels: the model takes {size} x {size}")
        weight = self.conv1.weight
        dtype = autocast_dtype(weight.device) or self.compute_dtype or weight.dtype
        raw = images.dtype == torch.uint8
        patches = patchify(
            images,
            self.config.patch_size,
            mean=IMAGE_MEAN if raw else None,
            std=IMAGE_STD if raw else None,
            dtype=dtype,
        )
        return linear(patches, weight.flatten(1))

    def start(self, x: Tensor) -> Stream:
        """The stream that enters the first block, from embeddings with positions."""
        return Stream(self.ln_pre(Stream(x))[0])

    def pool(self, stream: Stream) -> Tensor:
        """Features [n, embed_dim] from the stream [n, C] of the class tokens after the last block."""
        return linear(self.ln_post(stream)[0], self.proj.t())

    @staticmethod
    def _size_of(images: Tensor) -> tuple[int, int]:
        if images.ndim == 4 and images.dtype == torch.uint8 and images.shape[3] == 3:
            return images.shape[1], images.shape[2]
        if images.ndim == 4 and images.is_floating_point() and images.shape[1] == 3:
            return images.shape[2], images.shape[3]
        raise ValueError(
            f"images must be uint8 [n, H, W, 3] or float [n, 3, H, W], not {images.dtype} {list(images.shape)}"
        )

    def _grid_of(self, images: Tensor) -> tuple[int, int]:
        height, width = self._size_of(images)
        patch = self.config.patch_size
        if height % patch or width % patch:
            raise ValueError(f"images of {height} x {width} pixels: both must be multiples of the patch size {patch}")
        return height // patch, width // patch


def make_transformer(config: ModelConfig, layers: int) -> Transformer:
    """A stack of blocks of the image tower's width."""
    vision = config.vision
    return Transformer(layers, vision.width, vision.heads, vision.mlp_ratio, config.activation, config.layer_norm_cast)


def init_weights(module: nn.Module) -> None:
    """FaRL's initialisation (`farl/network/farl/model.py`): weights of std 0.02, no bias; in_proj keeps Xavier's."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def resize_position_embedding(position: Tensor, grid_from: tuple[int, int], grid_to: tuple[int, int]) -> Tensor:
    """Position embedding [1 + h*w, C] of another grid (rows, columns); the class token's row is kept.

    Bicubic, align_corners=False, not antialiased, as FaRL does for its downstream tasks
    (`farl/network/transformers.py`). Differentiable; the same tensor comes back when the grids are equal.
    """
    if position.ndim != 2 or len(position) != 1 + math.prod(grid_from):
        raise ValueError(
            f"position must be [1 + {grid_from[0]}*{grid_from[1]}, C] for grid_from, not {list(position.shape)}"
        )
    if grid_from == grid_to:
        return position
    grid = position[1:].unflatten(0, grid_from).permute(2, 0, 1)[None]
    grid = F.interpolate(grid.float() if grid.dtype != torch.float64 else grid, grid_to, mode="bicubic")
    return torch.cat([position[:1], grid[0].flatten(1).t().to(position.dtype)])
