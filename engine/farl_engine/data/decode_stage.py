"""The stage of the loader that decodes whole batches: several runs in flight, and none lost to a bad image.

A batch goes to the decoder in runs of bounded size. A run that the decoder refuses is cut into pieces, down to the
refused images, which the CPU decoder judges; so what becomes of a sample does not depend on its neighbours.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from numpy.typing import NDArray
from torch import Tensor

# Decoded pixels in one run, at most, unless one image has more: three bytes each, of device memory.
MAX_RUN_PIXELS = 1 << 27
# A refused run is done again at most four times over, whatever the share of bad images: 512, 8 x 64, 8 x 8, 8 x 1.
_PIECES = 8

Note = Callable[[str, int], None]


class Session(Protocol):
    """What the stage needs of a `DaliSession`."""

    max_runs: int

    def empty(self, count: int, *, pin: bool) -> tuple[Tensor, Tensor | None]: ...
    def submit(self, run: Sequence[Any]) -> None: ...
    def collect(self, rows: Sequence[int], images: Tensor, tokens: Tensor | None) -> bool: ...
    def fill(
        self, rows: Sequence[int], pictures: Sequence[tuple[NDArray, NDArray | None]], images: Tensor, tokens: Any
    ) -> None: ...
    def synchronize(self) -> None: ...
    def close(self) -> None: ...


class DecodeJob(Protocol):
    """What the stage needs of a batch in the making."""

    step: int
    encoded: Mapping[int, Any]
    images: Tensor | None
    token_images: Tensor | None

    def begin(self, session: Session) -> None:
        """Makes room for the pictures."""

    def refuse(self, row: int, note: Note) -> None:
        """Takes a row back that the decoder has refused."""

    def complete(self, session: Session, note: Note) -> None:
        """Called once, when all runs are done."""


class _Run(NamedTuple):
    job: DecodeJob
    rows: Sequence[int]


class DecodeStage:
    """Takes batches, hands them back decoded, not always in the same order; for one thread at a time.

    Attributes:
        seconds: time spent in `advance` so far.
    """

    def __init__(self, session: Session) -> None:
        self.seconds = 0.0
        self._session = session
        self._waiting: deque[_Run] = deque()
        self._in_flight: deque[_Run] = deque()
        self._runs_left: Counter[int] = Counter()

    @property
    def busy(self) -> bool:
        """Whether `advance` has something to do."""
        return bool(self._waiting or self._in_flight)

    def put(self, job: DecodeJob, note: Note) -> list[DecodeJob]:
        """Takes a batch; returns it where there is nothing to decode."""
        job.begin(self._session)
        runs = [_Run(job, rows) for rows in _cut(job.encoded)]
        self._waiting += runs
        self._runs_left[job.step] = len(runs)
        return self._completed(job, note)

    def advance(self, note: Note) -> list[DecodeJob]:
        """Keeps the decoder supplied and waits for its oldest run; returns the batch if this was its last one."""
        start = time.perf_counter()
        while self._waiting and len(self._in_flight) < self._session.max_runs:
            run = self._waiting.popleft()
            self._session.submit([run.job.encoded[row] for row in run.rows])
            self._in_flight.append(run)
        job, rows = self._in_flight.popleft()
        note("device_decode", job.step)
        assert job.images is not None
        if not self._session.collect(rows, job.images, job.token_images):
            if len(rows) == 1:
                job.refuse(rows[0], note)
            else:
                size = -(-len(rows) // _PIECES)
                pieces = [_Run(job, rows[i : i + size]) for i in range(0, len(rows), size)]
                self._waiting.extendleft(reversed(pieces))
                self._runs_left[job.step] += len(pieces)
        self._runs_left[job.step] -= 1
        done = self._completed(job, note)
        self.seconds += time.perf_counter() - start
        return done

    def close(self) -> None:
        """Gives the decoder's memory back, whatever is still in it."""
        self._session.close()
        self._waiting.clear()
        self._in_flight.clear()

    def _completed(self, job: DecodeJob, note: Note) -> list[DecodeJob]:
        if self._runs_left[job.step]:
            return []
        del self._runs_left[job.step]
        job.complete(self._session, note)
        return [job]


def _cut(encoded: Mapping[int, Any]) -> list[list[int]]:
    """The rows in order, in runs of at most MAX_RUN_PIXELS."""
    runs: list[list[int]] = []
    pixels = MAX_RUN_PIXELS
    for row in sorted(encoded):
        if pixels + encoded[row].pixels > MAX_RUN_PIXELS:
            runs.append([])
            pixels = 0
        runs[-1].append(row)
        pixels += encoded[row].pixels
    return runs
