"""The whole model: both towers, the masked branch, and the forward pass of a training step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from farl.model.blocks import Transformer
from farl.model.config import ModelConfig
from farl.model.mim import MaskedVisionTower
from farl.model.text import PackedText, TextTower
from farl.model.vision import VisionTower
from farl_engine.profiler import part
from farl_kernels.contrastive import GatheredFeatures


@dataclass(frozen=True)
class TrainingOutput:
    """What a training step needs of the model; features are not normalised.

    Attributes:
        image_features, text_features: [n, embed_dim]; None for the masked branch alone.
        logit_scale: 0-d, exponentiated.
        gathered: what `exchange` made of the text features; None without one.
        mim_hidden: [n*K, C], rows at `masked_positions` after `ln_lm`; None without a mask or with targets.
        mim_loss_sum, mim_correct, mim_count: 0-d; sum of cross-entropies over the masked patches of this batch, right
            predictions among them, and their number; None without targets.
    """

    image_features: Tensor | None
    text_features: Tensor | None
    logit_scale: Tensor
    gathered: GatheredFeatures | None = None
    mim_hidden: Tensor | None = None
    mim_loss_sum: Tensor | None = None
    mim_correct: Tensor | None = None
    mim_count: Tensor | None = None


class FaRL(TextTower):
    """FaRL (Zheng et al. 2022) with the parameter names of the released checkpoints.

    Args:
        config: sizes; ``config.mim = None`` leaves the masked branch out.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.config = config
        self.visual = VisionTower(config) if config.mim is None else MaskedVisionTower(config)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(
        self,
        images: Tensor,
        text: PackedText | None,
        *,
        mask: Tensor | None = None,
        masked_positions: Tensor | None = None,
        targets: Tensor | None = None,
        exchange: Callable[[Tensor], GatheredFeatures] | None = None,
    ) -> TrainingOutput:
        """One training step's forward pass, without losses over the batch.

        With `mask` and `text` every parameter takes part, so that DDP needs no search for unused ones. Without a mask
        (contrast alone) the masked branch does not: train such a model with ``config.mim = None``. Without text (masked
        branch alone) neither the text tower nor the clean half of the images is computed: call
        `train_masked_branch_alone` first.

        Args:
            images: uint8 [n, H, W, 3], or float [n, 3, H, W] already normalised.
            text: n packed captions, on the same device; None for the masked branch alone.
            mask: bool [n, P], True = masked.
            masked_positions: int32 [n, K], the masked patches, padded with -1; required with `mask`.
            targets: int64 [n, K], visual tokens at `masked_positions`, -1 where padded.
            exchange: sends the text features to the other ranks. Called before the image tower starts, so that they
                travel while it runs, and their gradient while its backward pass runs.

        Raises:
            ValueError: shapes or dtypes do not fit, a mask is given to a model without the masked branch, or neither
                text nor a mask is given.
        """
        if text is not None and len(images) != len(text):
            raise ValueError(f"{len(images)} images but {len(text)} captions")
        with part("text tower"):
            text_features = self.encode_text_packed(text) if text is not None else None
        gathered = exchange(text_features) if exchange is not None and text_features is not None else None
        scale = self.logit_scale.exp()
        if mask is None:
            if masked_positions is not None or targets is not None:
                raise ValueError("masked_positions and targets need a mask")
            if text is None:
                raise ValueError("neither captions nor a mask: there is nothing to train")
            with part("image tower"):
                image_features = self.visual(images)
            return TrainingOutput(image_features, text_features, scale, gathered)
        if masked_positions is None:
            raise ValueError("a mask needs masked_positions")
        if not isinstance(self.visual, MaskedVisionTower):
            raise ValueError("the model has no masked branch (config.mim is None): give no mask")
        with part("image tower"):
            if text is None:
                image_features, hidden = None, self.visual.forward_masked_alone(images, mask, masked_positions)
            else:
                image_features, hidden = self.visual.forward_masked(images, mask, masked_positions)
        if targets is None:
            return TrainingOutput(image_features, text_features, scale, gathered, mim_hidden=hidden)
        if targets.shape != masked_positions.shape:
            wanted = list(masked_positions.shape)
            raise ValueError(f"targets must be {wanted} as masked_positions are, not {list(targets.shape)}")
        with part("token loss"):
            loss_sum, correct, count = self.visual.token_loss(hidden, targets)
        return TrainingOutput(
            image_features,
            text_features,
            scale,
            gathered,
            mim_loss_sum=loss_sum,
            mim_correct=correct,
            mim_count=count,
        )

    def train_masked_branch_alone(self) -> None:
        """Take what only a contrastive loss trains (text tower, projections, logit scale) out of training for good."""
        for name, parameter in self.named_parameters():
            if not name.startswith("visual.") or name.startswith(("visual.ln_post.", "visual.proj")):
                parameter.requires_grad_(False)

    def encode_image(self, images: Tensor) -> Tensor:
        """Features [B, embed_dim], not normalised, of images as in `forward`."""
        return self.visual(images)

    def visual_features(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Patch grids [B, C, h, w] after the given blocks; see `VisionTower.visual_features`."""
        return self.visual.visual_features(images, blocks)

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """Dtype of products and features, such as torch.bfloat16; None is that of the parameters, or of autocast.

        The parameters stay what they are (float32), and so do their gradients: see `farl_kernels.linear`.
        """
        return self._compute_dtype

    @compute_dtype.setter
    def compute_dtype(self, value: torch.dtype | None) -> None:
        self._compute_dtype = self.visual.compute_dtype = value

    @property
    def checkpoint_activations(self) -> bool:
        """Recompute each block in the backward pass instead of keeping its activations. Set it before training."""
        return self.transformer.checkpoint_activations

    @checkpoint_activations.setter
    def checkpoint_activations(self, value: bool) -> None:
        for module in self.modules():
            if isinstance(module, Transformer):
                module.checkpoint_activations = value
