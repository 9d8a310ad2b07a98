"""What a person is told of waiting for data: a name when it matters, advice once."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from farl_engine import reporter as reporter_module
from farl_engine.distributed import World
from farl_engine.metrics import MetricsLog, Progress
from farl_engine.reporter import Reporter


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A reporter, a clock to move, and the seconds that the loader will tell."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(reporter_module.time, "monotonic", lambda: clock.now)
    seconds = {"read": 0.0, "decode": 0.0, "text": 0.0, "device_decode": 0.0, "wait_for_batch": 0.0}
    times = seconds | {"queue_depth": 3.0, "mean_queue_depth": 2.0, "threads": 2.0}
    asked: list[int] = []

    def stage_times() -> dict[str, float]:
        asked.append(1)
        return dict(times)

    run = SimpleNamespace(
        world=World(rank=0, size=1, device=torch.device("cpu"), control=None),
        loader=SimpleNamespace(stage_times=stage_times),
        log=MetricsLog(tmp_path, resume_step=0),
        progress=Progress(start=0, total=9, enabled=True),
        global_batch=8,
        flops_per_sample=1.0,
        start_step=0,
    )
    guard = SimpleNamespace(state=lambda: torch.zeros(2, dtype=torch.float64), read=lambda numbers: None)
    failures: list[BaseException] = []
    made = Reporter(run, guard, failures)  # type: ignore[arg-type]

    def step(number: int, waited: float, **changed: float) -> dict[str, Any]:
        """An interval of ten seconds; the line that it leaves in the log."""
        clock.now += 10.0
        made.data_seconds = waited
        times.update(changed, wait_for_batch=waited)
        figures = {"loss": torch.tensor(1.0), "bad_samples": torch.tensor(0.0)}
        made.report(number, figures, 0.1, now=True)
        assert not failures
        return json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])

    return SimpleNamespace(step=step, asked=asked, reporter=made)


def test_waiting_is_told_by_name_when_it_matters(make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    line = make.step(1, 0.1, decode=18.0)
    assert line["data_wait_fraction"] == 0.01 and line["loader"]["bottleneck"] == "step"
    assert line["loader"]["decode"] == 0.9 and line["loader"]["queue_depth"] == 2
    assert "data wait" not in capsys.readouterr().out
    line = make.step(2, 2.5)
    assert line["loader"]["bottleneck"] == "decode" and line["loader"]["wait"] == 0.25
    said = capsys.readouterr().out
    assert "data wait 25% (decode)" in said and "--decoder dali" in said
    make.step(3, 2.5)
    said = capsys.readouterr().out
    assert "data wait 25% (decode)" in said and "--decoder dali" not in said
    make.step(4, 2.5, text=19.0, decode=0.1)
    assert "most of it is text" in capsys.readouterr().out


def test_the_first_step_gets_no_advice(make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    make.step(1, 5.0, decode=18.0)
    said = capsys.readouterr().out
    assert "data wait 50% (decode)" in said and "--threads" not in said


def test_what_the_loader_did_during_an_evaluation_is_nobodys(make: Any) -> None:
    make.step(1, 0.0)
    before = len(make.asked)
    make.reporter.report_evaluation(1, {"image_to_text_r1": 0.5})
    assert len(make.asked) == before + 1
    make.reporter.report_evaluation(1, None)
    assert len(make.asked) == before + 1
