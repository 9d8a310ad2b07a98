"""Means with Student's interval, and the paired test of the study; plain Python, positive is better."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from farl.study.cells import Result
from farl.study.plans import SCRATCH, Plan

Figures = dict[str, Any]


def t_within(t: float, degrees: int) -> float:
    """Probability that |T| is at most t >= 0 (Abramowitz and Stegun 26.7.3 and 26.7.4, exact for whole degrees)."""
    theta = math.atan(t / math.sqrt(degrees))
    cosine = math.cos(theta)
    term = cosine if degrees % 2 else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(3 if degrees % 2 else 2, degrees - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    total *= math.sin(theta)
    return 2 / math.pi * (theta + total) if degrees % 2 else total


def t_quantile(confidence: float, degrees: int) -> float:
    """t with P(|T| <= t) = confidence.

    Raises:
        ValueError: a confidence outside 0..1, or fewer than 1 degree of freedom.
    """
    if not 0 < confidence < 1 or degrees < 1:
        raise ValueError(f"no interval of confidence {confidence} with {degrees} degrees of freedom")
    low, high = 0.0, 1.0
    while t_within(high, degrees) < confidence:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, degrees) < confidence else (low, middle)
    return high


def interval(values: Sequence[float], confidence: float) -> Figures:
    """ "n", "mean", and "low" and "high" of Student's interval of the mean (None with fewer than 2 values)."""
    n = len(values)
    if n == 0:
        return {"n": 0, "mean": None, "low": None, "high": None}
    mean = math.fsum(values) / n
    if n == 1:
        return {"n": 1, "mean": mean, "low": None, "high": None}
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = t_quantile(confidence, n - 1) * deviation / math.sqrt(n)
    return {"n": n, "mean": mean, "low": mean - half, "high": mean + half}


def compare(plan: Plan, results: Mapping[str, Result]) -> list[Figures]:
    """A row for each task, fraction and arm, in percent.

    "task", "fraction", "arm", "higher_is_better", "own" (see `interval`), "seeds" (those that are there), "missing"
    (seeds), and but for scratch "difference" (see `interval`, positive is better, over seeds that both have) and
    "separates" (None where the interval is not there or seeds are missing).
    """
    rows = []
    for task in plan.tasks:
        for fraction in plan.fractions:
            scores: dict[str, dict[int, float]] = {arm.name: {} for arm in plan.arms}
            higher = True
            for result in results.values():
                if result["kind"] == "tune" and (result["task"], result["fraction"]) == (task.name, fraction):
                    value, higher = result["metrics"][task.metric], result["higher_is_better"]
                    if value is not None:
                        scores[result["arm"]][result["seed"]] = 100 * value
            for arm in plan.arms:
                own = scores[arm.name]
                row: Figures = {"task": task.name, "fraction": fraction, "arm": arm.name, "higher_is_better": higher}
                row["seeds"] = [seed for seed in plan.seeds if seed in own]
                row["missing"] = [seed for seed in plan.seeds if seed not in own]
                row["own"] = interval([own[seed] for seed in row["seeds"]], plan.confidence)
                if arm.name != SCRATCH:
                    base, sign = scores[SCRATCH], 1 if higher else -1
                    pairs = [sign * (own[seed] - base[seed]) for seed in plan.seeds if seed in own and seed in base]
                    row["difference"] = interval(pairs, plan.confidence)
                    whole = len(pairs) == len(plan.seeds) and row["difference"]["low"] is not None
                    row["separates"] = row["difference"]["low"] > 0 if whole else None
                rows.append(row)
    return rows
