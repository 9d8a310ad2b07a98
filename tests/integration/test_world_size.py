"""The same run on 1, 2, 3, 4 and 8 processes: the same samples, the same losses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Runs the command and writes down the samples that each rank saw.
TRACED = """
import json, os, sys
import farl.step, farl.train
from farl import cli

seen = []
inner = farl.step.TrainStep.__call__

def traced(self, batch):
    seen.append((batch.step, batch.ids.tolist(), batch.views.tolist(), batch.used_ids.tolist()))
    return inner(self, batch)

farl.step.TrainStep.__call__ = traced
try:
    cli.run(farl.train.main, "farl.train")
finally:
    folder = sys.argv[sys.argv.index("--run-dir") + 1]
    with open(f"{folder}/seen-{os.environ.get('RANK', '0')}.json", "w") as file:
        json.dump(seen, file)
"""


def samples_seen(run_dir: Path, processes: int) -> list[list[list[int]]]:
    """For each step the ids, views and used ids of the global batch, in rank order."""
    ranks = [json.loads((run_dir / f"seen-{rank}.json").read_text()) for rank in range(processes)]
    steps = []
    for parts in zip(*ranks, strict=True):
        assert len({part[0] for part in parts}) == 1
        steps.append([[sample for part in parts for sample in part[field]] for field in (1, 2, 3)])
    return steps


@pytest.fixture(scope="module")
def runs() -> dict[int, tuple[list[Any], list[Any]]]:
    return {}


@pytest.mark.parametrize("processes", [2, 3, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 8))])
def test_samples_and_losses_do_not_depend_on_the_number_of_processes(
    processes: int,
    runs: dict[int, tuple[list[Any], list[Any]]],
    tmp_path: Path,
    run_train: Callable[..., Any],
    read_log: Callable[[Path], list[dict[str, Any]]],
) -> None:
    script = tmp_path / "traced.py"
    script.write_text(TRACED)
    for count in {1, processes} - runs.keys():
        run_dir = tmp_path / f"on-{count}"
        run_train(run_dir, processes=count, script=script)
        runs[count] = samples_seen(run_dir, count), read_log(run_dir)
    (seen, log), (seen_alone, log_alone) = runs[processes], runs[1]
    assert len(seen) == 20 and seen == seen_alone
    # 150 samples in batches of 24: the run crosses three epochs, each a permutation of all samples.
    flat = [sample for step in seen for sample in step[0]]
    assert sorted(flat[:150]) == sorted(flat[150:300]) == list(range(150)) and flat[:150] != flat[150:300]
    for line, alone in zip(log, log_alone, strict=True):
        for name in ("loss", "loss_contrastive", "loss_mim"):
            assert line[name] == pytest.approx(alone[name], abs=1e-5), f"{name} of step {line['step']}"
        assert line["accuracy_image_to_text"] == pytest.approx(alone["accuracy_image_to_text"], abs=1e-5)


def test_a_batch_that_the_processes_do_not_divide_is_refused_in_one_line(
    tmp_path: Path, run_train: Callable[..., Any]
) -> None:
    done = run_train(tmp_path, "--global-batch", "25", processes=2, check=False)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("farl.train:")]
    assert lines == ["farl.train: --global-batch 25 is not divisible by 2 processes: use 24 or 26"]
