"""Whether a network is judged on what it was trained on."""

from __future__ import annotations

from farl.downstream.task import OpenedSet


def samples_in_both(train: OpenedSet, test: OpenedSet) -> int:
    """How many test samples are in the training set too: the same face of the same file.

    The two parts of a layout that splits itself have one path and nothing in common. Sets of one fingerprint are the
    same, or one is a copy of the other; copies of some of the files are not noticed.
    """
    if train.about()["fingerprint"] == test.about()["fingerprint"]:
        return len(test)
    trained_on = set(train.sources())
    return sum(source in trained_on for source in test.sources())
