"""Processes that live as long as the study and do one cell after the other."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from farl.study.cells import Cell, Queue
from farl.study.study import Study
from farl_engine import stop

DONE, STOPPED = "done", "stopped"
# Seconds that workers have to save and leave after a signal.
PATIENCE = 120.0

# Called with a cell, and what became of it: DONE, STOPPED or why it failed.
Ended = Callable[[Cell, str], None]


class Worker:
    """A process, the pipe to it, and the cell it is at."""

    def __init__(self, study: Study, number: int, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(study, number, threads, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.number, self.cell = number, None

    number: int
    cell: Cell | None

    def give(self, cell: Cell) -> None:
        self.cell = cell
        with contextlib.suppress(BrokenPipeError):  # it has died, which is seen when its answer is waited for
            self.connection.send(cell)

    def answer(self) -> str:
        """What became of the cell; call when the connection is ready."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            return f"the worker process died (exit code {self.process.exitcode})"

    def leave(self) -> None:
        """Let an idle process go."""
        with contextlib.suppress(BrokenPipeError):
            self.connection.send(None)


def run_cells(study: Study, queue: Queue, jobs: int, threads: int, ended: Ended) -> None:
    """Work the queue off in `jobs` processes with so many threads each; returns early after a stop signal."""
    workers = [Worker(study, number, threads) for number in range(min(jobs, len(queue.waiting)))]
    try:
        while stop.requested() is None:
            for index, worker in enumerate(workers):
                if worker.cell is None and (cell := queue.take()) is not None:
                    if not worker.process.is_alive():
                        workers[index] = worker = Worker(study, worker.number, threads)
                    worker.give(cell)
            busy = {worker.connection: worker for worker in workers if worker.cell is not None}
            if not busy:
                return
            for connection in wait(list(busy), timeout=0.5):
                _take_answer(busy[connection], queue, ended)  # type: ignore[index]
    finally:
        _dismiss(workers, queue, ended)


def _take_answer(worker: Worker, queue: Queue, ended: Ended) -> None:
    cell, outcome = worker.cell, worker.answer()
    assert cell is not None
    worker.cell = None
    if outcome != STOPPED:
        queue.finish(cell, failed=outcome != DONE)
    ended(cell, outcome)


def _dismiss(workers: list[Worker], queue: Queue, ended: Ended) -> None:
    """Ask all to leave, wait for those at a cell, and end those that do not answer."""
    for worker in workers:
        if worker.cell is None:
            worker.leave()
        elif worker.process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.process.pid, signal.SIGTERM)
    end = time.monotonic() + PATIENCE
    for worker in workers:
        if worker.cell is not None and worker.connection.poll(max(0.0, end - time.monotonic())):
            _take_answer(worker, queue, ended)
            worker.leave()
        worker.process.join(max(0.0, end - time.monotonic()))
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


def _serve(study: Study, number: int, threads: int, connection: Connection[Any, Any]) -> None:
    """Do the cells that come through `connection` until None or the other end's death."""
    stop.install()
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    study.logs.mkdir(parents=True, exist_ok=True)
    with (study.logs / f"worker-{number}.log").open("a", buffering=1) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    import torch

    from farl import cli
    from farl.study.bench import Bench, StoppedError

    if torch.cuda.is_available():
        # What torchrun sets for each of its processes: the GPU that this one takes.
        os.environ["LOCAL_RANK"] = str(number % torch.cuda.device_count())
    torch.set_num_threads(threads)
    bench = Bench(study)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while (cell := connection.recv()) is not None:
            print(f"--- {cell.key}", flush=True)
            try:
                bench.run(cell)
                outcome = DONE
            except StoppedError:
                outcome = STOPPED
            except Exception as error:
                traceback.print_exc()
                outcome = cli.describe(error)
            sys.stdout.flush()
            connection.send(outcome)
            if stop.requested():
                break


def _leave_with(parent: int) -> None:
    """End this process when its parent has died: the same command, given again, would meet it at the same files."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
