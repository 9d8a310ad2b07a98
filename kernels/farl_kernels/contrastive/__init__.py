"""Image-text contrastive losses over the global batch, without the N x N logits."""

from __future__ import annotations

from farl_kernels.contrastive.exchange import GatheredFeatures
from farl_kernels.contrastive.op import ContrastiveLoss, contrastive_loss, gather_features

__all__ = ["ContrastiveLoss", "GatheredFeatures", "contrastive_loss", "gather_features"]
