"""The processes of a run: where each one stands, and how they agree on things outside the GPU stream."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from farl_engine import stop

T = TypeVar("T")


class Verdict(IntEnum):
    """What a rank wants of the run; the ranks agree on the largest."""

    GO = 0
    SAVE = 1
    STOP = 2
    FAIL = 3


@dataclass(frozen=True)
class World:
    """This process among the processes of the run.

    `control` is a gloo group of its own, so that agreeing on the host never queues behind gradients nor touches the
    GPU stream. It is None in a run of one process, where no process group is made at all.
    """

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup | None

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start(device: str = "auto", timeout_seconds: float = 300.0) -> World:
    """Join the processes that torchrun started; a process started without torchrun is a world of one.

    Args:
        device: "auto" (CUDA if present), "cpu" or "cuda".
        timeout_seconds: how long a collective may wait for a rank that died or hangs.

    Raises:
        ValueError: an unknown device, no GPU where one is asked for, or fewer GPUs than processes.
    """
    rank = int(os.environ.get("RANK", "0"))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is {device!r}; use auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda' but torch sees no CUDA GPU; use --device cpu, or check the driver")
    if device == "cpu" or not torch.cuda.is_available():
        place = torch.device("cpu")
    else:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"there are {torch.cuda.device_count()} GPUs for process {local_rank + 1} of this machine: "
                f"use --nproc-per-node {torch.cuda.device_count()}"
            )
        place = torch.device("cuda", local_rank)
        torch.cuda.set_device(place)
    if size == 1:
        return World(rank=0, size=1, device=place, control=None)
    timeout = timedelta(seconds=timeout_seconds)
    backend = "gloo" if place.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timeout, device_id=place if place.type == "cuda" else None)
    control = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(control, dist.ProcessGroup)
    return World(rank=rank, size=size, device=place, control=control)


def finish(world: World) -> None:
    """Leave the process group after every rank has come this far."""
    if world.control is not None:
        dist.barrier(group=world.control)
        dist.destroy_process_group()


def barrier(world: World) -> None:
    """Wait on the host until every rank has come this far."""
    if world.control is not None:
        dist.barrier(group=world.control)


def in_turns(world: World, work: Callable[[], T], *, turn: int) -> T:
    """Run `work` on the ranks whose `turn` is 0, then on those whose turn is 1, and so on; return this rank's result.

    Waiting ranks wait as long as it takes: the time-out of collectives does not count. A stop signal to any rank is
    passed on to all, which leave together with code 0 once the work under way has heeded it (see `stop.requested`).
    """
    if world.control is None:
        return work()
    turns = torch.tensor([turn])
    dist.all_reduce(turns, op=dist.ReduceOp.MAX, group=world.control)
    outcome: list[T | BaseException] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:
            outcome.append(error)

    for number in range(int(turns) + 1):
        thread = threading.Thread(target=run, daemon=True) if number == turn else None
        if thread is not None:
            thread.start()
        pause, working = 0.01, 1
        while working:
            if thread is not None:
                thread.join(pause)
            else:
                time.sleep(pause)
            pause = min(1.5 * pause, 1.0)
            alive, stopped_by = thread is not None and thread.is_alive(), stop.requested()
            if outcome and isinstance(outcome[0], BaseException) and stopped_by is None:
                raise outcome[0]
            ballot = torch.tensor([alive, signal.Signals[stopped_by] if stopped_by else 0])
            dist.all_reduce(ballot, op=dist.ReduceOp.MAX, group=world.control)
            working, heard = ballot.tolist()
            if heard:
                stop.heard_elsewhere(signal.Signals(heard).name)
                if thread is not None:
                    thread.join()
                raise outcome[0] if outcome and isinstance(outcome[0], BaseException) else SystemExit(0)
    result = outcome[0]
    assert not isinstance(result, BaseException)
    return result


def say(world: World, text: str) -> None:
    """Print a line, once for all ranks."""
    if world.is_main:
        print(text, flush=True)


class Vote:
    """Ranks agree on a `Verdict` once a step, read one step late so that nobody waits for it.

    Every rank calls `cast` the same number of times.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._open: tuple[dist.Work, torch.Tensor] | None = None

    def cast(self, verdict: Verdict) -> Verdict:
        """Give this rank's verdict of now, return the one that all agreed on at the call before (GO at the first).

        In a world of one the verdict holds at once.
        """
        if self._world.control is None:
            return verdict
        agreed = self.close()
        ballot = torch.tensor([int(verdict)], dtype=torch.int64)
        work = dist.all_reduce(ballot, op=dist.ReduceOp.MAX, group=self._world.control, async_op=True)
        assert work is not None
        self._open = (work, ballot)
        return agreed

    def cast_now(self, verdict: Verdict) -> Verdict:
        """As `cast`, but wait for all ranks and return what they agree on now."""
        agreed = self.cast(verdict)
        return max(agreed, self.close())

    def close(self) -> Verdict:
        """Wait for the open vote, if any, and return its outcome."""
        if self._open is None:
            return Verdict.GO
        work, ballot = self._open
        self._open = None
        work.wait()
        return Verdict(int(ballot))


def gather_objects(world: World, value: T) -> list[T]:
    """Every rank's small host-side `value`, in rank order, on every rank."""
    if world.control is None:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value, group=world.control)
    return values


def broadcast_object(world: World, value: T | None) -> T:
    """Rank 0's host-side `value` on every rank (tensors inside must be on the CPU)."""
    box = [value]
    if world.control is not None:
        dist.broadcast_object_list(box, src=0, group=world.control)
    result = box[0]
    assert result is not None
    return result
