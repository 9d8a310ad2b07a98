"""The loop on a toy: a line fitted to points, where every step and failure can be foreseen."""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import socket
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from farl_engine import distributed, loop, stop
from farl_engine.checkpoint import CheckpointError, CheckpointStore
from farl_engine.data import BadDataError
from farl_engine.distributed import World
from farl_engine.loop import NonFiniteError, Run, Schedule, train
from farl_engine.metrics import MetricsLog, Progress


class Node:
    """Garbage that only the collector finds."""

    def __init__(self) -> None:
        self.itself = self


class Points:
    """In place of a loader: step k gives x = k + 1."""

    def __init__(self, start: int, events: dict[int, Callable[[], None]] | None = None) -> None:
        self.start, self.events = start, events or {}
        self.bad_samples: dict[str, int] = {}
        self.error: BaseException | None = None
        self.bad_at: int | None = None
        self.given = start

    def __iter__(self) -> Iterator[torch.Tensor]:
        for step in range(self.start, 10**6):
            self.given = step + 1
            self.events.get(step, lambda: None)()
            yield torch.tensor([float(step + 1)])

    def check_bad(self) -> None:
        if self.bad_at is not None and self.given >= self.bad_at:
            raise BadDataError("too many bad samples; worst shard: a.tar")

    def stage_times(self) -> dict[str, float]:
        seconds = {"read": 0.25, "decode": 0.0, "text": 0.0, "device_decode": 0.0, "wait_for_batch": 0.0}
        return seconds | {"threads": 2, "queue_depth": 3.0, "mean_queue_depth": 2.5}


def make_run(folder: Path, world: World | None = None, *, start: int = 0, nan_at: int = -1, **changes: Any) -> Run:
    world = world or World(rank=0, size=1, device=torch.device("cpu"), control=None)
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    store = CheckpointStore(folder / "checkpoints", keep_last=0)
    if start:
        saved = store.load(start)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])

    def forward_backward(x: torch.Tensor) -> dict[str, torch.Tensor]:
        loss = (model(x) - 2 * x).square().sum() / world.size
        if x.item() == nan_at + 1 and world.rank == world.size - 1:
            loss = loss * math.nan
        loss.backward()
        if world.size > 1:
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
        return {"loss": loss.detach()}

    def evaluate(step: int, should_stop: Callable[[], bool]) -> dict[str, Any] | None:
        return None if should_stop() else {"weight_r1": model.weight.item()}

    settings: dict[str, Any] = {
        "steps": 20,
        "stop_at": 20,
        "log_every": 1,
        "eval_every": 0,
        "save_every": 0,
        "save_minutes": 0.0,
        "clip_norm": 1.0,
        "learning_rate": lambda step: 0.1 / (step + 1),
    }
    run = Run(
        world=world,
        model=model,
        optimizer=optimizer,
        loader=Points(start),  # type: ignore[arg-type]
        forward_backward=forward_backward,  # type: ignore[arg-type]
        after_update=lambda: {"weight": model.weight.detach().reshape(())},
        snapshot=lambda step: {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()},
        evaluate=evaluate,
        store=store,
        log=MetricsLog(folder, resume_step=start) if world.is_main else None,
        progress=Progress(start=start, total=20, enabled=False),
        schedule=Schedule(**(settings | changes)),
        global_batch=4,
        flops_per_sample=1.0,
        start_step=start,
    )
    return run


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def forget_signals() -> Iterator[None]:
    yield
    stop.reset()
    for number in stop.SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def test_runs_to_the_end_logs_and_saves(tmp_path: Path) -> None:
    assert train(make_run(tmp_path, log_every=5, save_every=8, eval_every=10)) == (20, None)
    logged = lines(tmp_path)
    assert [line["step"] for line in logged if "loss" in line] == [1, 5, 10, 15, 20]
    assert [line["step"] for line in logged if "eval" in line] == [10, 20]
    last = logged[-2]
    assert last["samples"] == 80 and last["lr"] == 0.1 / 20 and last["mfu"] is None
    assert (
        last["pairs_per_second"] > 0
        and 0 <= last["data_wait_fraction"] <= 1
        and last["loader"]["queue_depth"] == 2.5
        and last["loader"]["bottleneck"] == "step"
    )
    assert abs(last["weight"] - 2) < abs(logged[0]["weight"] - 2)
    assert CheckpointStore(tmp_path / "checkpoints").steps() == [8, 16, 20]


def test_a_cut_run_equals_the_straight_one(tmp_path: Path) -> None:
    train(make_run(tmp_path / "straight"))
    for start, cut in ((0, 3), (3, 4), (4, 20)):
        assert train(make_run(tmp_path / "cut", start=start, stop_at=cut)) == (cut, None)
    straight = CheckpointStore(tmp_path / "straight" / "checkpoints").load()
    pieces = CheckpointStore(tmp_path / "cut" / "checkpoints").load()
    assert torch.equal(straight["model"]["weight"], pieces["model"]["weight"])
    figures = ("step", "loss", "grad_norm", "weight", "lr")
    assert [[line[name] for name in figures] for line in lines(tmp_path / "straight")] == [
        [line[name] for name in figures] for line in lines(tmp_path / "cut")
    ]


@pytest.mark.parametrize("log_every", [1, 4])
def test_a_loss_that_is_not_finite_changes_nothing_and_stops(tmp_path: Path, log_every: int) -> None:
    good = make_run(tmp_path / "good", stop_at=6)
    train(good)
    bad = make_run(tmp_path / "bad", nan_at=6, log_every=log_every)
    with pytest.raises(NonFiniteError, match=r"loss of rank 0 was not finite in step 7.*state after step 6 is saved"):
        train(bad)
    assert torch.equal(bad.model.weight, good.model.weight)  # type: ignore[arg-type]
    saved = CheckpointStore(tmp_path / "bad" / "checkpoints").load()
    assert saved["step"] == 6 and torch.equal(saved["model"]["weight"], good.model.weight)  # type: ignore[arg-type]


def test_no_checkpoint_is_written_after_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError):
        train(make_run(tmp_path, nan_at=6, log_every=100, save_every=9))
    assert CheckpointStore(tmp_path / "checkpoints").steps() == [6]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_at_that_step(tmp_path: Path, number: signal.Signals) -> None:
    stop.install()
    run = make_run(tmp_path)
    run.loader.events[5] = lambda: os.kill(os.getpid(), number)  # type: ignore[attr-defined]
    assert train(run) == (6, number.name)
    assert CheckpointStore(tmp_path / "checkpoints").load()["step"] == 6
    assert lines(tmp_path)[-1]["step"] == 6


def test_a_signal_before_the_first_step_saves_the_start(tmp_path: Path) -> None:
    stop.install()
    os.kill(os.getpid(), signal.SIGTERM)
    assert train(make_run(tmp_path)) == (0, "SIGTERM")
    assert CheckpointStore(tmp_path / "checkpoints").latest() == 0


def test_a_signal_in_an_evaluation_ends_it(tmp_path: Path) -> None:
    stop.install()
    run = make_run(tmp_path, eval_every=3)
    inner = run.evaluate
    assert inner is not None

    def interrupted(step: int, should_stop: Callable[[], bool]) -> dict[str, Any] | None:
        os.kill(os.getpid(), signal.SIGTERM)
        return inner(step, should_stop)

    run.evaluate = interrupted
    assert train(run) == (3, "SIGTERM")
    assert not [line for line in lines(tmp_path) if "eval" in line]


def test_bad_data_saves_and_stops(tmp_path: Path) -> None:
    run = make_run(tmp_path, log_every=2)
    run.loader.bad_at = 4  # type: ignore[attr-defined]
    with pytest.raises(BadDataError, match=r"worst shard: a\.tar"):
        train(run)
    assert CheckpointStore(tmp_path / "checkpoints").latest() == 4


def test_a_checkpoint_that_cannot_be_written_stops_the_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match="could not be written"):
        train(make_run(tmp_path, save_every=2))


def test_a_background_write_that_failed_is_made_good_at_the_end(tmp_path: Path) -> None:
    blocked = tmp_path / "checkpoints"
    blocked.write_text("in the way")
    run = make_run(tmp_path, save_every=2, stop_at=4)
    run.loader.events[3] = lambda: (run.store.wait_quietly(), blocked.unlink())  # type: ignore[attr-defined]
    run.store = _Patient(blocked, keep_last=0)
    with pytest.raises(CheckpointError, match="step 2 could not be written"):
        train(run)
    assert CheckpointStore(blocked).steps() == [4]


class _Patient(CheckpointStore):
    def wait_quietly(self) -> None:
        assert self._writer is not None
        self._writer.join()


def test_a_full_disk_under_the_metrics_saves_and_stops(tmp_path: Path) -> None:
    run = make_run(tmp_path, save_every=0)
    assert run.log is not None
    run.log.close()
    run.log._file = Path("/dev/full").open("a", buffering=1)  # noqa: SIM115
    with pytest.raises(OSError, match="No space left"):
        train(run)
    assert CheckpointStore(tmp_path / "checkpoints").steps() == [1]


def test_not_finite_and_no_disk_says_both(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(NonFiniteError, match=r"not finite in step 4.*after step 3 could not be saved \(the checkpoint"):
        train(make_run(tmp_path, nan_at=3))


def raiser(error: Exception) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


def test_a_loader_that_fails_in_a_step_leaves_what_was_done(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.loader.events[5] = raiser(TimeoutError("no batch"))  # type: ignore[attr-defined]
    with pytest.raises(TimeoutError, match="no batch"):
        train(run)
    assert CheckpointStore(tmp_path / "checkpoints").load()["step"] == 5


def test_a_loader_that_ends_too_early_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.loader = _Short()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="the loader ended before step 3; its end_step must be 20"):
        train(run)


class _Short(Points):
    def __init__(self) -> None:
        super().__init__(0)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter([torch.ones(1)] * 3)


def test_saves_by_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import farl_engine.loop as loop

    run = make_run(tmp_path, save_minutes=10.0)
    clock = {"now": 0.0}
    monkeypatch.setattr(loop.time, "monotonic", lambda: clock["now"])
    for step in range(20):
        run.loader.events[step] = lambda: clock.__setitem__("now", clock["now"] + 4 * 60)  # type: ignore[attr-defined]
    train(run)
    assert CheckpointStore(tmp_path / "checkpoints").steps() == [3, 6, 9, 12, 15, 18, 20]


def test_garbage_is_collected_on_schedule_and_at_no_other_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "COLLECT_EVERY", 6)
    run = make_run(tmp_path)
    step = 0
    collected: list[tuple[int, int]] = []
    dead: list[int] = []

    def litter() -> None:
        """More than the automatic collector would bear."""
        nonlocal step
        step += 1
        for _ in range(2_000):
            Node()
        weakref.finalize(Node(), dead.append, step)

    run.loader.events = dict.fromkeys(range(20), litter)  # type: ignore[attr-defined]

    def watch(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            collected.append((step, info["generation"]))

    assert gc.isenabled()
    gc.callbacks.append(watch)
    try:
        train(run)
    finally:
        gc.callbacks.remove(watch)
    # Before the first step, and after the sixth, twelfth and eighteenth; past the last one it runs by itself again.
    assert [found for found in collected if found[0] < 20] == [(0, 2), (6, 2), (12, 2), (18, 2)]
    assert dead[:18] == list(range(1, 19))
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_the_collector_is_left_as_it_was_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError):
        train(make_run(tmp_path, nan_at=3))
    assert gc.isenabled() and gc.get_freeze_count() == 0


def _two_ranks(rank: int, port: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world = distributed.start("cpu", timeout_seconds=30)
    with pytest.raises(NonFiniteError, match="loss of rank 1 was not finite in step 4"):
        train(make_run(folder / "nan", world, nan_at=3))
    # A signal at one rank: both leave at the same step.
    stop.install()
    run = make_run(folder / "stop", world)
    if rank == 1:
        run.loader.events[5] = lambda: os.kill(os.getpid(), signal.SIGTERM)  # type: ignore[attr-defined]
    assert train(run) == (7, "SIGTERM")
    stop.reset()
    # Before the first step, and in an evaluation: no step more.
    if rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    assert train(make_run(folder / "early", world)) == (0, "SIGTERM")
    stop.reset()
    run = make_run(folder / "evaluating", world, eval_every=3)
    inner = run.evaluate
    assert inner is not None

    def interrupted(step: int, should_stop: Callable[[], bool]) -> dict[str, Any] | None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(step, should_stop)

    run.evaluate = interrupted
    assert train(run) == (3, "SIGTERM")
    stop.reset()
    # Bad data at one rank: both say so.
    run = make_run(folder / "bad", world)
    if rank == 1:
        run.loader.bad_at = 3  # type: ignore[attr-defined]
    with pytest.raises(BadDataError, match="worst shard"):
        train(run)
    # An error that one rank's loader met ahead: all hear of it before that rank runs out of batches.
    run = make_run(folder / "ahead", world)
    if rank == 1:
        run.loader.events[4] = lambda: setattr(run.loader, "error", KeyError("no such token"))
        run.loader.events[6] = raiser(KeyError("no such token"))  # type: ignore[attr-defined]
    with pytest.raises(KeyError if rank == 1 else RuntimeError, match="no such token"):
        train(run)
    # No disk at rank 0: rank 1 does not wait for it in vain.
    (folder / "full").mkdir(exist_ok=True)
    (folder / "full" / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match="step 3 could not be written"):
        train(make_run(folder / "full", world, save_every=3))
    with pytest.raises(NonFiniteError, match="could not be saved"):
        train(make_run(folder / "full", world, nan_at=2))
    # By the clock it is time to save at rank 0 alone, just after a loss that is not finite.
    with pytest.raises(NonFiniteError, match="not finite in step 4"):
        train(make_run(folder / "clock", world, nan_at=3, log_every=7, save_minutes=1e-9 if rank == 0 else 0.0))
    # Bad samples of all ranks are counted.
    run = make_run(folder / "count", world, stop_at=2)
    run.loader.bad_samples["empty"] = rank + 1
    assert train(run) == (2, None)
    distributed.finish(world)


def test_two_ranks_leave_together(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    mp.spawn(_two_ranks, args=(port, tmp_path), nprocs=2)
    assert CheckpointStore(tmp_path / "nan" / "checkpoints").steps() == [3]
    assert CheckpointStore(tmp_path / "stop" / "checkpoints").steps() == [7]
    assert len(CheckpointStore(tmp_path / "bad" / "checkpoints").steps()) == 1
    # Noticed at the vote before the sixth step, agreed on at the one after it.
    assert CheckpointStore(tmp_path / "ahead" / "checkpoints").steps() == [6]
    assert lines(tmp_path / "count")[-1]["bad_samples"] == 3
