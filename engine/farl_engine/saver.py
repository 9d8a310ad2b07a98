"""When the loop saves, and which state: never one that a non-finite update was meant for."""

from __future__ import annotations

import time
from collections.abc import Callable

from farl_engine.optim import FiniteGuard
from farl_engine.run import Run


class Saver:
    """Rank 0 writes checkpoints, each of a good state, each step once; errors go to `failures`."""

    def __init__(self, run: Run, guard: FiniteGuard, failures: list[BaseException]) -> None:
        self._run = run
        self._guard = guard
        self._failures = failures
        self._saved_step = run.start_step or -1
        self._saved_at = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether rank 0 shall save after `step`: it alone looks at the clock, and no collective follows from it."""
        schedule = self._run.schedule
        minutes = (time.monotonic() - self._saved_at) / 60
        by_step = schedule.save_every and step % schedule.save_every == 0
        by_clock = schedule.save_minutes and minutes >= schedule.save_minutes
        return self._run.world.is_main and bool(by_step or by_clock)

    def save(self, step: int, *, background: bool = False) -> str | None:
        """Save the state after `step`, or after the last step before the guard tripped; None, or what was in the way.

        What is written in the background fails at a later call, which then writes anew.
        """
        run = self._run
        if not run.world.is_main:
            return None
        found = self._guard.read(self._guard.state().tolist())
        good_step = found[0] if found else step
        if self._attempt(run.store.wait):
            self._saved_step = -1
        self._saved_at = time.monotonic()
        if good_step == self._saved_step:
            return None
        problem = self._attempt(lambda: run.store.save(good_step, run.snapshot(good_step), background=background))
        self._saved_step = -1 if problem else good_step
        return problem

    def _attempt(self, action: Callable[[], None]) -> str | None:
        try:
            action()
        except OSError as error:
            self._failures.append(error)
            return str(error)
        return None
