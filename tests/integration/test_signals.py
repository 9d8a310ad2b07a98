"""SIGTERM in every phase of a run: a checkpoint, exit code 0 at every rank, and the same command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from farl_engine.checkpoint import CheckpointStore

# Runs the command with one phase slowed down and announced, and writes down with which code each rank leaves.
SLOWED = """
import os, sys, time
phase = os.environ["SLOW_PHASE"]
rank = os.environ.get("RANK", "0")
folder = sys.argv[sys.argv.index("--run-dir") + 1]

def slow(owner, name):
    inner = getattr(owner, name)
    def slowed(*args, **kwargs):
        with open(f"{folder}/phase-{rank}", "w") as file:
            file.write(str(os.getpid()))
        time.sleep(0.5)
        return inner(*args, **kwargs)
    setattr(owner, name, slowed)

def patch():
    import farl.initialize, farl.step, farl.pretrain, farl_engine.checkpoint, farl.evaluation.retrieval
    from farl.model import FaRL
    if phase == "start":
        slow(farl.pretrain, "build_model")
    elif phase == "step":
        slow(farl.step.TrainStep, "__call__")
    elif phase == "evaluation":
        slow(FaRL, "encode_image")
    elif phase == "saving":
        slow(farl_engine.checkpoint.CheckpointStore, "_write")

import farl.train
from farl import cli
from farl_engine import stop
install = stop.install
stop.install = lambda: (install(), patch())
code = None
try:
    cli.run(farl.train.main, "farl.train")
except SystemExit as leaving:
    code = leaving.code
    raise
finally:
    with open(f"{folder}/exit-{rank}", "w") as file:
        file.write(str(code))
"""


def wait_for(path: Path, process: subprocess.Popen[str]) -> str:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if path.exists() and path.read_text():
            return path.read_text()
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise AssertionError(f"{path.name} did not come: {process.communicate()[0]}")


# Each phase and each target in `make test`, all their combinations in `make test-full`.
QUICK = {("start", "one rank"), ("step", "launcher"), ("evaluation", "one rank"), ("saving", "launcher")}


SHARD = ["--save-memory", "shard"]


@pytest.mark.parametrize(
    ("phase", "target", "how"),
    [
        *(
            pytest.param(
                phase, target, [], id=f"{phase}-{target}", marks=() if (phase, target) in QUICK else pytest.mark.slow
            )
            for phase in ("start", "step", "evaluation", "saving")
            for target in ("launcher", "one rank")
        ),
        *(
            pytest.param(phase, "one rank", SHARD, id=f"{phase}-sharded", marks=pytest.mark.slow)
            for phase in ("step", "evaluation", "saving")
        ),
    ],
)
def test_sigterm_saves_and_the_same_command_goes_on(
    phase: str,
    target: str,
    how: list[str],
    tmp_path: Path,
    shards: str,
    train_command: Callable[..., list[str]],
    run_train: Callable[..., Any],
    environment: dict[str, str],
    read_log: Callable[[Path], list[dict[str, Any]]],
) -> None:
    script = tmp_path / "slowed.py"
    script.write_text(SLOWED)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    options = ["--save-every", "2", "--eval-every", "3", "--eval-data", shards] if phase != "start" else []
    command = train_command(run_dir, *options, *how, processes=2, script=script)
    process = subprocess.Popen(
        command,
        env={**environment, "SLOW_PHASE": phase},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    # Only rank 0 saves.
    announcer = 0 if phase == "saving" else 1
    rank_pid = int(wait_for(run_dir / f"phase-{announcer}", process))
    began = time.monotonic()
    os.kill(process.pid if target == "launcher" else rank_pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert [(run_dir / f"exit-{rank}").read_text() for rank in (0, 1)] == ["0", "0"], output
    assert "stopped by SIGTERM after step" in output
    # torchrun reports a signal that it got itself with a code of its own.
    assert (process.returncode != 0) == (target == "launcher"), output

    saved = CheckpointStore(run_dir / "checkpoints").latest()
    assert saved is not None and f"stopped by SIGTERM after step {saved};" in output
    assert saved == {"start": 0, "evaluation": 3}.get(phase, saved)
    said = run_train(run_dir, "--stop-at", str(saved + 1), *how).stdout
    assert f"going on after step {saved}" in said
    trained = [line["step"] for line in read_log(run_dir) if "loss" in line]
    assert trained == list(range(1, saved + 2))
