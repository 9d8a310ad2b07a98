"""Crops and their inverse: half pixels, the tanh rim, several sizes in a batch, gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from farl.downstream.draws import Draws
from farl.downstream.warp import RoiWarp, align_to_points, crop_box, crop_whole, random_similarity, similarity


def turned(size: int, angle: float, scale: float, source: tuple[float, float]) -> Tensor:
    """Matrix that turns and scales about `source`, which comes to the middle of the crop; by numpy alone."""
    c, s = scale * math.cos(angle), scale * math.sin(angle)
    middle = (size - 1) / 2
    x, y = source
    return torch.tensor([[[c, -s, middle - c * x + s * y], [s, c, middle - s * x - c * y], [0, 0, 1]]]).double()


def smooth_image(height: int, width: int) -> Tensor:
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    return torch.stack([(x / 9).sin() * (y / 7).cos(), x / width, y / height])


def test_similarity_is_recovered() -> None:
    rng = np.random.default_rng(0)
    points = torch.from_numpy(rng.normal(size=(3, 5, 2)) * 40 + 100)
    matrix = turned(64, 0.4, 0.7, (90, 80)).expand(3, 3, 3)
    target = points @ matrix[:, :2, :2].mT + matrix[:, None, :2, 2]
    torch.testing.assert_close(similarity(points, target), matrix)


def test_similarity_is_the_least_squares_one() -> None:
    """Against numpy's solver for (a, b, tx, ty) in x' = a x - b y + tx, y' = b x + a y + ty."""
    rng = np.random.default_rng(1)
    points, target = rng.normal(size=(5, 2)) * 30, rng.normal(size=(5, 2)) * 30
    rows = np.concatenate([[[x, -y, 1, 0], [y, x, 0, 1]] for x, y in points])
    a, b, tx, ty = np.linalg.lstsq(rows, target.reshape(-1), rcond=None)[0]
    wanted = torch.tensor([[[a, -b, tx], [b, a, ty], [0, 0, 1]]])
    torch.testing.assert_close(similarity(torch.from_numpy(points)[None], torch.from_numpy(target)), wanted)


def test_five_points_come_to_their_places_in_the_crop_of_512() -> None:
    standard = torch.tensor([[196, 226], [316, 226], [256, 286], [220, 360.4], [292, 360.4]]).double()
    points = standard * 0.5 + torch.tensor([31.0, -7.0])
    placed = RoiWarp(align_to_points(points[None], 512), 512).points(points[None])[0]
    torch.testing.assert_close(placed, (standard / 256 - 1 + 1) * 511 / 2)


def test_points_that_make_no_crop_are_refused() -> None:
    with pytest.raises(ValueError, match="one place"):
        align_to_points(torch.full((1, 5, 2), 3.0), 64)
    with pytest.raises(ValueError, match="one place"):
        align_to_points(torch.full((1, 5, 2), math.nan), 64)
    with pytest.raises(ValueError, match=r"\[B, 5, 2\]"):
        align_to_points(torch.zeros(1, 68, 2), 64)
    with pytest.raises(ValueError, match="no area"):
        crop_box(torch.tensor([[4.0, 4.0, 4.0, 9.0]]), 64)


def test_a_box_covers_the_crop_edge_to_edge() -> None:
    box = torch.tensor([[10.0, 20.0, 30.0, 60.0]]).double()
    corners = torch.tensor([[[10.0, 20.0], [30.0, 60.0]]]).double()
    edges = torch.tensor([[[-0.5, -0.5], [63.5, 63.5]]]).double()
    torch.testing.assert_close(RoiWarp(crop_box(box, 64), 64).points(corners), edges)
    square = RoiWarp(crop_box(box, 64, square=True, scale=0.5), 64).points(corners)
    torch.testing.assert_close(square, torch.tensor([[[23.5, 15.5], [39.5, 47.5]]]).double())


def test_a_whole_image_of_the_crops_size_is_left_alone() -> None:
    images = torch.rand(2, 3, 24, 24)
    warp = RoiWarp(crop_whole([(24, 24)] * 2, 24), 24).to("cpu")
    torch.testing.assert_close(warp.images(images), images)
    labels = torch.randint(9, (2, 24, 24), dtype=torch.uint8)
    assert torch.equal(warp.labels(labels), labels)
    torch.testing.assert_close(torch.stack(warp.back(images, [(24, 24)] * 2)), images)


def test_halving_is_the_mean_of_four_pixels() -> None:
    """The place where a half-pixel error shows first."""
    image = torch.rand(1, 1, 20, 20)
    warp = RoiWarp(crop_whole([(20, 20)], 10), 10).to("cpu")
    wanted = torch.nn.functional.avg_pool2d(image, 2)
    torch.testing.assert_close(warp.images(image), wanted)
    torch.testing.assert_close(warp.images(image, shrink=warp.shrink()), wanted)


def test_antialiasing_takes_in_every_pixel() -> None:
    image = torch.rand(1, 1, 80, 80)
    warp = RoiWarp(crop_whole([(80, 80)], 10), 10).to("cpu")
    torch.testing.assert_close(warp.images(image, shrink=warp.shrink()), torch.nn.functional.avg_pool2d(image, 8))


def test_antialiasing_does_not_move_an_image_whose_side_is_no_multiple() -> None:
    ramp = torch.arange(70.0).expand(1, 1, 70, 70)
    warp = RoiWarp(turned(16, 0.0, 1 / 4, (33.0, 36.0)), 16).to("cpu")
    plain, smoothed = warp.images(ramp), warp.images(ramp, shrink=warp.shrink())
    torch.testing.assert_close(smoothed[..., 1:-1], plain[..., 1:-1])


def test_crops_agree_with_pillow() -> None:
    rng = np.random.default_rng(2)
    pixels = rng.integers(0, 256, (40, 52), dtype=np.uint8)
    matrix = turned(32, 0.3, 1.2, (27.0, 18.0))
    # Pillow wants the map from crop to image, and has pixel centres at halves.
    inverse = np.linalg.inv(matrix[0].numpy())
    halves = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    data = (halves @ inverse @ np.linalg.inv(halves))[:2].ravel()
    floats = Image.fromarray(pixels).convert("F")
    wanted = floats.transform((32, 32), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)
    crop = RoiWarp(matrix, 32).images(torch.from_numpy(pixels).double()[None, None])
    inside = RoiWarp(matrix, 32)._source().view(32, 32, 2)
    inside = ((inside > 1) & (inside < torch.tensor([50.0, 38.0]))).all(-1)
    assert inside.sum() > 500
    expected = torch.from_numpy(np.array(wanted)).double()
    torch.testing.assert_close(crop[0, 0][inside], expected[inside], atol=1e-2, rtol=0)

    nearest = Image.fromarray(pixels).transform((32, 32), Image.Transform.AFFINE, data, Image.Resampling.NEAREST)
    labels = RoiWarp(matrix, 32).labels(torch.from_numpy(pixels)[None])
    assert torch.equal(labels[0][inside], torch.from_numpy(np.array(nearest))[inside])


def test_outside_is_zero_or_the_label_asked_for() -> None:
    matrix = crop_box(torch.tensor([[-10.5, -0.5, 9.5, 19.5]]), 20)
    warp = RoiWarp(matrix, 20)
    image, label = torch.ones(1, 1, 20, 20), torch.full((1, 20, 20), 3, dtype=torch.uint8)
    torch.testing.assert_close(warp.images(image)[0, 0, :, :10], torch.zeros(20, 10))
    torch.testing.assert_close(warp.images(image)[0, 0, :, 10:], torch.ones(20, 10))
    assert warp.labels(label)[0].unique(dim=1).shape[1] == 2
    assert torch.equal(warp.labels(label, outside=255)[0, :, :10], torch.full((20, 10), 255, dtype=torch.uint8))


@pytest.mark.parametrize("factor", [0.0, 0.3, 0.8, 1.0])
def test_points_there_and_back(factor: float) -> None:
    warp = RoiWarp(turned(512, 0.2, 1.7, (140.0, 160.0)), 512, factor)
    crop = torch.rand(1, 200, 2, dtype=torch.float64) * 511
    torch.testing.assert_close(warp.points(warp.points_back(crop)), crop, atol=1e-6, rtol=0)
    points = torch.rand(1, 200, 2, dtype=torch.float64) * 300
    torch.testing.assert_close(warp.points_back(warp.points(points)), points, atol=1e-6, rtol=0)


def test_the_rim_follows_the_formula() -> None:
    """Values of tanh((u - 1 + w) / w) * w + 1 - w by hand, at w = 0.5."""
    warp = RoiWarp(torch.eye(3)[None].double(), 200, 0.5)
    u = torch.tensor([0.0, 0.5, 0.75, 1.0, 2.0, -1.0])
    wanted = torch.tensor([0.0, 0.5, 0.7310586, 0.8807971, 0.9975274, -0.8807971])
    points = torch.stack([u, torch.zeros(6)], -1)[None].double() * 100 + 99.5
    found = (warp.points(points) - 99.5) / 100
    torch.testing.assert_close(found[0, :, 0].float(), wanted)
    torch.testing.assert_close(found[0, :, 1].float(), torch.zeros(6))


def test_only_the_edge_itself_is_clamped() -> None:
    warp = RoiWarp(torch.eye(3)[None].double(), 512, 0.8)
    corner = torch.tensor([[[511.5, -0.5]]]).double()
    assert warp.points_back(corner).isfinite().all()
    pixels = torch.tensor([[[511.0, 0.0]]]).double()
    torch.testing.assert_close(warp.points(warp.points_back(pixels)), pixels)


@pytest.mark.parametrize("factor", [0.0, 0.8])
def test_warp_then_back_is_the_identity_within_half_a_pixel(factor: float) -> None:
    """Images that hold their own coordinates: what comes back says where it was taken from."""
    sizes = [(90, 120), (100, 80), (90, 120)]
    images = []
    for height, width in sizes:
        y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
        images.append(torch.stack([x, y]))
    angles = (0.3, -0.2, 0.0)
    matrices = torch.cat([turned(128, a, 1.6, (w / 2, h / 2)) for a, (h, w) in zip(angles, sizes, strict=True)])
    warp = RoiWarp(matrices, 128, factor)
    returned = warp.back(warp.images(images), sizes)
    for i, (image, found, (height, width)) in enumerate(zip(images, returned, sizes, strict=True)):
        assert found.shape == image.shape
        u = (warp[[i]].matrices[0, :2, :2] @ image.flatten(1) + warp.matrices[i, :2, 2:]) / 64 - 1
        roi = (u.abs() < 0.9).all(0).view(height, width)
        # Zeros outside the image are mixed into what lies next to its border.
        roi &= (image[0] > 2) & (image[0] < width - 3) & (image[1] > 2) & (image[1] < height - 3)
        assert roi.sum() > 1500
        error = (found - image)[:, roi]
        assert error.norm(dim=0).max() < 0.5
        assert error.mean(1).abs().max() < 0.02  # no shift either


def test_a_crop_does_not_depend_on_the_rest_of_its_batch() -> None:
    images = [smooth_image(60, 70), smooth_image(50, 50), smooth_image(60, 70)]
    sizes = [(60, 70), (50, 50), (60, 70)]
    labels = [(image[0] > 0).byte() for image in images]
    matrices = torch.cat([turned(32, 0.1 * i, 0.8, (30, 25)) for i in range(3)])
    together = RoiWarp(matrices, 32, 0.8)
    crops, maps = together.images(images), together.labels(labels)
    back = together.back(crops, sizes)
    for i in range(3):
        alone = together[[i]]
        torch.testing.assert_close(alone.images(images[i : i + 1])[0], crops[i])
        assert torch.equal(alone.labels(labels[i : i + 1])[0], maps[i])
        torch.testing.assert_close(alone.back(crops[i : i + 1], sizes[i : i + 1])[0], back[i])


@pytest.mark.parametrize("factor", [0.0, 0.8])
def test_gradients(factor: float) -> None:
    matrix = turned(6, 0.3, 0.9, (3.1, 2.7)).requires_grad_()
    image = torch.rand(1, 2, 6, 7, dtype=torch.float64, requires_grad=True)
    points = (torch.rand(1, 4, 2, dtype=torch.float64) * 5 + 0.1).requires_grad_()

    def there_and_back(matrix: Tensor, image: Tensor, points: Tensor) -> tuple[Tensor, ...]:
        warp = RoiWarp(matrix, 6, factor)
        crop = warp.images(image)
        return crop, warp.back(crop, [(6, 7)])[0], warp.points(points), warp.points_back(points)

    assert torch.autograd.gradcheck(there_and_back, (matrix, image, points))


def test_random_moves_have_the_protocols_spread_and_stay_about_the_middle() -> None:
    draws = Draws((0, i) for i in range(4000))
    moves = random_similarity(draws, 512, shift=0.01, rotation=0.314, scale=0.1, normal=True)
    middle = torch.full((4000, 1, 2), 255.5).double()
    shifts = RoiWarp(moves, 512).points(middle) - middle
    assert 4.9 < shifts.abs().max() <= 5.12
    angle = torch.atan2(moves[:, 1, 0], moves[:, 0, 0])
    scale = torch.linalg.det(moves[:, :2, :2]).sqrt()
    assert angle.std().item() == pytest.approx(0.314, rel=0.05)
    assert abs(angle.mean().item()) < 0.02
    assert scale.std().item() == pytest.approx(0.1, rel=0.05)
    assert scale.mean().item() == pytest.approx(1, abs=0.01)
    even = random_similarity(draws, 512, shift=0.05, rotation=0.174, scale=0.1, mean_scale=0.8, normal=False)
    assert torch.atan2(even[:, 1, 0], even[:, 0, 0]).abs().max() <= 0.174
    scale = torch.linalg.det(even[:, :2, :2]).sqrt()
    assert 0.699 < scale.min() < 0.71 and 0.89 < scale.max() < 0.901
