"""A run cut into pieces equals the run in one piece, to the last bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from farl_engine.checkpoint import CheckpointStore

# Step 6 reaches the end of the first epoch (150 samples, 24 a step), 7 lies just past it, 15 inside the third.
CUTS = {"once": [7], "three times": [6, 10, 15], "at the end of an epoch": [6]}
QUICK = {(1, "three times"), (2, "once")}
TIMES = {"pairs_per_second", "data_wait_fraction", "memory_bytes", "loader"}


def assert_equal_state(one: Any, other: Any, where: str = "state") -> None:
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal_state(one[key], other[key], f"{where}[{key!r}]")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_equal_state(left, right, f"{where}[{index}]")
    else:
        assert one == other, where


def final_state(run_dir: Path) -> dict[str, Any]:
    state = CheckpointStore(run_dir / "checkpoints").load()
    # Where the run was kept and where it was told to pause are not part of what it learnt.
    state["train_config"] = {k: v for k, v in state["train_config"].items() if k not in ("run_dir", "stop_at")}
    return state


def logged(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, Callable[..., Any]], Path]:
    """The uncut run on a number of processes, made once."""
    made: dict[int, Path] = {}

    def get(processes: int, run_train: Callable[..., Any]) -> Path:
        if processes not in made:
            made[processes] = tmp_path_factory.mktemp(f"straight-{processes}")
            run_train(made[processes], processes=processes)
        return made[processes]

    return get


@pytest.mark.parametrize(
    ("processes", "cuts"),
    [
        pytest.param(n, cuts, id=f"{n}-{name}", marks=() if (n, name) in QUICK else pytest.mark.slow)
        for n in (1, 2)
        for name, cuts in CUTS.items()
    ],
)
def test_a_cut_run_equals_the_straight_one_to_the_last_bit(
    processes: int,
    cuts: list[int],
    straight: Callable[..., Path],
    tmp_path: Path,
    run_train: Callable[..., Any],
    read_log: Callable[[Path], list[dict[str, Any]]],
) -> None:
    whole = straight(processes, run_train)
    for cut in cuts:
        said = run_train(tmp_path, "--stop-at", str(cut), processes=processes).stdout
        assert f"left after step {cut}" in said
        assert CheckpointStore(tmp_path / "checkpoints").latest() == cut
    said = run_train(tmp_path, processes=processes).stdout
    assert f"going on after step {cuts[-1]}" in said
    assert_equal_state(final_state(tmp_path), final_state(whole))
    lines = logged(read_log(tmp_path))
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert lines == logged(read_log(whole))


def test_one_process_goes_on_with_the_checkpoint_of_two(
    straight: Callable[..., Path],
    tmp_path: Path,
    run_train: Callable[..., Any],
    read_log: Callable[[Path], list[dict[str, Any]]],
) -> None:
    whole = straight(1, run_train)
    run_train(tmp_path, "--stop-at", "7", processes=2)
    run_train(tmp_path)
    for line, alone in zip(read_log(tmp_path), read_log(whole), strict=True):
        assert line["loss"] == pytest.approx(alone["loss"], abs=1e-5)


SHARD = ["--save-memory", "shard"]


@pytest.mark.slow
def test_a_cut_sharded_run_equals_the_straight_one_to_the_last_bit(
    tmp_path: Path, run_train: Callable[..., Any], read_log: Callable[[Path], list[dict[str, Any]]]
) -> None:
    run_train(tmp_path / "whole", *SHARD, processes=2)
    run_train(tmp_path / "cut", *SHARD, "--stop-at", "7", processes=2)
    said = run_train(tmp_path / "cut", *SHARD, processes=2).stdout
    assert "going on after step 7" in said
    assert_equal_state(final_state(tmp_path / "cut"), final_state(tmp_path / "whole"))
    assert logged(read_log(tmp_path / "cut")) == logged(read_log(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "legs",
    [
        pytest.param([(2, SHARD), (2, [])], id="sharded to DDP"),
        pytest.param([(2, SHARD), (1, [])], id="sharded to one process"),
        pytest.param([(1, []), (3, SHARD), (2, SHARD)], id="one process to 3 and 2 sharded"),
    ],
)
def test_a_run_goes_on_with_other_processes_and_other_sharding(
    legs: list[tuple[int, list[str]]],
    straight: Callable[..., Path],
    tmp_path: Path,
    run_train: Callable[..., Any],
    read_log: Callable[[Path], list[dict[str, Any]]],
) -> None:
    whole = straight(1, run_train)
    for index, (processes, options) in enumerate(legs):
        leave = ["--stop-at", str(7 * (index + 1))] if index < len(legs) - 1 else []
        run_train(tmp_path, *options, *leave, processes=processes)
    for line, alone in zip(read_log(tmp_path), read_log(whole), strict=True):
        assert line["loss"] == pytest.approx(alone["loss"], abs=1e-5)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [tmp_path_factory.mktemp("begun")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "farl-tiny"], "model was farl-micro, is farl-tiny. Use another --run-dir, or the old settings"),
        (["--global-batch", "12"], "global batch was 24, is 12"),
        (["--seed", "1"], "seed was 0, is 1"),
        (["--data", "LESS"], "data fingerprint was"),
        (["--steps", "3"], "is after step 4, past --steps 3"),
    ],
)
def test_another_run_is_refused_in_one_line(
    options: list[str], message: str, begun: list[Path], tmp_path: Path, shards: str, run_train: Callable[..., Any]
) -> None:
    run_dir = begun[0]
    if not (run_dir / "checkpoints").exists():
        run_train(run_dir, "--stop-at", "4")
    if "LESS" in options:
        folder = Path(shards).parent
        shutil.copy(sorted(folder.glob("*.tar"))[0], tmp_path / "less.tar")
        options = ["--data", str(tmp_path / "less.tar")]
    done = run_train(run_dir, *options, check=False)
    assert done.returncode == 1
    assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_other_data_is_taken_when_told_so(begun: list[Path], run_train: Callable[..., Any], tmp_path: Path) -> None:
    run_dir = tmp_path / "copy"
    if not (begun[0] / "checkpoints").exists():
        run_train(begun[0], "--stop-at", "4")
    shutil.copytree(begun[0], run_dir)
    said = run_train(run_dir, "--seed", "1", "--allow-mismatch", "--stop-at", "5").stdout
    assert "going on after step 4" in said
