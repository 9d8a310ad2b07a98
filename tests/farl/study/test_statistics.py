from __future__ import annotations

import math
from typing import Any

import pytest

from farl.study.plans import Plan
from farl.study.statistics import compare, interval, t_quantile, t_within

# Two-sided 95 % and 99 %, as printed in tables of Student's distribution.
TABLE = [(1, 12.706, 63.657), (2, 4.303, 9.925), (3, 3.182, 5.841), (4, 2.776, 4.604), (5, 2.571, 4.032)]
TABLE += [(9, 2.262, 3.250), (10, 2.228, 3.169), (29, 2.045, 2.756), (30, 2.042, 2.750), (120, 1.980, 2.617)]


@pytest.mark.parametrize(("degrees", "at_95", "at_99"), TABLE, ids=[f"df{row[0]}" for row in TABLE])
def test_quantiles_against_the_table(degrees: int, at_95: float, at_99: float) -> None:
    assert t_quantile(0.95, degrees) == pytest.approx(at_95, abs=5e-4)
    assert t_quantile(0.99, degrees) == pytest.approx(at_99, abs=5e-4)


def test_one_degree_of_freedom_is_cauchy() -> None:
    assert t_within(1.0, 1) == pytest.approx(0.5)
    assert t_within(math.tan(0.4 * math.pi), 1) == pytest.approx(0.8)


def test_no_interval_without_degrees_of_freedom() -> None:
    with pytest.raises(ValueError, match="0 degrees of freedom"):
        t_quantile(0.95, 0)


def test_interval_by_hand() -> None:
    # Deviations -2 -1 0 1 2: variance 10 / 4, standard error sqrt(2.5 / 5), t(4) 2.776.
    found = interval([1, 2, 3, 4, 5], 0.95)
    assert found["mean"] == 3
    assert found["high"] - 3 == pytest.approx(2.7764 * math.sqrt(0.5), abs=1e-3)
    assert found["low"] + found["high"] == pytest.approx(6)
    assert interval([7.0], 0.95) == {"n": 1, "mean": 7.0, "low": None, "high": None}
    assert interval([], 0.95)["mean"] is None


def _results(task: str, metric: str, scores: dict[tuple[str, int], float], *, higher: bool) -> dict[str, Any]:
    return {
        f"{arm}-{seed}": {
            "kind": "tune",
            "task": task,
            "fraction": 0.1,
            "arm": arm,
            "seed": seed,
            "metrics": {metric: value},
            "higher_is_better": higher,
        }
        for (arm, seed), value in scores.items()
    }


def _row(rows: list[dict[str, Any]], task: str, arm: str) -> dict[str, Any]:
    return next(row for row in rows if (row["task"], row["fraction"], row["arm"]) == (task, 0.1, arm))


def test_differences_are_paired_by_seed_and_oriented(tiny: Plan) -> None:
    # Seeds differ by far more than arms: only pairs can tell them apart.
    errors = {("scratch", 0): 0.30, ("mim", 0): 0.28, ("scratch", 1): 0.10, ("mim", 1): 0.0802}
    rows = compare(tiny, _results("alignment", "nme_diagonal", errors, higher=False))
    row = _row(rows, "alignment", "mim")
    assert row["difference"]["mean"] == pytest.approx(1.99)
    # Two values: t(1) = 12.706 times half their distance.
    assert row["difference"]["low"] == pytest.approx(1.99 - 12.7062 * 0.01, abs=1e-4)
    assert row["separates"] is True
    worse = compare(tiny, _results("parsing", "mean_f1", errors, higher=True))
    assert _row(worse, "parsing", "mim")["difference"]["mean"] == pytest.approx(-1.99)
    assert _row(worse, "parsing", "mim")["separates"] is False


def test_a_missing_seed_is_told_and_nothing_is_judged(tiny: Plan) -> None:
    scores = {("scratch", 0): 0.5, ("mim", 0): 0.6, ("mim", 1): 0.7}
    rows = compare(tiny, _results("parsing", "mean_f1", scores, higher=True))
    row = _row(rows, "parsing", "mim")
    assert (row["seeds"], row["difference"]["n"], row["separates"]) == ([0, 1], 1, None)
    assert _row(rows, "parsing", "scratch")["missing"] == [1]
    assert "difference" not in _row(rows, "parsing", "scratch")
    assert _row(rows, "parsing", "contrast")["own"]["n"] == 0
