"""The loss over several ranks (gloo): the checks of ``ranks.py``, all of them in one start of the processes a size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("ranks.py")


@pytest.mark.parametrize("world_size", [2, 3, *(pytest.param(w, marks=pytest.mark.slow) for w in (1, 4, 8))])
def test_all_checks(world_size: int, tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(world_size), str(tmp_path)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(outputs)
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) == SCRIPT.read_text().count("\n@check\n") >= 17
    failures = {name: error for name, error in results.items() if error}
    assert not failures, "\n".join(f"{name}:\n{error}" for name, error in failures.items())
