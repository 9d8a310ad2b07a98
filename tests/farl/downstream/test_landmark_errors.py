"""Errors and curves against direct computation over all errors, and sums over processes against one pass."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from farl.downstream.landmark_errors import LandmarkErrors, unit_lengths

Array = NDArray[np.float64]
BOXES = np.array([[10.0, 20.0, 40.0, 60.0]])


def simpson(shares: Array, step: float) -> float:
    """Parabolas through three neighbours each, one after another."""
    return sum(step / 3 * (shares[i] + 4 * shares[i + 1] + shares[i + 2]) for i in range(0, len(shares) - 2, 2))


def test_units_by_hand() -> None:
    points = np.zeros((1, 68, 2))
    points[0, 36], points[0, 45] = (1, 1), (31, 41)
    points[0, 37:42] = (2.2, 0.2)
    points[0, [42, 43, 44, 46, 47]] = (26.2, 4.0)
    assert unit_lengths("diagonal", points, BOXES).tolist() == [50.0]
    assert unit_lengths("box", points, BOXES) == pytest.approx(math.sqrt(1200))
    assert unit_lengths("inter_ocular", points, BOXES).tolist() == [50.0]
    # Means over all six points of an eye, corners among them.
    left, right = ((1 + 5 * 2.2) / 6, (1 + 5 * 0.2) / 6), ((31 + 5 * 26.2) / 6, (41 + 5 * 4) / 6)
    assert unit_lengths("inter_pupil", points, BOXES) == pytest.approx(math.dist(left, right))
    points = np.zeros((1, 98, 2))
    points[0, 60], points[0, 72], points[0, 96], points[0, 97] = (0, 0), (6, 8), (1, 0), (4, 4)
    assert unit_lengths("inter_ocular", points, BOXES).tolist() == [10.0]
    assert unit_lengths("inter_pupil", points, BOXES).tolist() == [5.0]


def test_one_image_by_hand() -> None:
    """19 points, of which each is off by (3, 4) or not at all."""
    points = np.random.default_rng(0).uniform(0, 50, (1, 19, 2))
    found = points.copy()
    found[0, :4] += (3, 4)
    metric = LandmarkErrors(("diagonal", "box"), ("box", 0.07))
    metric.update(found, points, BOXES, [()])
    figures = metric.compute()
    mean = 5 * 4 / 19
    assert figures["nme_diagonal"] == pytest.approx(mean / 50)
    assert figures["nme_box"] == pytest.approx(mean / math.sqrt(1200))
    assert figures["fr_box_7"] == 0
    # One image: the curve is 0 before its error and 1 after it.
    assert figures["auc_box_7"] == pytest.approx(1 - mean / math.sqrt(1200) / 0.07, abs=2e-3)
    assert set(figures) == {"nme_diagonal", "nme_box", "fr_box_7", "auc_box_7"}


def made(count: int = 400) -> tuple[Array, Array, Array, list[tuple[str, ...]]]:
    rng = np.random.default_rng(1)
    points = rng.uniform(0, 100, (count, 98, 2))
    found = points + rng.normal(0, 1, (count, 98, 2)) * rng.gamma(2, 2, (count, 1, 1))
    corner = rng.uniform(0, 20, (count, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(30, 90, (count, 2))], 1)
    subsets = [tuple(name for name in ("blur", "makeup", "other") if rng.random() < 0.3) for _ in range(count)]
    return found, points, boxes, subsets


@pytest.mark.parametrize(("kind", "threshold"), [("inter_ocular", 0.1), ("box", 0.07)])
def test_figures_are_those_of_all_errors_at_once(kind: str, threshold: float) -> None:
    found, points, boxes, subsets = made()
    metric = LandmarkErrors(("inter_ocular", "box"), (kind, threshold), ("blur", "makeup", "never"))
    for first in range(0, 400, 37):
        part = slice(first, first + 37)
        metric.update(found[part], points[part], boxes[part], subsets[part])
    figures = metric.compute()
    percent = f"{100 * threshold:g}"
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    units = {
        "box": np.sqrt(width * height),
        "inter_ocular": np.linalg.norm(points[:, 60] - points[:, 72], axis=1),
    }
    grid = np.linspace(0, threshold, round(threshold * 1e4) + 1)
    for subset in ("full", "blur", "makeup"):
        chosen = np.array([subset == "full" or subset in names for names in subsets])
        suffix = "" if subset == "full" else f"/{subset}"
        for name, unit in units.items():
            errors = np.linalg.norm(found - points, axis=2).mean(1)[chosen] / unit[chosen]
            assert figures[f"nme_{name}{suffix}"] == pytest.approx(errors.mean(), rel=1e-12)
            if name == kind:
                shares = np.array([(errors <= x).mean() for x in grid])
                assert 0.05 < shares[-1] < 0.95
                assert figures[f"fr_{kind}_{percent}{suffix}"] == pytest.approx(1 - shares[-1], abs=1e-12)
                area = simpson(shares, threshold / (len(grid) - 1)) / threshold
                assert figures[f"auc_{kind}_{percent}{suffix}"] == pytest.approx(area, rel=1e-12)
    assert math.isnan(figures["nme_box/never"]) and math.isnan(figures[f"auc_{kind}_{percent}/never"])


def test_sums_of_several_processes_are_those_of_one() -> None:
    found, points, boxes, subsets = made()

    def metric() -> LandmarkErrors:
        return LandmarkErrors(("inter_ocular", "diagonal"), ("inter_ocular", 0.1), ("blur", "makeup"))

    whole, total = metric(), metric()
    whole.update(found, points, boxes, subsets)
    states = []
    for rank in range(3):
        own = metric()
        own.update(found[rank::3], points[rank::3], boxes[rank::3], subsets[rank::3])
        states.append(own.state())
    assert states[0].dtype == torch.float64 and states[0].shape == states[1].shape
    total.load_state(torch.stack(states).sum(0))
    assert total.compute() == pytest.approx(whole.compute(), rel=1e-12)
    whole.load_state(whole.state())
    assert total.compute() == pytest.approx(whole.compute(), rel=1e-12)


def test_errors_on_the_grid_count_as_reached() -> None:
    """An error of exactly the threshold is no failure, the next larger one is."""
    points = np.zeros((2, 98, 2))
    points[:, 72] = (1000, 0)
    found = points.copy()
    found[0] += (100, 0)
    found[1] += (np.nextafter(100, 200), 0)
    metric = LandmarkErrors(("inter_ocular",), ("inter_ocular", 0.1))
    metric.update(found, points, np.repeat(BOXES, 2, 0), [(), ()])
    assert metric.compute()["fr_inter_ocular_10"] == 0.5


def test_an_image_without_eyes_apart_counts_in_other_kinds_alone() -> None:
    points = np.random.default_rng(0).uniform(0, 50, (2, 68, 2))
    points[1, 45] = points[1, 36]
    metric = LandmarkErrors(("diagonal", "inter_ocular"), ("inter_ocular", 0.1))
    metric.update(points + np.array([30, 40]), points, np.repeat(BOXES, 2, 0), [(), ()])
    figures = metric.compute()
    assert figures["nme_diagonal"] == pytest.approx(1)
    assert figures["nme_inter_ocular"] == pytest.approx(50 / np.linalg.norm(points[0, 36] - points[0, 45]))
    assert figures["fr_inter_ocular_10"] == 1 and figures["auc_inter_ocular_10"] == 0


def test_points_that_are_no_numbers_do_not_look_good() -> None:
    points = np.random.default_rng(0).uniform(0, 50, (1, 68, 2))
    metric = LandmarkErrors(("diagonal",), ("diagonal", 0.1))
    metric.update(np.full_like(points, np.nan), points, BOXES, [()])
    figures = metric.compute()
    assert math.isnan(figures["nme_diagonal"]) and figures["fr_diagonal_10"] == 1
    assert all(math.isnan(value) for value in LandmarkErrors(("box",), ("box", 0.07)).compute().values())
