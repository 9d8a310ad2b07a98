from __future__ import annotations

import fcntl
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from farl.study.__main__ import main, run_study
from farl.study.plans import Plan

# Seconds, on a machine that has other work.
PATIENCE = 400

RUN = """
import pickle, sys
from pathlib import Path
from farl.study.__main__ import run_study
from farl_engine import stop
if __name__ == "__main__":
    stop.install()
    plan = pickle.loads(Path(sys.argv[1]).read_bytes())
    sys.exit(run_study(plan, Path(sys.argv[2]), jobs=int(sys.argv[3])))
"""


def start(plan: Plan, tmp_path: Path, jobs: int = 1) -> subprocess.Popen[str]:
    (tmp_path / "plan.pickle").write_bytes(pickle.dumps(plan))
    command = [sys.executable, "-c", RUN, str(tmp_path / "plan.pickle"), str(tmp_path / "run"), str(jobs)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)  # type: ignore[call-overload]


def wait_for(path: Path, pattern: str) -> None:
    end = time.monotonic() + PATIENCE
    while not list(path.glob(pattern)):
        assert time.monotonic() < end, f"no {pattern}"
        time.sleep(0.02)


def test_a_killed_study_goes_on_and_loses_no_cell(one_task: Plan, tmp_path: Path) -> None:
    cells = tmp_path / "run" / "cells"
    first = start(one_task, tmp_path)
    wait_for(cells, "attributes-*.json")
    first.kill()
    first.communicate()
    before = {path.name: path.stat().st_mtime_ns for path in cells.glob("[!.]*.json")}
    second = start(one_task, tmp_path)
    out, _ = second.communicate(timeout=PATIENCE)
    assert second.returncode == 0, out
    after = {path.name: path.stat().st_mtime_ns for path in cells.glob("[!.]*.json")}
    assert set(after) == {"check-attributes.json", *(f"attributes-1-scratch-seed{seed}.json" for seed in range(3))}
    assert {name: after[name] for name in before} == before
    assert not list((tmp_path / "run" / "work").iterdir())
    # Seeds are different runs.
    values = [json.loads((cells / f"attributes-1-scratch-seed{seed}.json").read_text()) for seed in range(3)]
    assert len({str(value["metrics"]) for value in values}) == 3
    assert all(value["updates"] == 2 and value["cpu_seconds"] > 0 for value in values)


def test_a_run_folder_of_another_plan_or_in_use_is_refused(one_task: Plan, tiny: Plan, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "plan.json").write_text(json.dumps({"fingerprint": tiny.fingerprint()}))
    with pytest.raises(ValueError, match=r"belongs to another plan .* use another --run-dir"):
        run_study(one_task, run, jobs=1)
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"in use by another farl\.study"):
            run_study(one_task, run, jobs=1)


def test_a_dry_run_computes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        assert main(["short", "--dry-run"]) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert "180 fine-tunings" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_all_arms_and_tasks_end_to_end_stopped_once(tiny: Plan, tmp_path: Path) -> None:
    first = start(tiny, tmp_path, jobs=2)
    wait_for(tmp_path / "run" / "cells", "parsing-*.json")
    first.send_signal(signal.SIGTERM)
    out, _ = first.communicate(timeout=PATIENCE)
    assert first.returncode == 0, out
    assert "stopped by SIGTERM" in out
    assert "the same command goes on" in out
    assert "Partial" in (tmp_path / "run" / "study.md").read_text()
    second = start(tiny, tmp_path, jobs=2)
    out, _ = second.communicate(timeout=PATIENCE)
    assert second.returncode == 0, out
    content = json.loads((tmp_path / "run" / "study.json").read_text())
    assert content["missing"] == []
    assert all(row["difference"]["n"] == 2 for row in content["statistics"] if row["arm"] != "scratch")
    losses = {cell["arm"]: cell["losses"] for cell in content["cells"] if cell["kind"] == "pretrain"}
    assert losses["mim"]["loss_contrastive"] == losses["contrast"]["loss_mim"] == 0
    assert losses["contrast+mim"]["loss_mim"] > 0
    assert (tmp_path / "run" / "study.png").stat().st_size > 10_000
