"""Threads that build jobs chunk by chunk and hand them out in order, a bounded number ahead.

Where jobs have a last stage that takes them whole, such as decoding on a GPU, it has a thread of its own.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

_JOIN_SECONDS = 2.0

logger = logging.getLogger("farl_engine.data")


class BatchJob(ABC):
    """Work of one step, in chunks that may run at the same time on several threads."""

    def __init__(self, step: int, num_chunks: int) -> None:
        self.step = step
        self.num_chunks = num_chunks

    @abstractmethod
    def run_chunk(self, number: int, note: Callable[[str, int], None]) -> None:
        """Makes one chunk; `note(stage, id)` records what is being done, for the message about a stall."""

    @abstractmethod
    def finish(self, note: Callable[[str, int], None]) -> None:
        """Called when all chunks are made, and before the last stage."""


class JobStage(Protocol):
    """A last stage with several jobs in it; `put` and `advance` return jobs that have passed."""

    @property
    def busy(self) -> bool: ...
    def put(self, job: Any, note: Callable[[str, int], None]) -> Sequence[Any]: ...
    def advance(self, note: Callable[[str, int], None]) -> Sequence[Any]: ...
    def close(self) -> None: ...


class Workers:
    """Runs the jobs of steps first_step, first_step + 1, ... and returns them in that order.

    Args:
        start: makes the job of a step; called for one step at a time.
        first_step, end_step: the steps; None never ends.
        threads: 0 runs jobs inside `next`.
        prefetch: jobs begun but not yet handed out, at most.
        stall_timeout: patience of `next` in seconds.
        stage: the last stage, which is closed at the end.

    Attributes:
        error: the first error that a thread met; `next` raises it when no job is ready.
    """

    def __init__(
        self,
        start: Callable[[int], BatchJob],
        *,
        first_step: int,
        end_step: int | None,
        threads: int,
        prefetch: int,
        stall_timeout: float,
        stage: JobStage | None = None,
    ) -> None:
        self._start = start
        self._stage = stage
        self._end_step = end_step
        self._prefetch = prefetch
        self._stall_timeout = stall_timeout
        self._next_out = first_step
        self._closing = False
        self.error: BaseException | None = None
        # Guards everything that the consumer sees; never held while work is done.
        self._changed = threading.Condition()
        self._ready: dict[int, BatchJob] = {}
        self._staged: list[BatchJob] = []
        self._chunks_left: dict[int, int] = {}
        self._doing: dict[str, tuple[str, int, float]] = {}
        # Guards the handing out of chunks among the threads.
        self._task_lock = threading.Lock()
        self._next_in = first_step
        self._job: BatchJob | None = None
        self._next_chunk = 0
        self._threads = [
            threading.Thread(target=self._guarded, args=(self._work,), name=f"farl-loader-{i}", daemon=True)
            for i in range(threads)
        ]
        if threads and stage is not None:
            arguments = (self._work_stage, stage)
            self._threads.append(
                threading.Thread(target=self._guarded, args=arguments, name="farl-loader-device", daemon=True)
            )
        for thread in self._threads:
            thread.start()

    @property
    def ready_count(self) -> int:
        """Jobs that are done and wait to be handed out."""
        return len(self._ready)

    def next(self) -> BatchJob | None:
        """The next job in step order, or None after the last or after `close`.

        Raises:
            TimeoutError: nothing came for `stall_timeout` seconds; all stacks are on standard error.
            BaseException: whatever a thread ended with, with a note of what it was doing.
        """
        step = self._next_out
        if self._closing or (self._end_step is not None and step >= self._end_step):
            return None
        if not self._threads:
            job = self._start(step)
            for chunk in range(job.num_chunks):
                job.run_chunk(chunk, _ignore)
            job.finish(_ignore)
            if self._stage is not None:
                done = self._stage.put(job, _ignore)
                while not done:
                    done = self._stage.advance(_ignore)
            self._next_out += 1
            return job
        with self._changed:
            came = self._changed.wait_for(
                lambda: step in self._ready or self.error is not None or self._closing, self._stall_timeout
            )
            if not came:
                raise self._stalled(step)
            job = self._ready.pop(step, None)
            if job is not None:
                self._next_out += 1
                self._changed.notify_all()
                return job
            if self.error is not None:
                raise self.error
            return None

    def close(self) -> None:
        """Ends the threads; one that hangs in a system call is left behind as a daemon, with a log line."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        deadline = time.monotonic() + _JOIN_SECONDS
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))
                if thread.is_alive():
                    logger.warning("loader thread %s still hangs in %s", thread.name, self._describe(thread.name))
                    # It may be the one inside the stage.
                    self._stage = None
        self._threads = []
        self._ready.clear()
        self._staged.clear()
        if self._stage is not None:
            self._stage.close()
            self._stage = None

    def _guarded(self, work: Callable[..., None], *arguments: Any) -> None:
        """Runs a thread's `work(*arguments, note)`; what it ends with goes to the consumer."""
        name = threading.current_thread().name

        def note(stage: str, item: int) -> None:
            # Checked here, once a sample, so that closing does not wait for a whole chunk.
            if self._closing:
                raise _ClosedError
            self._doing[name] = (stage, item, time.monotonic())

        try:
            work(*arguments, note)
        except _ClosedError:
            pass
        except BaseException as error:
            if name in self._doing:
                error.add_note(f"(in loader thread {name}: {self._describe(name)})")
            with self._changed:
                self.error = self.error or error
                self._changed.notify_all()

    def _work(self, note: Callable[[str, int], None]) -> None:
        while (task := self._next_task()) is not None:
            job, chunk = task
            job.run_chunk(chunk, note)
            with self._changed:
                self._chunks_left[job.step] -= 1
                last = self._chunks_left[job.step] == 0
            if last:
                job.finish(note)
                with self._changed:
                    del self._chunks_left[job.step]
                    if self._stage is None:
                        self._ready[job.step] = job
                    else:
                        self._staged.append(job)
                    self._changed.notify_all()
            self._doing.pop(threading.current_thread().name, None)

    def _work_stage(self, stage: JobStage, note: Callable[[str, int], None]) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self.error is not None or self._staged or stage.busy)
                if self._closing or self.error is not None:
                    return
                jobs, self._staged = self._staged, []
            done = [passed for job in jobs for passed in stage.put(job, note)]
            if stage.busy:
                done += stage.advance(note)
            with self._changed:
                self._ready |= {job.step: job for job in done}
                self._changed.notify_all()
            self._doing.pop(threading.current_thread().name, None)

    def _next_task(self) -> tuple[BatchJob, int] | None:
        with self._task_lock:
            if self._job is None or self._next_chunk == self._job.num_chunks:
                step = self._next_in
                if self._end_step is not None and step >= self._end_step:
                    return None
                with self._changed:
                    self._changed.wait_for(
                        lambda: self._closing or self.error is not None or step < self._next_out + self._prefetch
                    )
                if self._closing or self.error is not None:
                    return None
                self._job, self._next_chunk = self._start(step), 0
                self._next_in += 1
                with self._changed:
                    self._chunks_left[step] = self._job.num_chunks
            elif self._closing or self.error is not None:
                return None
            self._next_chunk += 1
            return self._job, self._next_chunk - 1

    def _stalled(self, step: int) -> TimeoutError:
        # Test runners and notebooks replace standard error by something without a file descriptor.
        with contextlib.suppress(AttributeError, ValueError, OSError):
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        busy = "; ".join(f"{name}: {self._describe(name)}" for name in sorted(self._doing)) or "no thread is busy"
        return TimeoutError(f"no batch for step {step} within {self._stall_timeout:g} s ({busy}); stacks are on stderr")

    def _describe(self, name: str) -> str:
        stage, item, since = self._doing.get(name, ("nothing", -1, time.monotonic()))
        kind = "sample" if stage in ("read", "decode") else "step"
        return f"{stage} of {kind} {item} for {time.monotonic() - since:.0f} s"


class _ClosedError(Exception):
    """The workers are being closed."""


def _ignore(stage: str, item: int) -> None:
    pass
