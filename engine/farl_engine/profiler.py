"""Records some updates of a run with torch.profiler, and tells what they were spent on.

`part("name")` around a stretch of the step gives it a row of its own, in the trace and in the table; it costs next to
nothing while no profiler records.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from farl_engine.trace import DRAIN, PART, Breakdown, read_trace

_NOTHING = contextlib.nullcontext()
_recording = False
_notes: dict[str, float] = {}


def part(name: str) -> contextlib.AbstractContextManager[object]:
    """A context whose time, and whose backward pass, are the part `name` of an update; the innermost one counts.

    Nothing in code that torch.compile compiles: it has no ranges inside.
    """
    if torch.compiler.is_compiling() or not _recording:
        return _NOTHING
    return record_function(PART + name)


def note(name: str, value: float) -> None:
    """Add to a sum that `Recording.notes` gives by update; nothing while no profiler records."""
    if _recording:
        _notes[name] = _notes.get(name, 0.0) + value


@dataclass(frozen=True)
class Recording:
    """What a profiler found.

    Attributes:
        trace: the gzipped trace, for https://ui.perfetto.dev.
        first_step: completed updates before the recorded ones.
        plain_seconds: of an update shortly before, without the profiler.
        notes: mean by update of what `note` was given.
    """

    trace: Path
    first_step: int
    plain_seconds: float
    breakdown: Breakdown
    notes: dict[str, float]


class Profiler:
    """Records `updates` updates of this process, a few after its first one; use it as a context around the run.

    A run that ends early, at a signal too, gives those recorded so far. One that fails gives nothing. Neither a full
    disk nor a trace that cannot be read ends the run.

    Args:
        folder: where trace.json.gz goes.
        report: called with what was found, in `begin` or when the context is left.
        say: takes one line for the user.
    """

    # Updates before the first recorded one: the first of a run is no measure, two are timed, in one torch's profiler
    # warms up.
    WARM_UP = 5

    def __init__(
        self,
        folder: Path,
        *,
        updates: int,
        device: torch.device,
        report: Callable[[Recording], None],
        say: Callable[[str], None],
    ) -> None:
        self._folder = folder
        self._updates = updates
        self._device = device
        self._report = report
        self._say = say
        self._begun = 0
        self._first_step = 0
        self._clock = self._plain_seconds = 0.0
        self._profile: profile | None = None

    def begin(self, step: int) -> None:
        """To be called before each update, with the number of those completed."""
        number, self._begun = self._begun, self._begun + 1
        if number > self.WARM_UP + self._updates:
            return
        if number == self.WARM_UP - 3:
            self._wait()
            self._clock = time.perf_counter()
        elif number == self.WARM_UP - 1:
            self._wait()
            self._plain_seconds = (time.perf_counter() - self._clock) / 2
            self._start()
        elif number >= self.WARM_UP:
            self._next(step, number - self.WARM_UP)

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        # Else a torch built for CUDA calls it an error that a machine has none.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=1, active=self._updates, repeat=1),
            acc_events=True,
        )
        self._profile.start()

    def _next(self, step: int, recorded: int) -> None:
        global _recording
        assert self._profile is not None
        if recorded == 0:
            self._first_step = step
            self._wait()
            _notes.clear()
            _recording = True
        elif recorded == self._updates:
            with record_function(DRAIN):
                self._wait()
        self._profile.step()
        if recorded == self._updates:
            self._finish(recorded)

    def _finish(self, recorded: int) -> None:
        """Stop, and report the first `recorded` updates."""
        global _recording
        if self._profile is None:
            return
        running, self._profile, _recording = self._profile, None, False
        running.stop()
        if recorded == 0:
            return
        try:
            trace = self._export(running)
            with gzip.open(trace, "rt") as file:
                events = json.load(file)["traceEvents"]
            noted = min(self._begun - self.WARM_UP, self._updates)
            notes = {name: value / noted for name, value in _notes.items()}
            breakdown = read_trace(events, recorded)
            self._report(Recording(trace, self._first_step, self._plain_seconds, breakdown, notes))
        except Exception as error:
            # Days of training are worth more than a table.
            self._say(f"no profile: {type(error).__name__}: {error}; the run goes on")

    def _export(self, running: profile) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary, trace = self._folder / ".trace.json.gz", self._folder / "trace.json.gz"
        try:
            running.export_chrome_trace(str(temporary))
            temporary.replace(trace)
        finally:
            temporary.unlink(missing_ok=True)
        return trace

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def __enter__(self) -> Profiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        # The update begun last may be whole, but its window holds the end of the run as well.
        whole = min(self._begun - self.WARM_UP - 1, self._updates)
        if kind is None and self._begun <= self.WARM_UP + 1:
            self._say(f"no profile: the run ended before update {self.WARM_UP + 2}, which the profiler needs")
        self._finish(max(whole, 0) if kind is None else 0)
