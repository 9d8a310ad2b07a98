"""Cross-entropy of masked visual tokens, fused with the classifier."""

from __future__ import annotations

from farl_kernels.token_loss.op import masked_token_cross_entropy

__all__ = ["masked_token_cross_entropy"]
