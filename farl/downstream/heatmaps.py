"""Landmarks as maps and back: Gaussians to learn from, and the centroid that is read off a map.

Normalised points run from 0 to 1 between the outer edges of a crop, whatever its size in pixels: a pixel's centre p
(a whole number) lies at (p + 0.5) / size. So maps of several sizes agree without half a pixel's shift.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_normalised(points: Tensor, size: int) -> Tensor:
    """Pixels [..., 2] of a square of `size` pixels to 0..1."""
    return (points + 0.5) / size


def to_pixels(points: Tensor, size: int) -> Tensor:
    """The inverse of `to_normalised`."""
    return points * size - 0.5


def gaussian_maps(points: Tensor, size: int, radius: float) -> Tensor:
    """A bump of height 1 at each point: exp(-8 r^2 / R^2) of the distance r in pixels, and 0 beyond R (sigma = R / 4).

    As FaRL renders its targets (`farl/network/geometry.py`, "gaussian_awing"). A point outside leaves only what of its
    bump reaches in.

    Args:
        points: normalised float [B, N, 2], (x, y).
        size: side of the maps. radius: R, in pixels of the maps.

    Returns:
        float32 [B, N, size, size].
    """
    centers = to_pixels(points.float(), size)
    axis = torch.arange(size, device=points.device, dtype=torch.float32)
    x, y = ((axis - centers[..., i, None]).square() for i in range(2))
    squared = y[..., :, None] + x[..., None, :]
    return torch.exp(squared * (-8 / radius**2)).masked_fill_(squared > radius**2, 0)


def centroids(logits: Tensor) -> Tensor:
    """Centre of mass of each whole sigmoid map, without a temperature, as FaRL reads its points; differentiable.

    Args:
        logits: [B, N, h, w] of any float type; computed in float32.

    Returns:
        Normalised points float32 [B, N, 2], (x, y).
    """
    mass = logits.float().sigmoid()
    height, width = mass.shape[2:]
    total = mass.sum((2, 3)).clamp(min=1e-6)
    x = torch.arange(width, device=mass.device) + 0.5
    y = torch.arange(height, device=mass.device) + 0.5
    return torch.stack([(mass.sum(2) * x).sum(-1) / total / width, (mass.sum(3) * y).sum(-1) / total / height], -1)
