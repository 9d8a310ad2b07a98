"""What `bench.training` runs: model, batch and engines of a machine, and the command line of each process."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

EVALUATIONS = 5
LOG_LINES = 60


@dataclass(frozen=True)
class Plan:
    """One measurement.

    Args:
        device: "cuda" or "cpu". processes: of a run, one a GPU. threads: of the loader, a process.
        model, batch, engine: of the long run; pairs an update over all processes.
        updates: of the long run; 0: as many as fit into the time.
        probe: updates of the cold start, from which the speed is known.
        engines: compared with each other. The plain one is the first.
        engine_model, engine_batch, engine_updates: of the comparison.
        precision: "bf16" or "fp32", of all runs but the fp32 reference.
        views: crops a photograph in the token cache.
        long_share: of the time left after the cold start, for the long run; the comparison of engines has the rest.
        drawn: faces to train on, held out, and their size in pixels, where there are no photographs.
    """

    device: str
    model: str
    batch: int
    engine: str
    engines: tuple[str, ...]
    engine_model: str
    engine_batch: int
    engine_updates: int
    precision: str
    updates: int = 0
    probe: int = 12
    processes: int = 1
    threads: int = 2
    views: int = 4
    lr: float = 5e-4
    long_share: float = 0.3
    drawn: tuple[int, int, int] = (4000, 500, 224)


def plan_of(cuda: bool, processes: int = 1) -> Plan:
    """The plan that a machine can do in some eight minutes."""
    if not cuda:
        return Plan(
            device="cpu",
            model="farl-tiny",
            batch=64,
            engine="fused",
            engines=("eager", "fused", "compile"),
            engine_model="farl-tiny",
            engine_batch=32,
            engine_updates=100,
            precision="fp32",
            probe=6,
            processes=processes,
            views=2,
            lr=1e-3,
            long_share=0.4,
            drawn=(2000, 300, 96),
        )
    return Plan(
        device="cuda",
        model="farl-b16",
        batch=256 * processes,
        engine="fused",
        # Compilation takes longest, so it comes last. A graph records one process alone.
        engines=("eager", "fused", *(("graph",) if processes == 1 else ()), "compile"),
        engine_model="farl-s16",
        engine_batch=64 * processes,
        engine_updates=500,
        precision="bf16",
        processes=processes,
        threads=max(2, min(8, (os.cpu_count() or 2) // (2 * processes))),
    )


def module(*words: str) -> list[str]:
    return [sys.executable, "-m", *words]


def training(plan: Plan, scratch: Path, run_dir: Path, *words: str) -> list[str]:
    """The command of a run on the shards and the token cache below `scratch`; `words` are its other options."""
    launcher = ["farl.train"]
    if plan.processes > 1:
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(plan.processes), "-m", *launcher]
    options = {
        "--device": plan.device,
        "--data": f"{scratch}/shards/train-*.tar",
        "--run-dir": str(run_dir),
        "--visual-tokens": f"cache:{scratch}/tokens",
        "--precision": plan.precision,
        "--lr": str(plan.lr),
        "--threads": str(plan.threads),
        # One at the end is enough for minutes.
        "--save-every": "0",
        "--save-minutes": "0",
    }
    return [*module(*launcher), "quickstart", *(word for pair in options.items() for word in pair), *words]


def long_run(plan: Plan, scratch: Path, run_dir: Path, updates: int) -> list[str]:
    """The run with retrieval on held-out pairs."""
    log_every = max(1, updates // LOG_LINES)
    # Evaluations fall on log lines: each starts an interval of the log anew.
    eval_every = max(1, updates // EVALUATIONS // log_every) * log_every
    return training(
        plan,
        scratch,
        run_dir,
        *("--model", plan.model, "--engine", plan.engine, "--global-batch", str(plan.batch)),
        *("--eval-data", f"{scratch}/shards/val-*.tar", "--eval-every", str(eval_every)),
        *("--steps", str(updates), "--warmup", str(updates // 10), "--log-every", str(log_every)),
    )


def cold_run(plan: Plan, scratch: Path, run_dir: Path) -> list[str]:
    """The first updates of such a run, and one evaluation."""
    words = long_run(plan, scratch, run_dir, 10 * plan.probe)
    return [*words, "--stop-at", str(plan.probe), "--log-every", "1", "--eval-every", str(plan.probe)]


def engine_run(plan: Plan, scratch: Path, run_dir: Path, engine: str, precision: str) -> list[str]:
    """One of the runs that are compared: every loss is in its log."""
    updates = plan.engine_updates
    return training(
        plan,
        scratch,
        run_dir,
        *("--model", plan.engine_model, "--engine", engine, "--global-batch", str(plan.engine_batch)),
        # A run that leaves before its end draws no report, which nobody would look at.
        *("--steps", str(updates + 1), "--stop-at", str(updates), "--warmup", str(updates // 10)),
        *("--log-every", "1", "--eval-every", "0", "--precision", precision),
    )


def updates_in(seconds: float, *, start: float, finish: float, per_update: float) -> int:
    """How many updates a run of so many seconds has, in tens; at least 10."""
    return max(10, int((seconds - start - finish) / per_update) // 10 * 10)
