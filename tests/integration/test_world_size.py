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


# With an evaluation and a checkpoint amid, which are collective calls of their own where the state is shared out.
SHARDED = ["--save-memory", "shard", "--eval-every", "10", "--save-every", "8"]
IN_PARTS = [*SHARDED, "--save-memory", "shard,recompute", "--micro-batch", "5"]


@pytest.mark.parametrize(
    ("processes", "options"),
    [
        pytest.param(2, [], id="2"),
        pytest.param(3, [], id="3"),
        *(pytest.param(n, [], id=str(n), marks=pytest.mark.slow) for n in (4, 8)),
        pytest.param(2, SHARDED, id="2 sharded"),
        pytest.param(3, SHARDED, id="3 sharded", marks=pytest.mark.slow),
        pytest.param(2, IN_PARTS, id="2 sharded in micro-batches", marks=pytest.mark.slow),
    ],
)
def test_samples_and_losses_do_not_depend_on_the_number_of_processes(
    processes: int,
    options: list[str],
    runs: dict[int, tuple[list[Any], list[Any]]],
    tmp_path: Path,
    shards: str,
    run_train: Callable[..., Any],
    read_log: Callable[[Path], list[dict[str, Any]]],
) -> None:
    script = tmp_path / "traced.py"
    script.write_text(TRACED)
    if 1 not in runs:
        run_train(tmp_path / "alone", script=script)
        runs[1] = samples_seen(tmp_path / "alone", 1), read_log(tmp_path / "alone")
    run_dir = tmp_path / "several"
    said = run_train(run_dir, *options, "--eval-data", shards, processes=processes, script=script)
    assert "warning" not in (said.stdout + said.stderr).lower()
    assert (run_dir / "report" / "index.html").exists()
    seen, log = samples_seen(run_dir, processes), [line for line in read_log(run_dir) if "loss" in line]
    seen_alone, log_alone = runs[1]
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
