"""Making a token cache survives kill -9, and another number of processes goes on with it."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from farl.tokens.cache import CacheWriter
from farl.tokens.manifest import MANIFEST, Manifest
from farl_engine.data import ShardWriter


def tokenize_command(shards: str, out: Path, processes: int) -> list[str]:
    launcher = [sys.executable]
    if processes > 1:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = str(listener.getsockname()[1])
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", port]
    words = ["--data", shards, "--out", str(out), "--model", "farl-micro", "--device", "cpu", "--batch-size", "8"]
    return [*launcher, "-m", "farl.data", "tokenize", *words, "--threads", "1", "--views", "2"]


@pytest.mark.slow
def test_killed_for_real_and_finished_by_other_numbers_of_processes(tmp_path: Path) -> None:
    """kill -9 as soon as blocks appear; one process begins, two go on and are killed too, three finish."""
    folder = tmp_path / "data"
    folder.mkdir()
    with ShardWriter(folder / "faces-%02d.tar", samples_per_shard=500) as writer:
        rng = np.random.default_rng(0)
        for number in range(2000):
            buffer = io.BytesIO()
            coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            coarse.resize((200, 200), Image.Resampling.BICUBIC).save(buffer, "JPEG")
            writer.write(f"{number:04d}", {"jpg": buffer.getvalue(), "txt": "a face"})
    shards, environment = str(folder / "*.tar"), {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, out = tmp_path / "whole", tmp_path / "cut"
    subprocess.run(tokenize_command(shards, whole, 1), check=True, env=environment, capture_output=True)
    finished = 0
    for processes, more in ((1, 3), (2, 6)):
        job = subprocess.Popen(tokenize_command(shards, out, processes), env=environment)
        deadline = time.monotonic() + 120
        while count_finished(out) < finished + more:
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        # torchrun's processes outlive it when it has no time to end them.
        for pid in [*children(job.pid), job.pid]:
            os.kill(pid, signal.SIGKILL)
        job.wait()
        finished = count_finished(out)
        assert 0 < finished < 63
    done = subprocess.run(tokenize_command(shards, out, 3), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{finished} of 63 blocks are there; {63 - finished} to make" in done.stdout
    for name in ("tokens.bin", "status.bin", "blocks.bin", "codebook.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def children(pid: int) -> list[int]:
    """Processes that a process started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def count_finished(folder: Path) -> int:
    if not (folder / MANIFEST).exists():
        return 0
    return int(CacheWriter(folder, Manifest.read(folder)).finished().sum())
