from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from farl_engine.metrics import MetricsLog, Progress, memory_bytes


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_lines_past_the_resumed_step_are_written_anew(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, resume_step=0)
    for step in range(1, 6):
        log.write({"step": step, "loss": 1.0 / step})
    log.close()
    log = MetricsLog(tmp_path, resume_step=3)
    log.write({"step": 4, "loss": 0.5})
    log.close()
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    MetricsLog(tmp_path, resume_step=2).close()
    assert steps(tmp_path) == [1]


def test_numbers_survive_to_the_last_bit(tmp_path: Path) -> None:
    value = float(torch.tensor(1.0) / 3)
    log = MetricsLog(tmp_path, resume_step=0)
    log.write({"step": 1, "loss": value})
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == value


def test_tensorboard_gets_nested_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    log = MetricsLog(tmp_path, resume_step=0, trackers="tensorboard")
    log.write({"step": 1, "loss": 2.0, "eval": {"r1": 0.5}, "mfu": None})
    log.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "eval/r1"}
    assert events.Scalars("eval/r1")[0].value == 0.5


def test_a_tracker_that_is_not_installed_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r"not installed: pip install 'farl-engine\[wandb\]'"):
        MetricsLog(tmp_path, resume_step=0, trackers="wandb:faces")


def test_an_unknown_tracker_is_refused_before_anything_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    with pytest.raises(ValueError, match="no tracker 'wandb'; use tensorboard or wandb:PROJECT"):
        MetricsLog(tmp_path, resume_step=1, trackers="wandb")
    assert steps(tmp_path) == [1, 2]


def test_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(start=0, total=10, enabled=True)
    progress.advance()
    progress.show(1, "loss 1.0")
    progress.close()
    assert capsys.readouterr().out.startswith("step 1/10  loss 1.0  eta 0:00:")
    silent = Progress(start=0, total=10, enabled=False)
    silent.show(1, "loss 1.0")
    silent.say("hello")
    assert capsys.readouterr().out == ""


def test_memory_is_of_a_plausible_size() -> None:
    assert 10 * 2**20 < memory_bytes(torch.device("cpu")) < 2**40
