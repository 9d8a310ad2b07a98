from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farl.evaluation.measures import accuracies, average_precision, mean_of_known, roc_auc


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30))
def test_equal_to_the_definitions(items: list[tuple[int, bool]]) -> None:
    scores = np.array([score for score, _ in items], dtype=float)
    positive = np.array([label for _, label in items])
    column, labels = torch.from_numpy(scores)[:, None], torch.from_numpy(positive.astype(np.float32))[:, None]

    precision, recall_before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        chosen = scores >= threshold
        recall = (chosen & positive).sum() / max(1, positive.sum())
        precision += (recall - recall_before) * (chosen & positive).sum() / chosen.sum()
        recall_before = recall
    got = average_precision(column, labels)
    assert torch.isnan(got).item() if not positive.any() else got.item() == pytest.approx(precision)

    pairs = [(p > n) + 0.5 * (p == n) for p in scores[positive] for n in scores[~positive]]
    area = roc_auc(column, labels)
    assert torch.isnan(area).item() if not pairs else area.item() == pytest.approx(np.mean(pairs))


def test_accuracies_leave_out_unknown_labels() -> None:
    labels = torch.tensor([[1.0, 0.0], [0.0, torch.nan], [1.0, 0.0], [torch.nan, 0.0]])
    decisions = torch.tensor([[True, False], [True, True], [True, True], [True, False]])
    accuracy, balanced = accuracies(decisions, labels)
    assert accuracy.tolist() == pytest.approx([2 / 3, 2 / 3])
    assert balanced[0].item() == pytest.approx(0.5)
    assert balanced[1].isnan()  # no positive at all
    assert mean_of_known(balanced) == pytest.approx(0.5)
    assert mean_of_known(balanced[1:]) is None
