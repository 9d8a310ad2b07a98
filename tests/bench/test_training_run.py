"""Processes watched from outside: real ones of Python's, and one real training of a micro model."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench import training_run
from bench.sections import ROOT
from bench.training_run import steady, watch

LINE = {"step": 1, "loss": 2.0, "pairs_per_second": 4.0, "data_wait_fraction": 0.5, "memory_bytes": 1}
WRITES = f"""
import json, pathlib, signal, sys, time
run = pathlib.Path(sys.argv[1]); run.mkdir()
def write(step):
    with (run / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({LINE!r} | {{"step": step}}) + "\\n")
"""


def run(tmp_path: Path, code: str, **options: Any) -> training_run.Finished:
    command = [sys.executable, "-S", "-c", WRITES + code, str(tmp_path / "run")]
    return watch(command, environment=dict(os.environ), folder=tmp_path, run_dir=tmp_path / "run", **options)


def test_the_time_of_the_first_update_and_the_lines_of_a_run(tmp_path: Path) -> None:
    code = "print('begins', flush=True); time.sleep(0.3); write(1); time.sleep(0.4); write(2); print('ends')"
    found = run(tmp_path, code)
    assert found.code == 0 and not found.failed and not found.stopped
    assert found.first_update is not None
    assert 0.3 < found.first_update < found.seconds - 0.25
    assert [record["step"] for record in found.records] == [1, 2]
    assert [line for _, line in found.said] == ["begins", "ends"] and found.said[0][0] < found.said[1][0] - 0.6


def test_half_a_line_is_no_update(tmp_path: Path) -> None:
    code = "log = (run / 'metrics.jsonl').open('w'); log.write('{\"step\"'); log.flush(); time.sleep(0.3); log.close()"
    assert run(tmp_path, code).first_update is None


def test_a_run_past_its_time_is_told_to_leave_and_may_save(tmp_path: Path) -> None:
    code = """
def leave(*_):
    write(7); sys.exit(0)
signal.signal(signal.SIGTERM, leave)
write(1); time.sleep(60)
"""
    found = run(tmp_path, code, end=time.time() + 0.6)
    assert found.stopped and not found.failed and [record["step"] for record in found.records] == [1, 7]


def test_a_run_that_does_not_leave_is_killed_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_run, "GRACE_SECONDS", 0.2)
    code = """
import os
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = os.fork()
if child: (run / "child").write_text(str(child))
time.sleep(60)
"""
    found = run(tmp_path, code, end=time.time() + 0.5)
    assert found.code is None and found.failed and found.seconds < 10
    stat = Path("/proc", (tmp_path / "run" / "child").read_text(), "stat")
    assert not stat.exists() or stat.read_text().split()[2] in "ZX"


def test_the_last_words_of_a_failure(tmp_path: Path) -> None:
    found = run(tmp_path, "write(1); print('no room\\n'); sys.exit(3)")
    assert found.failed and found.code == 3 and found.tail == ["no room"] and len(found.records) == 1


def test_an_interrupted_watch_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_run, "TOLD_SECONDS", 0.0)
    pid = tmp_path / "run" / "pid"

    def interrupt(_: str) -> None:
        if pid.exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "import os; (run / 'pid').write_text(str(os.getpid())); time.sleep(60)", say=interrupt)
    assert not Path("/proc", pid.read_text()).exists()


def line(step: int, rate: float, wait: float) -> dict[str, Any]:
    return {"step": step, "pairs_per_second": rate, "data_wait_fraction": wait}


def test_the_rate_is_that_of_all_pairs_in_all_the_time_after_the_first_quarter() -> None:
    # 5 updates of 8 pairs at 40 a second take 1 s, at 20 a second 2 s.
    records = [line(1, 1, 0.9), line(5, 2, 0.9), line(10, 40, 0.3), line(15, 20, 0.0), line(20, 20, 0.0)]
    found = steady(records, 8)
    assert found is not None
    assert found["pairs_per_second"] == pytest.approx(120 / 5)
    assert found["data_wait_fraction"] == pytest.approx(0.3 * 1 / 5)
    assert found["seconds_per_update"] == pytest.approx(5 / 15) and found["updates"] == 15


@pytest.mark.parametrize("records", [[], [line(1, 1, 0)], [line(1, 1, 0), line(2, 1, 0)]], ids=["none", "one", "two"])
def test_too_few_lines_say_nothing(records: list[dict[str, Any]]) -> None:
    assert steady(records, 8) is None


def test_a_real_run_of_a_micro_model(tmp_path: Path) -> None:
    from farl.faces.shards import FaceSet, write_faces

    write_faces(tmp_path / "shards", FaceSet(train=24, val=0, size=32), workers=0)
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "engine", ROOT / "kernels")))
    words = ["quickstart", "--model", "farl-micro", "--data", f"{tmp_path}/shards/train-*.tar", "--device", "cpu"]
    words += ["--steps", "8", "--warmup", "1", "--global-batch", "8", "--log-every", "1", "--threads", "1"]
    words += ["--run-dir", str(tmp_path / "run"), "--save-every", "0", "--stop-at", "5"]
    found = watch(
        [sys.executable, "-m", "farl.train", *words],
        environment=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        folder=ROOT,
        run_dir=tmp_path / "run",
    )
    assert not found.failed, found.tail
    assert len(found.records) == 5 and found.first_update is not None and 0 < found.first_update < found.seconds
    speed = steady(found.records, 8)
    assert speed is not None and speed["pairs_per_second"] > 0 and 0 <= speed["data_wait_fraction"] <= 1
    assert json.dumps(found.said).count("farl-micro on 1 x cpu") == 1
