"""The contrastive loss from its definition: N x N matrices, autograd, float64, digits kept for confident pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


def target(count: int, *, smoothing: float, ids: Tensor | None, duplicates: str, dtype: torch.dtype) -> Tensor:
    """Target distribution [N, N] of the softmax loss."""
    eye = torch.eye(count, dtype=dtype)
    same = eye if ids is None or duplicates == "negative" else (ids[:, None] == ids[None]).to(dtype)
    positives = same if duplicates == "multi_positive" else eye
    candidates = 1 - same + eye if duplicates == "mask" else torch.ones_like(eye)
    spread = candidates / candidates.sum(1, keepdim=True)
    return (1 - smoothing) * positives / positives.sum(1, keepdim=True) + smoothing * spread


def dense_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    *,
    kind: str = "softmax",
    logit_bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    ids: Tensor | None = None,
    duplicates: str = "negative",
) -> Tensor:
    """Loss of every pair [N]."""
    logits = scale * image @ text.T + (0.0 if logit_bias is None else logit_bias)
    count = len(logits)
    eye = torch.eye(count, dtype=torch.bool)
    same = eye if ids is None else ids[:, None] == ids[None]
    off = ~eye & ~same if duplicates == "mask" else ~eye
    if kind == "sigmoid":
        positive = same if duplicates == "multi_positive" else eye
        losses = softplus(torch.where(positive, -logits, logits))
        return torch.where(off | eye, losses, 0.0).sum(1)
    own = logits.diagonal()
    q = target(count, smoothing=label_smoothing, ids=ids, duplicates=duplicates, dtype=logits.dtype)
    # 0 * logits is NaN-safe here: the tests that propagate NaN look at isnan only.
    negatives = logits.masked_fill(~off, -torch.inf)
    plain = q.equal(torch.eye(count, dtype=q.dtype))
    rows = softplus(_lse(negatives, 1) - own) + (0.0 if plain else own - (q * logits).sum(1))
    columns = softplus(_lse(negatives, 0) - own) + (0.0 if plain else own - (q.T * logits).sum(0))
    return 0.5 * (rows + columns)


def _lse(negatives: Tensor, dim: int) -> Tensor:
    empty = negatives.isneginf().all(dim)  # logsumexp of nothing has a NaN gradient
    safe = negatives.masked_fill(empty.unsqueeze(dim), 0.0)
    return torch.where(empty, -torch.inf, safe.logsumexp(dim))


def pairs(
    count: int, dim: int, *, noise: float = 1.5, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Unit features [N, D] of pairs that share a latent under independent noise of relative size `noise`."""
    g = torch.Generator().manual_seed(seed)
    latent, *noises = (torch.randn(count, dim, generator=g, dtype=torch.float64) for _ in range(3))
    image, text = (F.normalize(latent + noise * x, dim=1).to(dtype) for x in noises)
    return image, text
