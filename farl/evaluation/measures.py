"""Figures of binary classifiers, one column an attribute; NaN where a figure has no meaning.

Labels are float32 [N, A] of 0, 1 or NaN (unknown: left out of that attribute's figures).
"""

from __future__ import annotations

import torch
from torch import Tensor


def average_precision(scores: Tensor, labels: Tensor) -> Tensor:
    """Area under the precision-recall steps, sum over ranks of (recall step) * precision, as scikit-learn's.

    Items of one score enter together, so the order among ties does not matter. Guessing gives the share of positives.

    Args:
        scores: [N, A]; labels: [N, A].

    Returns:
        float64 [A], NaN where no label is positive.
    """
    return torch.stack([_average_precision(s, y) for s, y in _columns(scores, labels)])


def roc_auc(scores: Tensor, labels: Tensor) -> Tensor:
    """Chance that a positive scores above a negative, ties half: float64 [A], NaN where a class is absent."""
    return torch.stack([_roc_auc(s, y) for s, y in _columns(scores, labels)])


def accuracies(decisions: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Accuracy and balanced accuracy (mean of the recalls of both classes), each float64 [A].

    Args:
        decisions: bool [N, A]; labels: [N, A].

    Returns:
        NaN where nothing is labelled; the balanced one also where a class is absent.
    """
    known = ~labels.isnan()
    positive, negative = known & (labels == 1), known & (labels == 0)
    hits = (decisions & positive).sum(0).double()
    rejections = (~decisions & negative).sum(0).double()
    accuracy = (hits + rejections) / known.sum(0)
    return accuracy, (hits / positive.sum(0) + rejections / negative.sum(0)) / 2


def mean_of_known(values: Tensor) -> float | None:
    """Mean without the NaN; None where there is nothing else (JSON has no NaN)."""
    known = values[~values.isnan()]
    return known.mean().item() if len(known) else None


def number_or_none(value: Tensor) -> float | None:
    return None if value.isnan() else value.item()


def _columns(scores: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    known = ~labels.isnan()
    return [(scores[known[:, a], a].double(), labels[known[:, a], a] == 1) for a in range(labels.shape[1])]


def _average_precision(scores: Tensor, positive: Tensor) -> Tensor:
    total = positive.sum()
    if total == 0:
        return torch.tensor(torch.nan, dtype=torch.float64)
    values, order = scores.sort(descending=True)
    hits = positive[order].double().cumsum(0)
    seen = torch.arange(1, len(values) + 1, dtype=torch.float64)
    last_of_tie = torch.ones(len(values), dtype=torch.bool)
    last_of_tie[:-1] = values[1:] != values[:-1]
    hits, seen = hits[last_of_tie], seen[last_of_tie]
    return ((hits.diff(prepend=hits.new_zeros(1)) / total) * (hits / seen)).sum()


def _roc_auc(scores: Tensor, positive: Tensor) -> Tensor:
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if positives == 0 or negatives == 0:
        return torch.tensor(torch.nan, dtype=torch.float64)
    _, inverse, counts = scores.unique(return_inverse=True, return_counts=True)
    # Mean rank of each distinct score, from 1.
    rank = counts.cumsum(0).double() - (counts.double() - 1) / 2
    return (rank[inverse][positive].sum() - positives * (positives + 1) / 2) / (positives * negatives)
