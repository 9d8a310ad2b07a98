from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor


def _naive(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """One query of one head at a time: q [B, H, M, D], k v [B, H, N, D], allowed bool [B, M, N]."""
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                keys = [j for j in range(k.shape[2]) if allowed[b, i, j]]
                scores = [scale * float(q[b, h, i] @ k[b, h, j]) for j in keys]
                top = max(scores, default=0.0)
                weights = [math.exp(s - top) for s in scores]
                for j, w in zip(keys, weights, strict=True):
                    out[b, h, i] += w / sum(weights) * v[b, h, j]
    return out


@pytest.fixture
def naive():
    """Attention in Python loops: it shares no code with the package."""
    return _naive
