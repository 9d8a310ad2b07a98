"""Figures from counts against scikit-learn's, which sees every pixel and every score."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from farl.downstream.attribute_scores import BINS, LIMIT, AttributeScores
from farl.downstream.confusion import UNLABELLED, ConfusionMatrix

metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")

CLASSES = ("background", "skin", "hair", "hat", "teeth", "scarf")
ABSENT, ONLY_TRUE, ONLY_FOUND = 3, 4, 5


def label_maps() -> tuple[np.ndarray, np.ndarray]:
    """Truth and prediction, uint8 [7, 12, 9]: a class that is nowhere, one never found, one never true."""
    random = np.random.default_rng(0)
    truth = random.choice([0, 1, 2, ONLY_TRUE], p=[0.5, 0.3, 0.17, 0.03], size=(7, 12, 9))
    prediction = random.choice([0, 1, 2, ONLY_FOUND], p=[0.4, 0.35, 0.2, 0.05], size=truth.shape)
    right = (random.random(truth.shape) < 0.6) & (truth != ONLY_TRUE)
    return truth.astype(np.uint8), np.where(right, truth, prediction).astype(np.uint8)


@pytest.mark.parametrize("unlabelled", [0.0, 0.3])
def test_figures_of_label_maps(unlabelled: float) -> None:
    truth, prediction = label_maps()
    truth[np.random.default_rng(1).random(truth.shape) < unlabelled] = UNLABELLED
    matrix = ConfusionMatrix(CLASSES)
    for found, true in zip(prediction, truth, strict=True):
        matrix.update(torch.from_numpy(found).long(), torch.from_numpy(true))
    figures = matrix.compute()

    known = truth != UNLABELLED
    true, found, numbers = truth[known], prediction[known], list(range(len(CLASSES)))
    assert np.array_equal(matrix.counts.numpy(), metrics.confusion_matrix(true, found, labels=numbers))
    f1 = metrics.f1_score(true, found, labels=numbers, average=None, zero_division=math.nan)
    iou = metrics.jaccard_score(true, found, labels=numbers, average=None, zero_division=0)
    assert math.isnan(f1[ABSENT]) and f1[ONLY_TRUE] == f1[ONLY_FOUND] == 0
    iou[ABSENT] = math.nan  # which scikit-learn cannot be told to give
    for kind, expected in (("f1", f1), ("iou", iou)):
        own = [figures[f"{kind}/{name}"] for name in CLASSES]
        assert own == pytest.approx(expected.tolist(), abs=1e-12, nan_ok=True)
    present = [number for number in numbers[1:] if number != ABSENT]
    assert figures["mean_f1"] == pytest.approx(
        metrics.f1_score(true, found, labels=present, average="macro", zero_division=0), abs=1e-12
    )
    assert figures["mean_iou"] == pytest.approx(
        metrics.jaccard_score(true, found, labels=[0, *present], average="macro", zero_division=0), abs=1e-12
    )
    assert figures["pixel_accuracy"] == pytest.approx(metrics.accuracy_score(true, found), abs=1e-12)


def attributes(grid: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Logits float32 and labels [600, 4], a tenth of them unknown; attributes of all shares, one never and one always
    positive. With a grid the logits are multiples of it, so that many are equal."""
    random = np.random.default_rng(2)
    labels = (random.random((600, 4)) < [0.05, 0.6, 0.0, 1.0]).astype(float)
    logits = 2.5 * random.normal(size=labels.shape) + 2 * labels - 1
    if grid is not None:
        logits = np.round(logits / grid) * grid
    labels[random.random(labels.shape) < 0.1] = math.nan
    return logits.astype(np.float32), labels


@pytest.mark.parametrize("grid", [None, 0.5], ids=["few ties", "many ties"])
def test_figures_of_attributes(grid: float | None) -> None:
    logits, labels = attributes(grid)
    scores = AttributeScores(["a", "b", "never", "always"])
    for part in np.array_split(np.arange(len(labels)), 7):
        scores.update(torch.from_numpy(logits[part]), torch.from_numpy(labels[part]))
    figures = scores.compute()

    wanted: dict[str, list[float]] = {"accuracy": [], "balanced": [], "ap": []}
    for name, score, label in zip(scores.names, logits.T, labels.T, strict=True):
        known = ~np.isnan(label)
        score, label = score[known], label[known]
        wanted["accuracy"].append(metrics.accuracy_score(label, score >= 0))
        assert figures[f"accuracy/{name}"] == pytest.approx(wanted["accuracy"][-1], abs=1e-12)
        constant = label.min() == label.max()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of classes that do not occur, where it leaves the mean to the other one
            balanced = math.nan if constant else metrics.balanced_accuracy_score(label, score >= 0)
            precision = metrics.average_precision_score(label, score) if label.any() else math.nan
        assert figures[f"balanced/{name}"] == pytest.approx(balanced, abs=1e-12, nan_ok=True)
        wanted["balanced"].append(balanced)
        wanted["ap"].append(precision)
        # Scores of one bin count as equal, and equal scores are taken as scikit-learn takes them.
        tied = metrics.average_precision_score(label, np.floor(score * (BINS / 2 / LIMIT))) if label.any() else math.nan
        assert figures[f"ap/{name}"] == pytest.approx(tied, abs=1e-12, nan_ok=True)
    assert figures["mean_accuracy"] == pytest.approx(np.mean(wanted["accuracy"]), abs=1e-12)
    assert figures["balanced_accuracy"] == pytest.approx(np.nanmean(wanted["balanced"]), abs=1e-12)
    distance = abs(figures["average_precision"] - np.nanmean(wanted["ap"]))
    assert distance <= (1e-12 if grid else figures["average_precision_error"])
