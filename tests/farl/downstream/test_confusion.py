"""The confusion matrix against scikit-learn's definitions, computed independently, and hand cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from farl.downstream.confusion import UNLABELLED, ConfusionMatrix


def by_hand(truth: np.ndarray, prediction: np.ndarray, classes: int) -> tuple[list[float], list[float]]:
    """F1 and IoU a class from sets of pixels."""
    f1, iou = [], []
    for c in range(classes):
        true = set(np.flatnonzero(truth == c).tolist())
        found = set(np.flatnonzero(prediction == c).tolist())
        precision = len(true & found) / len(found) if found else 0.0
        recall = len(true & found) / len(true) if true else 0.0
        f1.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
        iou.append(len(true & found) / len(true | found))
    return f1, iou


def test_figures_over_several_batches() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, (6, 8, 9))
    prediction = np.where(rng.random(truth.shape) < 0.7, truth, rng.integers(0, 4, truth.shape))
    matrix = ConfusionMatrix(["background", "a", "b", "c"])
    for i in (0, 2, 4):
        matrix.update(torch.from_numpy(prediction[i : i + 2]), torch.from_numpy(truth[i : i + 2].astype(np.uint8)))
    f1, iou = by_hand(truth.ravel(), prediction.ravel(), 4)
    figures = matrix.compute()
    assert [figures[f"f1/{name}"] for name in matrix.classes] == pytest.approx(f1, abs=1e-12)
    assert [figures[f"iou/{name}"] for name in matrix.classes] == pytest.approx(iou, abs=1e-12)
    assert figures["mean_f1"] == pytest.approx(np.mean(f1[1:]), abs=1e-12)
    assert figures["mean_iou"] == pytest.approx(np.mean(iou), abs=1e-12)
    assert figures["pixel_accuracy"] == pytest.approx((truth == prediction).mean(), abs=1e-7)
    assert figures["absent_classes"] == 0


def test_it_is_one_matrix_over_the_set_and_not_a_mean_over_images() -> None:
    """Image 1: 1 of 1 pixels of class 1 found. Image 2: 0 of 3 found. Set: 2 * 1 / (1 + 4), not (1 + 0) / 2."""
    matrix = ConfusionMatrix(["background", "a"])
    matrix.update(torch.tensor([[1, 0, 0, 0]]), torch.tensor([[1, 0, 0, 0]]))
    matrix.update(torch.tensor([[0, 0, 0, 0]]), torch.tensor([[1, 1, 1, 0]]))
    assert matrix.compute()["mean_f1"] == pytest.approx(2 / 5)
    assert matrix.counts.tolist() == [[4, 0], [3, 1]]


def test_absent_classes_are_left_out_and_counted() -> None:
    matrix = ConfusionMatrix(["background", "a", "absent", "only predicted"])
    matrix.update(torch.tensor([0, 1, 3]), torch.tensor([0, 1, 0]))
    figures = matrix.compute()
    assert math.isnan(figures["f1/absent"]) and math.isnan(figures["iou/absent"])
    assert figures["absent_classes"] == 1
    assert figures["f1/only predicted"] == 0
    assert figures["mean_f1"] == pytest.approx(0.5)  # (1 + 0) / 2
    assert figures["mean_iou"] == pytest.approx((0.5 + 1 + 0) / 3)


def test_nothing_counted_is_nan() -> None:
    figures = ConfusionMatrix(["background", "a"]).compute()
    assert math.isnan(figures["mean_f1"]) and math.isnan(figures["pixel_accuracy"])
    assert figures["absent_classes"] == 2


def test_unlabelled_pixels_do_not_count() -> None:
    matrix = ConfusionMatrix(["background", "a"])
    matrix.update(torch.tensor([0, 1, 1]), torch.tensor([0, UNLABELLED, 1], dtype=torch.uint8))
    assert matrix.counts.tolist() == [[1, 0], [0, 1]]


def test_wrong_labels_and_shapes_are_refused() -> None:
    matrix = ConfusionMatrix(["background", "a"])
    with pytest.raises(ValueError, match="holds 7, but there are only 2 classes"):
        matrix.update(torch.tensor([0, 1]), torch.tensor([7, UNLABELLED]))
    with pytest.raises(ValueError, match="differ in shape"):
        matrix.update(torch.zeros(2, 2), torch.zeros(2, 3))
    assert matrix.counts.sum() == 0


def test_states_of_processes_add_up() -> None:
    rng = np.random.default_rng(1)
    truth, prediction = torch.from_numpy(rng.integers(0, 3, (2, 2, 50)))
    whole, first, second, summed = (ConfusionMatrix("xyz") for _ in range(4))
    whole.update(prediction, truth)
    first.update(prediction[0], truth[0])
    second.update(prediction[1], truth[1])
    summed.load_state(first.state() + second.state())
    assert summed.compute() == whole.compute()
    assert summed.state().dtype == torch.float64 and summed.state().shape == (9,)
