"""Recording real updates of a tiny model on a CPU."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from farl_engine import profiler as module
from farl_engine.profiler import Profiler, Recording, note, part

UPDATES = 2
NEEDED = Profiler.WARM_UP + UPDATES + 1


class SlowBackward(torch.autograd.Function):
    """The same tensor; the backward pass sleeps."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        time.sleep(0.02)
        return gradients


class Trial:
    """A run of updates in which a profiler looks on."""

    def __init__(self, folder: Path) -> None:
        self.found: list[Recording] = []
        self.said: list[str] = []
        self.folder = folder
        self.report: Callable[[Recording], None] = self.found.append
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 8)

    def run(self, steps: int, *, fail_at: int | None = None) -> None:
        with Profiler(
            self.folder, updates=UPDATES, device=torch.device("cpu"), report=self.report, say=self.said.append
        ) as profiler:
            for step in range(100, 100 + steps):
                profiler.begin(step)
                if step == fail_at:
                    raise RuntimeError("the run fails")
                self.update()

    def update(self) -> None:
        with part("wait"):
            time.sleep(0.005)
        with part("layer"):
            hidden = self.layer(torch.ones(4, 8))
        with part("slow"):
            slow = SlowBackward.apply(hidden)
        with part("square"):
            loss = slow.square().mean()
        with part("gradients"):
            loss.backward()
        note("updates", 3)


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    return Trial(tmp_path / "profile")


def test_parts_of_an_update_add_up_to_its_time(trial: Trial) -> None:
    trial.run(NEEDED + 3)
    (found,) = trial.found
    assert trial.said == []
    assert (found.first_step, found.breakdown.updates) == (100 + Profiler.WARM_UP, UPDATES)
    assert found.notes == {"updates": 3}
    assert found.plain_seconds > 0.005
    parts = found.breakdown.parts
    assert parts.keys() == {"wait", "layer", "slow", "square", "gradients", "other"}
    assert sum(time.seconds for time in parts.values()) == pytest.approx(found.breakdown.seconds, rel=0.05)
    assert parts["wait"].seconds >= 0.005
    assert parts["slow"].backward >= 0.02
    assert parts["layer"].backward > 0 and parts["square"].backward > 0
    assert parts["wait"].backward == parts["gradients"].backward == 0
    names = [op.name for op in found.breakdown.ops]
    assert "aten::addmm" in names and not any(name.startswith("part") for name in names)
    with gzip.open(found.trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    assert sum(e["name"].startswith("ProfilerStep#") for e in events if e.get("cat") == "user_annotation") == UPDATES
    assert [file.name for file in trial.folder.iterdir()] == ["trace.json.gz"]


def test_a_run_that_ends_while_it_is_recorded_tells_of_its_whole_updates(trial: Trial) -> None:
    trial.run(Profiler.WARM_UP + 2)
    (found,) = trial.found
    assert found.breakdown.updates == 1 and found.notes == {"updates": 3}
    assert not module._recording


@pytest.mark.parametrize("steps", [0, 1, Profiler.WARM_UP, Profiler.WARM_UP + 1])
def test_a_run_too_short_says_so(steps: int, trial: Trial) -> None:
    trial.run(steps)
    assert trial.found == [] and not trial.folder.exists() and not module._recording
    assert trial.said == ["no profile: the run ended before update 7, which the profiler needs"]


def test_a_run_that_fails_leaves_nothing_behind(trial: Trial) -> None:
    with pytest.raises(RuntimeError, match="the run fails"):
        trial.run(NEEDED, fail_at=100 + Profiler.WARM_UP + 1)
    assert trial.found == trial.said == [] and not trial.folder.exists() and not module._recording


def test_a_profile_that_cannot_be_written_does_not_end_the_run(trial: Trial) -> None:
    def fail(_: Recording) -> None:
        raise OSError("no space left on device")

    trial.report = fail
    trial.run(NEEDED)
    assert trial.said == ["no profile: OSError: no space left on device; the run goes on"]


def test_a_part_is_nothing_while_nobody_records_and_in_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    assert part("one") is part("another")
    note("nothing", 1)
    assert "nothing" not in module._notes

    def double(x: torch.Tensor) -> torch.Tensor:
        with part("double"):
            return 2 * x

    compiled = torch.compile(double, backend="eager", fullgraph=True)
    assert compiled(torch.ones(3)).sum() == 6
    monkeypatch.setattr(module, "_recording", True)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert compiled(torch.ones(3)).sum() == 6
    assert part("one") is not part("another")
