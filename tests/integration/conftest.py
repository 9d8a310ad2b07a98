"""Shards and commands for whole runs of a micro model on a CPU."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

MICRO = [
    *(
        "quickstart",
        "--model",
        "farl-micro",
        "--device",
        "cpu",
        "--steps",
        "20",
        "--warmup",
        "2",
        "--global-batch",
        "24",
    ),
    *("--log-every", "1", "--eval-every", "0", "--save-every", "0", "--save-minutes", "0", "--threads", "1"),
    *("--eval-data", "", "--timeout", "60"),
]


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three shards of unequal size, 150 faces: an epoch ends within the seventh step of 24."""
    from farl.faces import draw
    from farl_engine.data import write_shards

    folder = tmp_path_factory.mktemp("shards")
    for number, (first, last) in enumerate(((0, 70), (70, 120), (120, 150))):
        samples = [face_sample(draw(face, size=40), f"{face:04d}") for face in range(first, last)]
        write_shards(samples, folder / f"faces-{number}-%06d.tar", samples_per_shard=1000)
    return str(folder / "faces-*.tar")


@pytest.fixture
def train_command(shards: str) -> Callable[..., list[str]]:
    """The command line of a run; later options win over `MICRO`'s."""

    def command(run_dir: Path, *options: str, processes: int = 1, script: Path | None = None) -> list[str]:
        target = [str(script)] if script else ["-m", "farl.train"]
        launcher = [sys.executable]
        if processes > 1:
            launcher += [
                "-m",
                "torch.distributed.run",
                "--nproc-per-node",
                str(processes),
                "--master-port",
                free_port(),
            ]
        return [*launcher, *target, *MICRO, "--data", shards, "--run-dir", str(run_dir), *options]

    return command


@pytest.fixture
def run_train(
    train_command: Callable[..., list[str]], environment: dict[str, str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run to the end and return what it said; a failure shows it."""

    def run(*arguments: Any, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(train_command(*arguments, **options), capture_output=True, text=True, env=environment)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    return run


@pytest.fixture
def read_log() -> Callable[[Path], list[dict[str, Any]]]:
    """The lines of a run's metrics.jsonl."""
    return lambda run_dir: [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def environment() -> dict[str, str]:
    """One thread a process: sums then do not depend on how many processes share the cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def face_sample(face: Any, key: str) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(face.image).save(buffer, "JPEG", quality=90)
    return {"key": key, "image": buffer.getvalue(), "caption": face.caption}


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])
