"""`farl.train --profile` in a whole run."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from farl.profiling import PARTS


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_writes_its_profile_and_goes_on(
    processes: int, tmp_path: Path, run_train: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = run_train(tmp_path, "--profile", "3", "--steps", "11", processes=processes)
    assert done.stdout.count("profiled 3 updates of ") == 1 and "step 11/11" in done.stdout
    folder = tmp_path / "profile"
    assert {path.name for path in folder.iterdir()} == {"profile.json", "profile.md", "profile.png", "trace.json.gz"}
    found = json.loads((folder / "profile.json").read_text())
    not_here = {"evaluation", "checkpoint", "other threads", "device idle"}
    assert found["parts"].keys() == PARTS.keys() - not_here
    assert found["first_step"] == 5 and found["pairs_per_process"] == 24 // processes


@pytest.mark.slow
def test_a_run_that_ends_sooner_writes_what_it_has(
    tmp_path: Path, run_train: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = run_train(tmp_path, "--profile", "1000", "--steps", "9")
    assert "profiled 3 updates of " in done.stdout
    assert json.loads((tmp_path / "profile" / "profile.json").read_text())["updates"] == 3
