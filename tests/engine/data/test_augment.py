from __future__ import annotations

import math
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farl_engine.data import CENTER, CropPlan
from farl_engine.data.augment import STREAM_CROP, STREAM_JITTER, color_jitter, uniforms

GOLDEN = [
    [0.8418334982213795, 0.6740649905902006],
    [0.8672241933840584, 0.3043844207955343],
    [0.6111830898980594, 0.3800359695132357],
]
GOLDEN_BOXES = [(66, 10, 576, 476), (16, 18, 568, 438), (36, 16, 620, 480)]
SIDES = st.integers(1, 3000)


def test_numbers_are_pinned():
    # A change here changes the crops of every run that resumes.
    numbers = uniforms(3, [0, 7, 50_000_000], [0, 1, 2], 2, STREAM_CROP)
    assert numbers.tolist() == GOLDEN
    plan = CropPlan(scale=(0.5, 1.0))
    boxes = [plan.box(row, 640, 480) for row in plan.parameters(3, [0, 7, 8], [0, 1, 0])]
    assert boxes == GOLDEN_BOXES


def test_numbers_depend_on_each_counter_and_on_nothing_else():
    ids, views = np.arange(50), np.zeros(50, np.int64)
    base = uniforms(1, ids, views, 5, STREAM_CROP)
    assert np.array_equal(base[[7]], uniforms(1, [7], [0], 5, STREAM_CROP))
    assert np.array_equal(base[:, :3], uniforms(1, ids, views, 3, STREAM_CROP))
    for other in (
        uniforms(2, ids, views, 5, STREAM_CROP),
        uniforms(1, ids + 50, views, 5, STREAM_CROP),
        uniforms(1, ids, views + 1, 5, STREAM_CROP),
        uniforms(1, ids, views, 5, STREAM_JITTER),
    ):
        assert not np.isin(base, other).any()


def test_numbers_are_uniform_and_uncorrelated():
    numbers = uniforms(0, np.arange(40_000), np.zeros(40_000, np.int64), 4, STREAM_CROP)
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = np.histogram(numbers, bins=64, range=(0, 1))[0]
    expected = numbers.size / 64
    # Chi-square with 63 degrees of freedom: 5 standard deviations above the mean are 119.
    assert ((counts - expected) ** 2 / expected).sum() < 119
    assert np.abs(np.corrcoef(numbers.T) - np.eye(4)).max() < 0.03
    assert abs(np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]) < 0.03


@settings(max_examples=200, deadline=None)
@given(SIDES, SIDES, st.integers(0, 10**9), st.booleans())
def test_boxes_lie_in_the_image_and_keep_their_ranges(width, height, sample, grid):
    plan = CropPlan(scale=(0.3, 0.9), jpeg_grid=grid)
    x0, y0, x1, y1 = plan.box(plan.parameters(0, [sample], [0])[0], width, height)
    assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
    side = min(x1 - x0, y1 - y0)
    if side >= 200:
        assert 0.7 < (x1 - x0) / (y1 - y0) < 1.4
    if grid and side >= 1040:
        assert all(edge % 8 == 0 for edge in (x0, y0, x1, y1))


def test_boxes_are_torchvisions():
    torchvision = pytest.importorskip("torchvision.transforms")
    plan = CropPlan(scale=(0.2, 1.0), jpeg_grid=False)
    rng = np.random.default_rng(0)
    for width, height in [(250, 250), (640, 480), (33, 700), (1000, 3), (1, 1), (64, 48)] * 20:
        numbers = rng.random(23)
        areas_and_ratios = iter(numbers[3:])
        places = iter([numbers[1], numbers[2]])

        # The same draws for both: torchvision asks for area, then log ratio; at last for top, then left.
        def uniform(_, low, high, draws=areas_and_ratios):
            return torch.tensor([low + next(draws) * (high - low)], dtype=torch.float64)

        def randint(low, high, size, draws=places):
            return torch.tensor([int(low + next(draws) * (high - low))])

        with mock.patch("torch.Tensor.uniform_", uniform), mock.patch("torch.randint", randint):
            top, left, h, w = torchvision.RandomResizedCrop.get_params(
                torch.empty(3, height, width), list(plan.scale), list(plan.ratio)
            )
        expected = (left, top, left + w, top + h)
        assert plan.box(numbers, width, height) == expected or min(width, height) < 4, (width, height)


def test_grid_moves_a_box_by_little():
    free, snapped = CropPlan(jpeg_grid=False), CropPlan()
    for row in free.parameters(0, np.arange(200), np.zeros(200, np.int64)):
        for width, height in ((200, 300), (300, 300), (700, 900), (2000, 1500)):
            a, b = free.box(row, width, height), snapped.box(row, width, height)
            assert max(abs(p - q) for p, q in zip(a, b, strict=True)) <= min(a[2] - a[0], a[3] - a[1]) / 128


def test_center_is_the_central_square():
    assert CENTER.box(None, 640, 480) == (80, 0, 560, 480)
    assert CENTER.box(None, 3001, 2001) == (500, 0, 2501, 2001)
    assert CENTER.box(CENTER.parameters(0, [5], [0])[0], 480, 640) == (0, 80, 480, 560)
    assert CENTER.box(None, 1000, 3) == (498, 0, 501, 3)
    assert not CENTER.flips(CENTER.parameters(0, [5], [0])[0])


def test_flips_come_at_their_rate():
    ids, views = np.arange(4000), np.zeros(4000, np.int64)
    for rate in (0.0, 0.3, 1.0):
        plan = CropPlan(flip=rate)
        share = np.mean([plan.flips(row) for row in plan.parameters(0, ids, views)])
        assert share == pytest.approx(rate, abs=0.03 if 0 < rate < 1 else 0)


def test_jitter_factors_and_their_effect():
    assert CropPlan().jitter(CropPlan().parameters(0, [1], [0])[0]) is None
    plan = CropPlan(color_jitter=0.4)
    factors = np.array([plan.jitter(row) for row in plan.parameters(0, np.arange(500), np.zeros(500, np.int64))])
    assert factors.min() >= 0.6 and factors.max() <= 1.4 and np.allclose(factors.mean(0), 1, atol=0.05)
    # The crop does not depend on whether there is jitter.
    assert np.array_equal(plan.parameters(0, [3], [0])[:, :23], CropPlan().parameters(0, [3], [0]))
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    assert np.array_equal(color_jitter(image, (1.0, 1.0, 1.0)), image)
    gray = color_jitter(image, (1.0, 1.0, 0.0)).astype(int)
    assert np.ptp(gray, axis=2).max() <= 1


@pytest.mark.parametrize("factors", [(0.7, 1.3, 0.6), (1.4, 0.6, 1.4)])
def test_jitter_is_torchvisions(factors):
    functional = pytest.importorskip("torchvision.transforms.functional")
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    x = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    x = functional.adjust_brightness(x, factors[0])
    x = functional.adjust_contrast(x, factors[1])
    x = functional.adjust_saturation(x, factors[2])
    expected = (x * 255).permute(1, 2, 0).numpy()
    # torchvision's gray weights are rounded to four digits.
    assert np.abs(color_jitter(image, factors) - expected).max() < 0.6


@pytest.mark.parametrize(
    "options",
    [{"scale": (0, 1)}, {"scale": (0.9, 0.5)}, {"ratio": (1, math.inf)}, {"flip": 1.5}, {"color_jitter": -0.1}],
)
def test_wrong_plans_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        CropPlan(**options)
