"""Figures from counts against the definitions written out on the scores themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from farl.downstream.attribute_scores import BINS, AttributeScores, binned_average_precision

NAN = float("nan")


def exact_average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the positives of the precision among all that score at least as high, item by item."""
    precisions = [labels[scores >= score].mean() for score in scores[labels == 1]]
    return float(np.mean(precisions)) if precisions else NAN


def scores_of(logits: Tensor, labels: Tensor) -> AttributeScores:
    scores = AttributeScores([f"a{i}" for i in range(labels.shape[1])])
    scores.update(logits, labels)
    return scores


def test_a_case_by_hand() -> None:
    logits = torch.tensor([[2.0, -1.0], [1.0, -1.0], [-1.0, 3.0], [-2.0, -3.0]])
    labels = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, NAN]])
    figures = scores_of(logits, labels).compute()
    assert figures["accuracy/a0"] == 0.5 and figures["accuracy/a1"] == 1
    assert figures["majority/a0"] == 0.5 and figures["majority/a1"] == pytest.approx(2 / 3)
    assert figures["balanced/a0"] == 0.5 and figures["balanced/a1"] == 1
    assert figures["ap/a0"] == pytest.approx((1 + 2 / 3) / 2) and figures["ap/a1"] == 1
    assert figures["positives/a0"] == 0.5 and figures["positives/a1"] == pytest.approx(1 / 3)
    assert figures["mean_accuracy"] == 0.75 and figures["majority_accuracy"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert figures["chance_average_precision"] == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_the_threshold_is_exact() -> None:
    logits = torch.tensor([[0.0], [1e-30], [-1e-30], [-0.001], [1e9], [-1e9], [math.inf], [-math.inf]])
    labels = torch.tensor([[1.0], [1.0], [0.0], [0.0], [1.0], [0.0], [1.0], [0.0]])
    figures = scores_of(logits, labels).compute()
    assert figures["accuracy/a0"] == 1 and figures["balanced/a0"] == 1
    assert scores_of(logits, 1 - labels).compute()["accuracy/a0"] == 0


@pytest.mark.parametrize(("images", "spread"), [(40, 2.0), (800, 2.0), (800, 0.05), (800, 30.0)])
@pytest.mark.parametrize("share", [0.02, 0.4])
def test_average_precision_lies_within_the_error_that_is_stated(images: int, spread: float, share: float) -> None:
    random = np.random.default_rng([images, int(100 * share)])
    labels = (random.random(images) < share).astype(float)
    labels[0] = 1
    logits = (spread * (random.normal(size=images) + labels)).astype(np.float32)
    figures = scores_of(torch.from_numpy(logits)[:, None], torch.from_numpy(labels)[:, None]).compute()
    exact = exact_average_precision(logits, labels)
    assert abs(figures["ap/a0"] - exact) <= figures["average_precision_error"] + 1e-12
    # Where few share a bin the figure is as good as exact: the bound must not be loose.
    if spread == 2.0:
        assert figures["average_precision_error"] < 0.05


def test_the_error_of_a_set_as_large_as_celeba_is_small() -> None:
    random = np.random.default_rng(0)
    labels = (random.random(20000) < 0.2).astype(float)
    logits = (2.5 * random.normal(size=20000) + 5 * labels - 3).astype(np.float32)
    figures = scores_of(torch.from_numpy(logits)[:, None], torch.from_numpy(labels)[:, None]).compute()
    assert figures["average_precision_error"] < 5e-4
    order = np.argsort(-logits, kind="stable")
    precision = labels[order].cumsum() / np.arange(1, 20001)
    assert abs(figures["ap/a0"] - precision[labels[order] == 1].mean()) <= figures["average_precision_error"]


def test_the_bounds_hold_for_any_order_inside_a_bin() -> None:
    """All orders, and ties, of few items whose bins are known."""
    random = np.random.default_rng(1)
    for _ in range(200):
        positive, negative = random.integers(0, 4, (2, 5))
        positive[2] += 1
        estimate, error = binned_average_precision(*(torch.from_numpy(x).double() for x in (positive, negative)))
        labels = np.concatenate([[1] * p + [0] * n for p, n in zip(positive, negative, strict=True)])
        bins = np.repeat(np.arange(5), positive + negative)
        for _ in range(10):
            inside = random.integers(0, 4, len(labels)) / 4
            exact = exact_average_precision(bins + inside, labels)
            assert abs(float(estimate) - exact) <= float(error) + 1e-12
        assert float(estimate) == pytest.approx(exact_average_precision(bins, labels))


def test_both_bounds_are_reached() -> None:
    """One bin of two positives and three negatives: negatives first gives the lowest precision, positives tied in
    front the highest."""
    estimate, error = binned_average_precision(torch.tensor([2.0]).double(), torch.tensor([3.0]).double())
    lowest, highest = (1 / 4 + 2 / 5) / 2, 1.0
    assert float(estimate) == pytest.approx(2 / 5)
    assert float(error) == pytest.approx(max(2 / 5 - lowest, highest - 2 / 5))


def test_states_of_parts_add_up_to_that_of_the_whole() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(50, 3) * 3, (torch.rand(50, 3) < 0.3).float()
    labels[torch.rand(50, 3) < 0.2] = NAN
    whole = scores_of(logits, labels)
    parts = [scores_of(logits[i::3], labels[i::3]).state() for i in range(3)]
    assert parts[0].dtype == torch.float64 and parts[0].shape == (3 * 2 * BINS,)
    total = AttributeScores(["a0", "a1", "a2"])
    total.load_state(sum(parts[1:], parts[0]))
    assert total.compute() == whole.compute()
    assert whole.counts.sum() == (~labels.isnan()).sum()


def test_what_has_no_meaning_is_left_out_of_the_means() -> None:
    logits = torch.tensor([[1.0, 1.0, 1.0], [2.0, -1.0, 1.0]])
    labels = torch.tensor([[1.0, 0.0, NAN], [1.0, 0.0, NAN]])
    figures = scores_of(logits, labels).compute()
    assert figures["mean_accuracy"] == 0.75 and figures["majority_accuracy"] == 1
    assert math.isnan(figures["accuracy/a2"]) and math.isnan(figures["balanced/a0"]) and math.isnan(figures["ap/a1"])
    assert math.isnan(figures["balanced_accuracy"])
    assert figures["average_precision"] == 1 and figures["chance_average_precision"] == 1
    assert math.isnan(AttributeScores(["x"]).compute()["mean_accuracy"])


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must both be \[B, 2\]"):
        AttributeScores(["a", "b"]).update(torch.zeros(3, 2), torch.zeros(3, 1))
