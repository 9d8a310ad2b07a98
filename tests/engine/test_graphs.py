"""Recorded updates and the loop around them on a toy, with a tape in place of CUDA graphs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import farl_engine.loop
from farl_engine.checkpoint import CheckpointStore
from farl_engine.distributed import World
from farl_engine.graphs import CudaRecorder, StepGraphs
from farl_engine.loop import NonFiniteError, Run, Schedule, train
from farl_engine.metrics import MetricsLog, Progress
from farl_engine.optim import LearningRate
from farl_engine.reporter import Reporter
from tests.support.tape import HostReadError, Tape

CPU = World(rank=0, size=1, device=torch.device("cpu"), control=None)
LENGTHS = (2, 3, 5)
STEPS = 20


class Points:
    """In place of a loader: points k + 1, ... of changing number, NaN among them at step `nan_at`."""

    def __init__(self, start: int, nan_at: int, device: torch.device) -> None:
        self._start, self._nan_at, self._device = start, nan_at, device
        self.bad_samples: dict[str, int] = {}
        self.error = None

    def __iter__(self) -> Iterator[Tensor]:
        for step in range(self._start, STEPS):
            self.bad_samples["empty"] = step
            x = torch.arange(LENGTHS[step % 3]) + step + 1.0
            if step == self._nan_at:
                x[0] = math.nan
            yield x.to(self._device)

    def check_bad(self) -> None: ...

    def stage_times(self) -> dict[str, float]:
        seconds = {"read": 0.25, "decode": 0.0, "text": 0.0, "device_decode": 0.0, "wait_for_batch": 0.0}
        return seconds | {"threads": 2, "queue_depth": 3.0, "mean_queue_depth": 2.5}


def rate(step: int) -> float:
    return 0.1 / (step + 1)


def make_run(
    folder: Path, recorder: Any, *, start: int = 0, nan_at: int = -1, world: World = CPU, **changes: Any
) -> Run:
    """A line fitted to points, whose every update has another learning rate."""
    torch.manual_seed(0)
    model = nn.Linear(1, 1).to(world.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, fused=True)
    store = CheckpointStore(folder / "checkpoints", keep_last=0)
    if start:
        saved = store.load(start)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])

    def forward_backward(x: Tensor) -> dict[str, Tensor]:
        loss = (model(x[:, None])[:, 0] - 2 * x).square().mean()
        loss.backward()
        return {"loss": loss.detach()}

    schedule = {"stop_at": STEPS, "log_every": 1, "eval_every": 0, "save_every": 0, "save_minutes": 0.0}
    return Run(
        world=world,
        model=model,
        optimizer=optimizer,
        loader=Points(start, nan_at, world.device),  # type: ignore[arg-type]
        forward_backward=forward_backward,  # type: ignore[arg-type]
        after_update=lambda: {"weight": model.weight.detach().reshape(())},
        snapshot=lambda step: {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()},
        evaluate=None,
        store=store,
        log=MetricsLog(folder, resume_step=start),
        progress=Progress(start=start, total=STEPS, enabled=False),
        schedule=Schedule(steps=STEPS, clip_norm=1.0, learning_rate=rate, **(schedule | changes)),
        global_batch=4,
        flops_per_sample=1.0,
        start_step=start,
        recorder=recorder,
    )


def logged(folder: Path) -> list[list[float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[line[name] for name in ("step", "loss", "grad_norm", "weight", "bad_samples")] for line in lines]


def test_a_recorded_run_is_the_plain_one(tmp_path: Path) -> None:
    train(make_run(tmp_path / "plain", None))
    tape = Tape()
    train(make_run(tmp_path / "tape", tape))
    assert logged(tmp_path / "tape") == logged(tmp_path / "plain")
    assert tape.rehearsals == StepGraphs.WARM_UP and len(tape.recordings) == len(LENGTHS)
    assert sum(recording.replays for recording in tape.recordings) == STEPS - StepGraphs.WARM_UP


def test_a_cut_recorded_run_is_the_straight_one(tmp_path: Path) -> None:
    train(make_run(tmp_path / "straight", Tape()))
    for start, cut in ((0, 7), (7, 20)):
        train(make_run(tmp_path / "cut", Tape(), start=start, stop_at=cut))
    assert logged(tmp_path / "cut") == logged(tmp_path / "straight")


@pytest.mark.parametrize("log_every", [1, 4])
def test_the_guard_trips_at_the_right_step(tmp_path: Path, log_every: int) -> None:
    good = make_run(tmp_path / "good", None, stop_at=13)
    train(good)
    bad = make_run(tmp_path / "bad", Tape(), nan_at=13, log_every=log_every)
    with pytest.raises(NonFiniteError, match=r"loss of rank 0 was not finite in step 14.*state after step 13 is saved"):
        train(bad)
    assert torch.equal(bad.model.weight, good.model.weight)  # type: ignore[arg-type]


def test_a_rate_of_the_host_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above can fail: a rate that is a Python number is that of the recording for good."""

    class OfTheHost(LearningRate):
        def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
            self._optimizer = optimizer

        def set(self, rate: float) -> None:
            for group in self._optimizer.param_groups:
                group["lr"] = rate

    monkeypatch.setattr(farl_engine.loop, "LearningRate", OfTheHost)
    train(make_run(tmp_path / "plain", None))
    train(make_run(tmp_path / "tape", Tape()))
    # Each of the three recordings is right once, just after it was made.
    plain, tape = logged(tmp_path / "plain"), logged(tmp_path / "tape")
    assert [a == b for a, b in zip(tape, plain, strict=True)] == [True] * 6 + [False] * 14


def test_checkpoints_hold_the_same_with_and_without_recordings(tmp_path: Path) -> None:
    groups = []
    for name, recorder in (("plain", None), ("tape", Tape())):
        train(make_run(tmp_path / name, recorder, save_every=10))
        saved = CheckpointStore(tmp_path / name / "checkpoints")
        groups += [saved.load(step)["optimizer"]["param_groups"] for step in (10, 20)]
    assert groups[0] == groups[2] and groups[1] == groups[3]
    assert [type(group[0]["lr"]) for group in groups] == [float] * 4
    assert [group[0]["lr"] for group in groups[:2]] == [rate(9), rate(19)] and not groups[0][0]["capturable"]


@dataclass(frozen=True)
class Nested:
    parts: tuple[Tensor, ...]
    name: str = "of the host"


@dataclass(frozen=True)
class Given:
    x: Tensor
    nested: Nested
    absent: Tensor | None = None


def doubled(tape: Tape) -> tuple[StepGraphs, list[Given]]:
    """Graphs of an update that adds up all that a batch holds, and the batches that it was called on."""
    seen: list[Given] = []

    def update(batch: Any) -> dict[str, Tensor]:
        seen.append(batch)
        return {"sum": 2 * (batch.x.sum() + sum(part.sum() for part in batch.nested.parts))}

    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))], fused=True)
    return StepGraphs(update, optimizer, tape), seen


def given(length: int, value: float) -> Given:
    return Given(torch.full((4,), value), Nested((torch.full((length,), value), torch.full((2,), value))))


def test_batches_of_nested_tensors_go_through_one_memory() -> None:
    tape = Tape()
    graphs, seen = doubled(tape)
    for value in range(8):
        figures = graphs(given(3, float(value)))  # type: ignore[arg-type]
        assert figures["sum"].item() == 2 * 9 * value
    assert len(seen) == 4 and len(tape.recordings) == 1
    assert seen[0].x is seen[3].x and seen[0].nested.parts[1] is seen[3].nested.parts[1]
    # Nothing that a person handed in is written to, or kept.
    batch = given(3, 1.0)
    graphs(batch)  # type: ignore[arg-type]
    graphs(given(3, 2.0))  # type: ignore[arg-type]
    assert batch.x.eq(1).all()


def test_a_new_shape_has_the_memory_to_itself() -> None:
    tape = Tape()
    graphs, _ = doubled(tape)
    for length in (3, 4, 3, 3, 4, 4, 3):
        graphs(given(length, 1.0))  # type: ignore[arg-type]
    assert (tape.rehearsals, len(tape.recordings), tape.discarded) == (3, 2, 0)
    for length in (5, 5, 3, 4, 3, 4):
        assert graphs(given(length, 1.0))["sum"].item() == 2 * (6 + length)  # type: ignore[arg-type]
    assert (tape.rehearsals, len(tape.recordings), tape.discarded) == (4, 5, 2)


def test_the_number_of_recordings_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepGraphs, "MOST", 2)
    tape = Tape()
    graphs, _ = doubled(tape)
    for length in (3, 4, 5, 3, 4, 3, 4):
        graphs(given(length, 1.0))  # type: ignore[arg-type]
    assert (len(tape.recordings), tape.discarded) == (2, 0)
    assert graphs(given(5, 1.0))["sum"].item() == 22.0  # type: ignore[arg-type]
    assert (len(tape.recordings), tape.discarded) == (3, 2)


def test_figures_are_copied_before_the_next_replay_overwrites_them(tmp_path: Path) -> None:
    run = make_run(tmp_path, None)
    guard = SimpleNamespace(state=lambda: torch.zeros(3, dtype=torch.float64), read=lambda numbers: None)
    reporter = Reporter(run, guard, [])  # type: ignore[arg-type]
    static = {name: torch.ones(()) for name in ("loss", "grad_norm", "weight", "bad_samples")}
    reporter.report(1, static, 0.1, now=False)
    for figure in static.values():
        figure.fill_(7.0)
    reporter.report(2, static, 0.1, now=False)
    reporter.flush()
    assert [line[1] for line in logged(tmp_path)] == [1.0, 7.0]


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.item(),
        lambda x: bool(x > 0),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: torch.tensor(1.0) * x,
    ],
    ids=["item", "bool", "tolist", "cpu", "tensor"],
)
def test_the_tape_refuses_what_a_cuda_graph_would(read: Any) -> None:
    x = torch.ones(())

    def call() -> dict[str, Tensor]:
        read(x)
        return {"x": x + 1}

    with pytest.raises(HostReadError):
        Tape().record(call, None)
    assert x.tolist() == 1.0


def test_the_tape_leaves_no_trace_of_a_recording() -> None:
    weight, other = torch.ones(3), torch.zeros(2)

    def call() -> dict[str, Tensor]:
        weight.mul_(2)
        other[1:].add_(weight[0])
        return {"sum": weight.sum()}

    recording = Tape().record(call, None)
    assert weight.eq(1).all() and other.eq(0).all()
    recording.replay()
    recording.replay()
    assert weight.eq(4).all() and other.tolist() == [0.0, 6.0] and recording.figures["sum"].item() == 12.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_of_cuda_graphs_is_the_plain_one(tmp_path: Path) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    world = World(rank=0, size=1, device=device, control=None)
    train(make_run(tmp_path / "plain", None, world=world))
    train(make_run(tmp_path / "graphs", CudaRecorder(device), world=world))
    plain, graphs = torch.tensor(logged(tmp_path / "plain")), torch.tensor(logged(tmp_path / "graphs"))
    torch.testing.assert_close(graphs, plain, rtol=1e-5, atol=1e-6)
    with pytest.raises(NonFiniteError, match="in step 14"):
        train(make_run(tmp_path / "bad", CudaRecorder(device), nan_at=13, log_every=4, world=world))
