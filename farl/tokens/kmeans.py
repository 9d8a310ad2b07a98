"""Deterministic k-means over whole-number features: the same centroids on every device and for any number of threads.

Features are those of `patch_features`: products are exact in fp32, sums over members are made exact in float64, and
centroids are rounded to whole numbers again.
"""

from __future__ import annotations

import random

import torch

_ROWS = 8192  # rows of a chunk: bounds the memory of the scores and keeps fp32 sums of members exact
_SEEDING_VECTORS = 32  # vectors a centroid that the seeding looks at


def nearest(features: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, F], [V, F] -> index int64 [N] of the nearest centroid (the first of equals), and its score float32 [N].

    The score is f . c - |c|^2 / 2, so that |f - c|^2 = |f|^2 - 2 score. The cost is one GEMM.
    """
    half_norms = centroids.square().sum(1) * -0.5
    rows = max(1, min(_ROWS, (1 << 24) // len(centroids)))
    index = torch.empty(len(features), dtype=torch.int64, device=features.device)
    score = torch.empty(len(features), dtype=torch.float32, device=features.device)
    with torch.autocast(features.device.type, enabled=False):  # scores in bf16 would not be exact
        for start in range(0, len(features), rows):
            scores = torch.addmm(half_norms, features[start : start + rows], centroids.T)
            part = slice(start, start + len(scores))
            index[part] = scores.argmax(1)
            score[part] = scores.gather(1, index[part, None])[:, 0]
    return index, score


def kmeans(features: torch.Tensor, count: int, *, iterations: int, seed: int) -> torch.Tensor:
    """float32 [N, F] of whole numbers -> centroids float32 [count, F] of whole numbers.

    k-means++ seeding (Arthur and Vassilvitskii 2007) in 128 rounds of count / 128 centres each on every n-th vector,
    then Lloyd iterations on all. A centroid without members moves to the vector farthest from its own centroid.
    """
    rng = random.Random(seed)
    norms = features.square().sum(1)
    stride = max(1, len(features) // (_SEEDING_VECTORS * count))
    centroids = _seed_centroids(features[::stride], norms[::stride], count, rng)
    for _ in range(iterations):
        index, score = nearest(features, centroids)
        sums = torch.zeros(count, features.shape[1], dtype=torch.float64, device=features.device)
        for start in range(0, len(features), _ROWS):
            # At most 8192 values of at most 256 in magnitude: exact in fp32 in any order.
            part = torch.zeros(count, features.shape[1], device=features.device)
            sums += part.index_add_(0, index[start : start + _ROWS], features[start : start + _ROWS])
        members = torch.bincount(index, minlength=count)
        updated = (sums / members.clamp(min=1)[:, None]).round_().to(torch.float32)
        dead = (members == 0).nonzero()[:, 0]
        if len(dead):
            farthest = (norms - 2 * score).sort(descending=True, stable=True).indices[: len(dead)]
            updated[dead] = features[farthest]
        if torch.equal(updated, centroids):
            break
        centroids = updated
    return centroids


def _seed_centroids(features: torch.Tensor, norms: torch.Tensor, count: int, rng: random.Random) -> torch.Tensor:
    """Rows of `features`, each drawn with probability proportional to its squared distance from those before."""
    distance = torch.full_like(norms, 1.0)  # the first round is uniform
    centroids: list[torch.Tensor] = []
    taken = 0
    while taken < count:
        size = min(max(1, count // 128), count - taken)
        cumulative = distance.double().cumsum(0)
        points = [rng.random() for _ in range(size)]
        draws = torch.tensor(points, dtype=torch.float64, device=features.device) * cumulative[-1]
        rows = torch.searchsorted(cumulative, draws, right=True).clamp(max=len(features) - 1)
        chosen = features[rows]
        gaps = norms[:, None] + norms[rows] - 2 * (features @ chosen.T)
        distance = gaps.amin(1) if not centroids else torch.minimum(distance, gaps.amin(1))
        centroids.append(chosen)
        taken += size
    return torch.cat(centroids)
