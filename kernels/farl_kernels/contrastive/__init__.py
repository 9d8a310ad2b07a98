"""Image-text contrastive losses over the global batch, without the N x N logits."""

from __future__ import annotations

from farl_kernels.contrastive.exchange import GatheredFeatures
from farl_kernels.contrastive.module import ContrastiveLoss
from farl_kernels.contrastive.op import contrastive_loss, gather_features
from farl_kernels.contrastive.open_clip import ClipLoss, SigLipLoss

__all__ = ["ClipLoss", "ContrastiveLoss", "GatheredFeatures", "SigLipLoss", "contrastive_loss", "gather_features"]
