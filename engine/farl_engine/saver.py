"""When the loop saves, and which state: never one that a non-finite update was meant for."""

from __future__ import annotations

import time
from collections.abc import Callable

from farl_engine.distributed import Verdict, broadcast_object
from farl_engine.optim import FiniteGuard
from farl_engine.run import Run
from farl_engine.sharding import gathered, is_sharded


class Saver:
    """Rank 0 writes checkpoints, each of a good state, each step once; errors go to `failures`.

    Where the model is shared out (see `farl_engine.sharding`), all ranks save together, and none can do so alone.
    """

    def __init__(self, run: Run, guard: FiniteGuard, failures: list[BaseException]) -> None:
        self._run = run
        self._guard = guard
        self._failures = failures
        self._together = is_sharded(run.model)
        self._saved_step = run.start_step or -1
        self._saved_at = time.monotonic()
        self._asked = False

    def asks_for_all(self) -> bool:
        """Whether this rank shall ask the others to save with it: rank 0 by its clock, once, where all must."""
        if not (self._together and self._run.world.is_main and self._by_clock()) or self._asked:
            return False
        self._asked = True
        return True

    def is_due(self, step: int, agreed: Verdict) -> bool:
        """Whether this rank shall save after `step`.

        Rank 0 alone looks at the clock and no collective follows from it; where all must save together, they do so at
        the same steps and when they `agreed` on it.
        """
        save_every = self._run.schedule.save_every
        by_step = bool(save_every) and step % save_every == 0
        if self._together:
            return by_step or agreed is Verdict.SAVE
        return self._run.world.is_main and (by_step or self._by_clock())

    def save(self, step: int, *, background: bool = False) -> str | None:
        """Save the state after `step`, or after the last step before the guard tripped; None, or what was in the way.

        What is written in the background fails at a later call, which then writes anew. Called on every rank alike.
        """
        run = self._run
        if not (run.world.is_main or self._together):
            return None
        found = self._guard.read(self._guard.state().tolist())
        good_step = found[0] if found else step
        if self._attempt(run.store.wait):
            self._saved_step = -1
        self._saved_at, self._asked = time.monotonic(), False
        wanted = good_step != self._saved_step
        if self._together:
            # Rank 0 alone knows what has become of its files.
            wanted = broadcast_object(run.world, wanted)
        if not wanted:
            return None
        state = run.snapshot(good_step)
        if self._together:
            state = gathered(state)
        if not run.world.is_main:
            return None
        problem = self._attempt(
            lambda: run.store.save(good_step, state, background=background, copy=not self._together)
        )
        self._saved_step = -1 if problem else good_step
        return problem

    def save_alone(self, step: int) -> None:
        """Save before an end that the other ranks learn of by their collectives alone, or say why that cannot be."""
        if not self._together:
            self.save(step)
            return
        self._attempt(self._run.store.wait)
        kept = self._run.store.latest()
        last = f"the last checkpoint is of step {kept}" if kept is not None else "there is no checkpoint"
        print(
            f"warning: the state after step {step} is not saved: its weights are shared out, and the other processes "
            f"cannot be asked for theirs any more; {last}",
            flush=True,
        )

    def _by_clock(self) -> bool:
        minutes = self._run.schedule.save_minutes
        return bool(minutes) and (time.monotonic() - self._saved_at) / 60 >= minutes

    def _attempt(self, action: Callable[[], None]) -> str | None:
        try:
            action()
        except OSError as error:
            self._failures.append(error)
            return str(error)
        return None
