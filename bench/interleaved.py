"""Loaders timed in turns: every round starts each contender afresh, so that none profits from a quiet moment.

A round takes the time of some batches after the first ones, by which the workers are under way and no batch is left
that was made before. The ratio of two contenders is taken round by round; the smallest and the largest of seven such
ratios hold their median with a confidence of 98 % (1 - 2 / 2^7), whatever their distribution is.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

ROUNDS = 7
# More than any contender makes ahead.
FIRST_BATCHES = 4

Start = Callable[[], Generator[Any, None, None]]


def take_turns(
    starts: dict[str, Start],
    batches: int,
    *,
    first: int = FIRST_BATCHES,
    rounds: int = ROUNDS,
    finish: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds a batch of each contender, one figure a round.

    Args:
        starts: each returns a generator of batches, which is closed after its turn.
        batches: how many are timed. first: how many before these are not.
        finish: waits for what is still under way on a device.
    """
    times: dict[str, list[float]] = {name: [] for name in starts}
    names = list(starts)
    for turn in range(rounds):
        # Not always behind the same one.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            with contextlib.closing(starts[name]()) as stream:
                for _ in range(first):
                    next(stream)
                finish()
                begun = time.perf_counter()
                for _ in range(batches):
                    next(stream)
                finish()
                times[name].append((time.perf_counter() - begun) / batches)
            del stream
            gc.collect()
    return times


@dataclass(frozen=True)
class Ratio:
    """Median and range of ratios taken round by round."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, slower: Sequence[float], faster: Sequence[float]) -> Ratio:
        """How many times as long `slower` takes."""
        ratios = [a / b for a, b in zip(slower, faster, strict=True)]
        return cls(statistics.median(ratios), min(ratios), max(ratios))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


class Replay:
    """A clock that jumps by recorded times: pytest-benchmark reads rounds from it that were measured in turns."""

    def __init__(self) -> None:
        self._now = 0.0
        self._left: Iterator[float] = iter(())

    def __call__(self) -> float:
        return self._now

    def load(self, seconds: Sequence[float]) -> Callable[[], None]:
        """The function to benchmark, once for each of `seconds`."""
        self._left = iter(seconds)
        return self._jump

    def _jump(self) -> None:
        self._now += next(self._left)
