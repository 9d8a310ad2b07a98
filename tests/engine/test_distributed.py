from __future__ import annotations

import os
import signal
import socket
import threading
import time

import pytest
import torch
import torch.multiprocessing as mp

from farl_engine import distributed, stop
from farl_engine.distributed import Verdict, Vote, World, barrier, broadcast_object, gather_objects, in_turns


def alone() -> World:
    return World(rank=0, size=1, device=torch.device("cpu"), control=None)


def test_a_world_of_one_agrees_with_itself_at_once() -> None:
    vote = Vote(alone())
    assert vote.cast(Verdict.GO) is Verdict.GO
    assert vote.cast(Verdict.STOP) is Verdict.STOP
    assert vote.cast_now(Verdict.FAIL) is Verdict.FAIL
    assert vote.close() is Verdict.GO
    assert gather_objects(alone(), "x") == ["x"]
    assert broadcast_object(alone(), 3) == 3
    assert in_turns(alone(), lambda: 4, turn=2) == 4


def test_unknown_and_absent_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="use auto, cpu or cuda"):
        distributed.start("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA GPU; use --device cpu"):
        distributed.start("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="2 GPUs for process 3 of this machine: use --nproc-per-node 2"):
        distributed.start("auto")


def _ranks_agree(rank: int, port: int, size: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world = distributed.start("cpu", timeout_seconds=30)
    assert (world.rank, world.size, world.is_main) == (rank, size, rank == 0)
    vote = Vote(world)
    # One rank asks to stop at its third call: all hear it at the fourth, together.
    heard = [vote.cast(Verdict.STOP if rank == 1 and call == 2 else Verdict.GO) for call in range(4)]
    assert heard == [Verdict.GO] * 3 + [Verdict.STOP]
    # At once, and the open vote of the step before counts too.
    vote.cast(Verdict.FAIL if rank == 0 else Verdict.GO)
    assert vote.cast_now(Verdict.GO) is Verdict.FAIL
    assert vote.cast_now(Verdict.STOP if rank == size - 1 else Verdict.GO) is Verdict.STOP
    assert vote.close() is Verdict.GO
    assert gather_objects(world, rank * 10) == [0, 10, 20][:size]
    got = broadcast_object(world, {"codes": torch.arange(3)} if world.is_main else None)
    assert got["codes"].tolist() == [0, 1, 2]

    # Rank 0 first, then rank 2, then rank 1; the clock is the machine's, so ranks can be compared.
    def work() -> list[float]:
        start = time.monotonic()
        time.sleep(0.1)
        return [start, time.monotonic()]

    turns = gather_objects(world, in_turns(world, work, turn=[0, 2, 1][rank]))
    assert turns[0][1] <= turns[2][0] and turns[2][1] <= turns[1][0]

    # A rank that waits is told to stop: the work of another heeds it, loses nothing, and all leave together.
    stop.install()
    kept: list[int] = []

    def long_work() -> None:
        deadline = time.monotonic() + 20
        while stop.requested() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        kept.append(rank)
        raise SystemExit(0)

    if rank == 1:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(SystemExit) as leaving:
        in_turns(world, long_work, turn=rank)
    assert leaving.value.code == 0 and stop.requested() == "SIGTERM" and kept == ([0] if rank == 0 else [])
    stop.reset()
    barrier(world)

    # An error is that rank's own; the others lose it, which `farl.cli` puts into words, rather than wait for it.
    def bad_work() -> None:
        raise ValueError("no shard")

    if rank == 0:
        with pytest.raises(ValueError, match="no shard"):
            in_turns(world, bad_work, turn=0)
    else:
        with pytest.raises(RuntimeError, match=r"Connection (closed|reset) by peer|Broken pipe"):
            in_turns(world, bad_work, turn=1)
    # Nothing is left to finish: the group is broken.
    os._exit(0)


def test_ranks_agree_one_step_late() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    mp.spawn(_ranks_agree, args=(port, 3), nprocs=3)
