"""Real tasks on real processes: torchrun with two, joined by gloo, against one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from farl.faces.face import draw
from farl.faces.shards import FaceSet, write_faces

PROGRAM = Path(__file__).parent / "in_double.py"
SIZE = 32


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards for alignment; folders for parsing, whose protocol is that of the benchmarks."""
    root = tmp_path_factory.mktemp("faces")
    write_faces(root, FaceSet(train=8, val=5, size=SIZE), workers=0)
    for split, indices in (("train", range(8)), ("test", range(8, 13))):
        for index in indices:
            face = draw(index, size=SIZE)
            points = face.landmarks
            five = [points[36:42].mean(0), points[42:48].mean(0), points[30], points[48], points[54]]
            for name in ("images", "masks", "points"):
                (root / split / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(face.image).save(root / split / "images" / f"{index}.png")
            Image.fromarray(face.mask).save(root / split / "masks" / f"{index}.png")
            np.savetxt(root / split / "points" / f"{index}.txt", five)
    return root


def finetune(processes: int, task: str, run_dir: Path, options: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The result, and all weights and statistics at the end."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", free_port()]
    usual = "--init scratch:farl-micro --device cpu --resolution 32 --batch 4 --steps 6 --eval-every 3 --warmup 0"
    command += [str(PROGRAM), task, *usual.split(), "--threads", "0", "--pictures", "0", "--run-dir", str(run_dir)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=environment, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((run_dir / "result.json").read_text())
    assert result["processes"] == processes
    return result, torch.load(run_dir / "checkpoints" / "step-00000006.pt")["network"]


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("parsing", "--train {0}/train --test {0}/test --crop 32"),
        # Classes weighed by their pixels in the whole batch.
        ("parsing", "--train {0}/train-*.tar --test {0}/val-*.tar"),
        ("alignment", "--train {0} --test {0}"),
    ],
    ids=["parsing", "parsing-shards", "alignment"],
)
def test_two_processes_do_the_same(task: str, options: str, faces: Path, tmp_path: Path) -> None:
    """Weights, statistics of BatchNorm, and all figures.

    In float64 the order of sums changes about 1e-16 of a gradient, and AdamW (with an epsilon of 1e-8) makes at most a
    hundred-millionth of a step of that. In float32 it makes whole steps of the rounding in gradients that should be 0,
    such as those of a bias in front of a BatchNorm, and runs of any two orders part.
    """
    words = options.format(faces).split()
    (one, weights), (two, others) = (finetune(n, task, tmp_path / str(n), words) for n in (1, 2))
    for name, value in weights.items():
        torch.testing.assert_close(
            others[name], value, rtol=0, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )
    for record, other in zip(one["history"], two["history"], strict=True):
        assert other["metrics"] == pytest.approx(record["metrics"], abs=1e-6, nan_ok=True)
