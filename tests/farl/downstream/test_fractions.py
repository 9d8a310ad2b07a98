"""Low-data fractions: fixed, nested, repeated."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from farl.downstream.fractions import FractionSet, fraction_indices


class Numbers:
    def __len__(self) -> int:
        return 200

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"number": index}

    def about(self) -> dict[str, Any]:
        return {"layout": "numbers", "samples": 200}


def test_a_smaller_fraction_lies_inside_a_larger_one() -> None:
    parts = [fraction_indices(500, fraction) for fraction in (0.002, 0.01, 0.1, 0.5, 1.0)]
    assert [len(part) for part in parts] == [1, 5, 50, 250, 500]
    for small, large in pairwise(parts):
        assert large[: len(small)] == small
    assert sorted(parts[-1]) == list(range(500))
    assert parts[2] != sorted(parts[2])


@pytest.mark.parametrize(("size", "fraction", "count"), [(100, 0.07, 7), (7, 0.5, 4), (10, 0.001, 1), (3, 1 / 3, 1)])
def test_counts_round_up(size: int, fraction: float, count: int) -> None:
    assert len(fraction_indices(size, fraction)) == count


def test_the_choice_is_fixed() -> None:
    assert fraction_indices(1000, 0.004) == fraction_indices(1000, 0.004) == [660, 39, 155, 640]
    assert fraction_indices(1000, 0.004, seed=1) != fraction_indices(1000, 0.004)


def test_samples_repeat_to_the_old_length() -> None:
    part = FractionSet(Numbers(), 0.05)
    assert len(part) == 200
    counts = Counter(part[index]["number"] for index in range(len(part)))
    assert counts == dict.fromkeys(fraction_indices(200, 0.05), 20)
    assert part.about() == {
        "layout": "numbers",
        "samples": 200,
        "fraction": 0.05,
        "fraction_seed": 123,
        "samples_used": 10,
    }


def test_the_whole_set_is_itself() -> None:
    part = FractionSet(Numbers(), 1.0)
    assert [part[index]["number"] for index in range(200)] == list(range(200))


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, float("nan")])
def test_fractions_outside(fraction: float) -> None:
    with pytest.raises(ValueError, match="more than 0 and at most 1"):
        fraction_indices(10, fraction)
