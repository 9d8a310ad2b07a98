"""Gaussians of points and centroids of maps, against their definitions and against each other."""

from __future__ import annotations

import math

import pytest
import torch

from farl.downstream.heatmaps import centroids, gaussian_maps, to_normalised, to_pixels


def test_edges_and_pixel_centres() -> None:
    ends = torch.tensor([[-0.5, 99.5], [0.0, 49.5]])
    torch.testing.assert_close(to_normalised(ends, 100), torch.tensor([[0.0, 1.0], [0.005, 0.5]]))
    torch.testing.assert_close(to_pixels(to_normalised(ends, 100), 100), ends)


def test_gaussian_maps_are_the_formula_at_each_pixel() -> None:
    points = torch.tensor([[[0.31, 0.62], [0.0, 1.0], [-0.02, 0.5], [1.7, 0.5]]])
    maps = gaussian_maps(points, 20, 5.0)
    assert maps.shape == (1, 4, 20, 20) and maps.dtype == torch.float32
    for n, (x, y) in enumerate(points[0].double().tolist()):
        for row in range(20):
            for column in range(20):
                r = math.hypot(column - (20 * x - 0.5), row - (20 * y - 0.5))
                wanted = math.exp(-8 * r * r / 25) if r <= 5 else 0.0
                assert maps[0, n, row, column].item() == pytest.approx(wanted, abs=2e-6), (n, row, column)
    assert maps[0, 2].max() > 0.5 and not maps[0, 3].any()


@pytest.mark.parametrize("size", [16, 23, 128])
def test_the_centroid_of_a_bump_is_its_point(size: int) -> None:
    """At any size of the maps, so nothing shifts between head, target and crop."""
    points = torch.rand(3, 5, 2, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.3
    bumps = gaussian_maps(points, size, 0.25 * size)
    torch.testing.assert_close(centroids(bumps.clamp(1e-7, 1 - 1e-6).logit()), points, atol=2e-3, rtol=0)


def test_centroids_of_single_pixels_and_of_flat_maps() -> None:
    logits = torch.full((1, 2, 4, 8), -40.0)
    logits[0, 0, 1, 6] = 40.0
    logits[0, 1] = 0.3
    wanted = torch.tensor([[[6.5 / 8, 1.5 / 4], [0.5, 0.5]]])
    torch.testing.assert_close(centroids(logits), wanted)
    found = centroids(logits.bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted)


def test_centroids_have_gradients_and_empty_maps_stay_finite() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, 6, dtype=torch.float32, requires_grad=True)
    centroids(logits).sum().backward()
    assert logits.grad is not None and logits.grad.abs().sum() > 0
    assert centroids(torch.full((1, 1, 4, 4), -200.0)).isfinite().all()
