"""`--engine graph`: the whole loop on a small FaRL, its updates recorded and replayed.

On a CPU a tape stands in for CUDA graphs (see `tests/support/tape.py`); what it cannot show is for a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import farl.step
import farl_kernels.attention.op
from farl.config import TrainConfig
from farl.initialize import build_optimizer, check_engine
from farl.model import MODELS, FaRL
from farl.pretrain import schedule
from farl.step import Masks, TrainStep, clamp_logit_scale
from farl_engine import loop
from farl_engine.checkpoint import CheckpointStore
from farl_engine.data import Batch
from farl_engine.distributed import World
from farl_engine.graphs import CudaRecorder, Recorder, StepGraphs
from farl_engine.loop import Run, train
from farl_engine.metrics import MetricsLog, Progress
from farl_engine.optim import FiniteGuard, LearningRate
from farl_kernels import sample_block_masks, use_backend
from tests.support.steps import Brightness, coloured_batch
from tests.support.tape import HostReadError, NoHostRead, Tape

PAIRS, STEPS, BUCKETS = 8, 20, 3
CPU = torch.device("cpu")


def batch(step: int, *, micro_batch: int = 0, pad: bool = False) -> Batch:
    """Pictures with captions of three total lengths, in turns."""
    longer = " indeed" * (2 * (step % BUCKETS))

    def captions_of(kinds: list[int]) -> list[str]:
        return [f"a face of kind {kind}{' or so' * (row % 3)}{longer}" for row, kind in enumerate(kinds)]

    return coloured_batch(step, PAIRS, captions_of, micro_batch=micro_batch, pad=pad)


class Batches:
    """In place of a loader."""

    error = None

    def __init__(self, start: int, make: Callable[[int], Batch]) -> None:
        self._start, self._make = start, make
        self.bad_samples: dict[str, int] = {}

    def __iter__(self) -> Iterator[Batch]:
        return map(self._make, range(self._start, STEPS))

    def check_bad(self) -> None: ...

    def stage_times(self) -> dict[str, float]:
        return dict.fromkeys(("read", "decode", "text", "device_decode", "wait_for_batch", "queue_depth"), 0.0) | {
            "mean_queue_depth": 0.0,
            "threads": 1.0,
        }


def make_run(
    folder: Path,
    recorder: Recorder | None,
    *,
    start: int = 0,
    stop_at: int = STEPS,
    device: torch.device = CPU,
    micro_batch: int = 0,
    recompute: bool = False,
    bf16: bool = False,
) -> Run:
    """As `farl.pretrain` makes it, with batches of ours and the masks' fingerprint among the figures."""
    world = World(rank=0, size=1, device=device, control=None)
    config = TrainConfig(
        run_dir=str(folder), data="none", steps=STEPS, warmup=5, lr=1e-3, log_every=1, save_every=0, save_minutes=0
    )
    store = CheckpointStore(folder / "checkpoints", keep_last=0)
    saved = store.load(start) if start else None
    torch.manual_seed(0)
    model = FaRL(MODELS["farl-micro"])
    if saved is not None:
        model.load_state_dict(saved["model"])
    model.to(device).checkpoint_activations = recompute
    optimizer = build_optimizer(config, model, saved)
    engine = "fused" if recorder is None else "graph"
    step = TrainStep(model, world, Brightness(), mim_weight=1.0, mask_ratio=6 / 16, seed=1, bf16=bf16, engine=engine)
    digits, sample, masks = 2.0 ** torch.arange(16, device=device), step.sample_masks, [torch.empty(0)]

    def sample_masks(given: Batch) -> Masks:
        found = sample(given)
        masks[0] = found.mask
        return found

    step.sample_masks = sample_masks  # type: ignore[method-assign]

    def forward_backward(given: Batch) -> dict[str, Tensor]:
        return step(given) | {"masks": (masks[0] * digits).sum()}

    return Run(
        world=world,
        model=model,
        optimizer=optimizer,
        loader=Batches(  # type: ignore[arg-type]
            start, lambda number: batch(number, micro_batch=micro_batch, pad=recorder is not None).to(device)
        ),
        forward_backward=forward_backward,
        after_update=lambda: clamp_logit_scale(model),
        snapshot=lambda number: {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
        evaluate=None,
        store=store,
        log=MetricsLog(folder, resume_step=start),
        progress=Progress(start=start, total=STEPS, enabled=False),
        schedule=schedule(config, stop_at),
        global_batch=PAIRS,
        flops_per_sample=1.0,
        start_step=start,
        recorder=recorder,
    )


FIGURES = ("step", "loss", "loss_contrastive", "loss_mim", "accuracy_mim", "grad_norm", "logit_scale", "masks", "lr")


def logged(folder: Path) -> Tensor:
    """float64 [updates, figures]."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([[line[name] for name in FIGURES] for line in lines], dtype=torch.float64)


def assert_same(one: Run, other: Run, folder: Path, *, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    """Figures of every update, and weights at the end."""
    a, b = logged(folder / "one"), logged(folder / "other")
    steps = one.schedule.stop_at
    assert len(a) == steps and torch.equal(a[:, -2:], b[:, -2:])
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
    for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol)
        assert one.optimizer.state[p]["step"] == other.optimizer.state[q]["step"] == steps


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CPU computes on the host without waiting for anything is computed as it is on a GPU."""
    monkeypatch.setattr(farl.step, "sample_block_masks", partial(sample_block_masks, backend="reference"))
    monkeypatch.setattr(farl_kernels.attention.op, "_check_cu_seqlens", lambda op, starts, longest, *_: longest)


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"micro_batch": 3}, marks=pytest.mark.slow),
        pytest.param({"recompute": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_recorded_run_learns_the_same(tmp_path: Path, options: dict[str, Any]) -> None:
    plain, tape = make_run(tmp_path / "one", None, **options), Tape()
    recorded = make_run(tmp_path / "other", tape, **options)
    train(plain)
    train(recorded)
    assert_same(plain, recorded, tmp_path)
    masks, rates = logged(tmp_path / "other")[:, -2:].unbind(1)
    assert len(masks.unique()) == STEPS
    assert rates.tolist() == [recorded.schedule.learning_rate(step) for step in range(STEPS)]
    buckets = {len(given.text.parts[0].tokens) for given in recorded.loader}
    assert len(buckets) == (2 if options.get("micro_batch") else BUCKETS)
    assert (tape.rehearsals, len(tape.recordings), tape.discarded) == (StepGraphs.WARM_UP, len(buckets), 0)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_cut_recorded_run_is_the_straight_one(tmp_path: Path) -> None:
    straight, tape = make_run(tmp_path / "one", Tape(), stop_at=11), Tape()
    train(straight)
    train(make_run(tmp_path / "other", Tape(), stop_at=5))
    resumed = make_run(tmp_path / "other", tape, start=5, stop_at=11)
    train(resumed)
    assert_same(straight, resumed, tmp_path, rtol=0, atol=0)
    assert len(tape.recordings) == BUCKETS
    # And on from there with the other engine.
    train(make_run(tmp_path / "other", None, start=11, stop_at=12))


def prepared(run: Run) -> Callable[[Batch], dict[str, Tensor]]:
    """The update of the loop."""
    guard = FiniteGuard(run.world.device)
    guard.attach(run.optimizer)
    LearningRate(run.optimizer, run.world.device)
    return loop._update_of(run, guard, torch.zeros((), device=run.world.device))


@pytest.mark.parametrize("options", [{}, {"micro_batch": 3}, {"recompute": True}, {"bf16": True}], ids=str)
@pytest.mark.usefixtures("as_on_a_gpu")
def test_an_update_reads_nothing_on_the_host(tmp_path: Path, options: dict[str, Any]) -> None:
    run = make_run(tmp_path, None, **options)
    update, given = prepared(run), next(iter(run.loader))
    # Tables are copied to a device once.
    update(given)
    with NoHostRead():
        figures = update(given)
    assert figures["loss"] > 0


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_host_read_in_an_update_would_be_seen(tmp_path: Path) -> None:
    run = make_run(tmp_path, None)
    inner = run.forward_backward
    run.forward_backward = lambda given: {name: value + 0 * value.item() for name, value in inner(given).items()}
    update, given = prepared(run), next(iter(run.loader))
    update(given)
    with pytest.raises(HostReadError), NoHostRead():
        update(given)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_kernels_of_a_gpu_need_no_value_of_the_host(bf16: bool) -> None:
    """Forward and backward by way of the Triton ops, on tensors that have no values."""
    meta = torch.device("meta")
    model = FaRL(MODELS["farl-micro"]).to(meta)
    world = World(rank=0, size=1, device=meta, control=None)
    options = {"mim_weight": 1.0, "mask_ratio": 6 / 16, "seed": 1, "bf16": bf16}
    step = TrainStep(model, world, Brightness(), engine="graph", **options)
    with use_backend("triton"):
        figures = step(batch(0, pad=True).to(meta))
    assert {value.device.type for value in figures.values()} == {"meta"}
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("device", "size", "profile", "message"),
    [
        ("cpu", 1, 0, r"--engine graph records CUDA graphs, and this runs on cpu: use --engine fused"),
        ("cuda", 2, 0, r"--engine graph is for one process, and there are 2: use --engine fused"),
        ("cuda", 1, 20, r"--profile shows nothing .*: use --engine fused with it"),
    ],
)
def test_graphs_are_refused_where_they_cannot_be(device: str, size: int, profile: int, message: str) -> None:
    world = World(rank=0, size=size, device=torch.device(device), control=None)
    config = TrainConfig(run_dir="r", data="d", engine="graph", profile=profile)
    with pytest.raises(ValueError, match=message):
        check_engine(config, world)
    check_engine(TrainConfig(**asdict(config) | {"engine": "fused"}), world)


needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("micro_batch", [0, 3])
@pytest.mark.parametrize("bf16", [False, True])
class TestOnGpu:
    pytestmark = needs_gpu

    def test_a_run_of_cuda_graphs_learns_the_same(self, tmp_path: Path, bf16: bool, micro_batch: int) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        options: dict[str, Any] = {"device": device, "bf16": bf16, "micro_batch": micro_batch}
        plain = make_run(tmp_path / "one", None, **options)
        graphs = make_run(tmp_path / "other", CudaRecorder(device), **options)
        train(plain)
        train(graphs)
        bound = 5e-2 if bf16 else 1e-4
        assert_same(plain, graphs, tmp_path, rtol=bound, atol=bound)

    @pytest.mark.parametrize("recorded", [False, True], ids=["fused", "graph"])
    def test_no_update_waits_for_the_device(self, tmp_path: Path, bf16: bool, micro_batch: int, recorded: bool) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        recorder = CudaRecorder(device) if recorded else None
        run = make_run(tmp_path, recorder, device=device, bf16=bf16, micro_batch=micro_batch)
        update, batches = prepared(run), list(run.loader)
        if recorder is not None:
            update = StepGraphs(update, run.optimizer, recorder)
        warm = StepGraphs.WARM_UP + BUCKETS
        for given in batches[:warm]:
            update(given)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for given in batches[warm:]:
                update(given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
