"""The FaRL step as one would build it from open_clip's model and loss and BEiT-style masked image modelling.

Parameters carry FaRL's names, so that both start from the same weights and their gradients can be compared. Set up to
be fast: clean and masked images in one pass of the trunk, masked rows gathered without asking the host.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.transformer import LayerNorm, QuickGELU, Transformer
from torch import Tensor, nn

from farl.model import FaRL, ModelConfig


class OpenClipBeit(CLIP):
    """open_clip's CLIP with a branch of masked image modelling."""

    def __init__(self, config: ModelConfig) -> None:
        vision, text, mim = config.vision, config.text, config.mim
        assert mim is not None and config.activation == "quick_gelu"
        super().__init__(
            config.embed_dim,
            CLIPVisionCfg(
                layers=vision.layers,
                width=vision.width,
                head_width=vision.width // vision.heads,
                patch_size=vision.patch_size,
                image_size=vision.image_size,
            ),
            CLIPTextCfg(
                context_length=text.context_length,
                vocab_size=text.vocab_size,
                width=text.width,
                heads=text.heads,
                layers=text.layers,
            ),
            quick_gelu=True,
        )
        self.visual.mask_token = nn.Parameter(torch.zeros(vision.width))
        self.visual.lm_transformer = Transformer(vision.width, mim.layers, vision.heads, act_layer=QuickGELU)
        self.visual.ln_lm = LayerNorm(vision.width)
        self.visual.lm_head = nn.Linear(vision.width, mim.vocab_size)
        self._loss = ClipLoss(cache_labels=True)

    @classmethod
    def like(cls, model: FaRL) -> OpenClipBeit:
        """With the weights of `model`, on its device."""
        made = cls(model.config)
        made.load_state_dict(model.state_dict())
        return made.to(next(model.parameters()).device)

    def training_loss(self, images: Tensor, text: Tensor, mask: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
        """The loss of a step, 0-d.

        Args:
            images: float [n, 3, H, W], normalised.
            text: int64 [n, context length], padded with zeros.
            mask: bool [n, P]; positions: int32 [n, K], padded with -1; targets: int64 [n, K], -1 where padded.
        """
        visual: Any = self.visual
        patches = visual.conv1(images).flatten(2).transpose(1, 2)
        masked = torch.where(mask[:, :, None], visual.mask_token.to(patches.dtype), patches)
        both = torch.cat([patches, masked])
        first = visual.class_embedding.to(both.dtype).expand(len(both), 1, -1)
        tokens = torch.cat([first, both], dim=1) + visual.positional_embedding.to(both.dtype)
        tokens = visual.transformer(visual.ln_pre(tokens))
        clean, masked = tokens.chunk(2)

        image_features = F.normalize(visual.ln_post(clean[:, 0]) @ visual.proj, dim=-1)
        text_features = self.encode_text(text, normalize=True)
        contrast = self._loss(image_features, text_features, self.logit_scale.exp())

        masked = visual.lm_transformer(masked)
        index = (positions.long() + 1)[:, :, None].expand(-1, -1, masked.shape[-1])
        rows = visual.ln_lm(masked.gather(1, index))
        logits = visual.lm_head(rows).flatten(0, 1)
        return contrast + F.cross_entropy(logits.float(), targets.flatten(), ignore_index=-1)
