"""Whether two ways of computing the same training learn the same: the arithmetic of comparing loss curves.

In fp32 two engines differ by rounding alone, and the rule is plain: the largest relative difference of the loss, over
the updates compared, is at most 1e-4.

In bfloat16 that cannot be asked for. A rounding difference in one update changes the weights, the next update starts
from other weights, and within some hundred updates two runs may be as far apart as two draws of the same training:
then the difference at one update is a random number, and its largest value over 500 of them says little. What can be
asked is that an engine's curve is no farther from fp32's than bfloat16 itself puts a curve, and the plain engine
(eager) shows how far that is:

    ratio = geometric mean over windows of  rms(engine - fp32) / rms(eager - fp32)  <= 2

with differences relative to fp32's loss, and windows of updates 1-16, 17-32, 33-64, 65-128, ... Both are measured
against fp32, not against each other, because the difference of two independent errors of one size is already 1.4 of
it. The root mean square within a window averages the chance of single updates, at which a ratio would divide by
numbers near zero. Windows double because differences of later updates hang together for longer, and because early
ones, before chaos hides what is wrong, then count as much as late ones. The geometric mean treats too large and too
small alike: for two engines of equal error the ratio is about 1, whatever chance makes of a single window, and 2
leaves room for that.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

Curve = Mapping[int, float]  # completed updates -> loss

EXACT_BOUND = 1e-4
EXACT_UPDATES = 100
ROUNDED_BOUND = 2.0
ROUNDED_UPDATES = 500
FIRST_WINDOW = 16


@dataclass(frozen=True)
class Comparison:
    """How far an engine's loss curve is from another one.

    Attributes:
        engine, against: names of the two.
        updates: how many both have (a run may have been cut). asked: how many there should be.
        largest: largest relative difference, at update `at`. rms: root mean square of the relative differences.
        ratio: where there is a third curve to measure against, see the module; else None.
        drift: mean of the signed relative differences over the second half: what chance averages out is small in it.
        bound: what `ratio`, or where that is None `largest`, must not pass.
    """

    engine: str
    against: str
    updates: int
    asked: int
    largest: float
    at: int
    rms: float
    drift: float
    bound: float
    ratio: float | None = None

    @property
    def measured(self) -> float:
        return self.largest if self.ratio is None else self.ratio

    @property
    def passed(self) -> bool:
        """False also where a loss is not a number, or there is nothing to compare."""
        return self.updates > 0 and self.measured <= self.bound


def compare_exact(
    engine: str, curve: Curve, against: str, reference: Curve, *, asked: int = EXACT_UPDATES, bound: float = EXACT_BOUND
) -> Comparison:
    """The rule of fp32: the largest relative difference."""
    steps = [step for step in _common(curve, reference) if step <= asked]
    return _compared(engine, curve, against, reference, steps, asked, bound, None)


def compare_rounded(
    engine: str,
    curve: Curve,
    plain: Curve,
    exact: Curve,
    *,
    asked: int = ROUNDED_UPDATES,
    bound: float = ROUNDED_BOUND,
) -> Comparison:
    """The rule of bfloat16: distance from `exact` (fp32), in units of the distance that `plain` (eager) has."""
    steps = _common(curve, plain, exact)
    mine, theirs = (np.abs(relative(each, exact, steps)) for each in (curve, plain))
    with np.errstate(divide="ignore"):
        logs = [np.log(_ratio(mine[part], theirs[part])) for part in windows(len(steps))]
    ratio = float(np.exp(np.mean(logs))) if steps else math.nan
    return _compared(engine, curve, "fp32", exact, steps, asked, bound, ratio)


def windows(updates: int) -> list[slice]:
    """Stretches of a curve of so many updates, each up to twice as far as the one before; a short rest joins one."""
    ends = [0]
    while (end := max(FIRST_WINDOW, 2 * ends[-1])) <= updates:
        ends.append(end)
    last = ends[-1] - ends[-2] if len(ends) > 1 else 0
    if updates - ends[-1] >= max(1, last // 2):
        ends.append(updates)
    ends[-1] = updates
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def relative(curve: Curve, reference: Curve, steps: list[int]) -> np.ndarray:
    """float64 [len(steps)]: signed differences over the reference's absolute values."""
    mine = np.array([curve[step] for step in steps], dtype=np.float64)
    right = np.array([reference[step] for step in steps], dtype=np.float64)
    return (mine - right) / np.abs(right)


def _common(*curves: Curve) -> list[int]:
    return sorted(set.intersection(*(set(curve) for curve in curves)))


def _ratio(mine: np.ndarray, theirs: np.ndarray) -> float:
    top, bottom = _rms(mine), _rms(theirs)
    if bottom == 0:
        # Eager without any rounding error: only a curve without any is as good.
        return math.nan if math.isnan(top) else 1.0 if top == 0 else math.inf
    return top / bottom


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values)))) if values.size else math.nan


def _compared(
    engine: str,
    curve: Curve,
    against: str,
    reference: Curve,
    steps: list[int],
    asked: int,
    bound: float,
    ratio: float | None,
) -> Comparison:
    if not steps:
        return Comparison(engine, against, 0, asked, math.nan, 0, math.nan, math.nan, bound, ratio)
    signed = relative(curve, reference, steps)
    # argmax takes a NaN for the largest, which is what a NaN should be here.
    place = int(np.argmax(np.abs(signed)))
    return Comparison(
        engine=engine,
        against=against,
        updates=len(steps),
        asked=asked,
        largest=float(np.abs(signed[place])),
        at=steps[place],
        rms=_rms(signed),
        drift=float(np.mean(signed[len(signed) // 2 :])),
        bound=bound,
        ratio=ratio,
    )
