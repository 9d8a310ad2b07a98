"""The tuner's logic, with a clock and kernels of our own; and that it wants a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from farl_kernels import tables, tune
from farl_kernels.cases import Case
from farl_kernels.tables import Config

CPU = torch.device("cpu")
USED = {"BLOCK": 4, "num_warps": 4, "num_stages": 1}


def candidate(block: int) -> Config:
    return {"BLOCK": block, "num_warps": 4, "num_stages": 1}


def case(*blocks: int, bucket: str = "any", prepared: list[Tensor] | None = None) -> Case:
    """ "Runs" are wrong for block 13, make NaN for 14 and fail for 15."""

    def prepare(device: torch.device) -> Callable[[], list[Tensor]]:
        x = torch.arange(6, dtype=torch.float32, device=device)
        if prepared is not None:
            prepared.append(x)

        def run() -> list[Tensor]:
            block = tables.lookup("fake", "copy", "any", device)["BLOCK"]
            if block == 15:
                raise RuntimeError("out of resource: shared memory\nand more")
            return [x + 0.01 if block == 13 else x * float("nan") if block == 14 else x, x.int()]

        return run

    return Case("fake", "copy", bucket, prepare, tuple(map(candidate, blocks)))


@pytest.fixture(autouse=True)
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("sm_80", "sm_90"):
        (tmp_path / "shipped" / name).mkdir(parents=True)
        table = {"copy": {"any": USED, "other": USED}}
        (tmp_path / "shipped" / name / "fake.json").write_text(json.dumps(table))
    monkeypatch.setattr(tables, "FOLDER", tmp_path / "shipped")
    return tmp_path


def clock(seconds: dict[int, float]) -> Callable[[list[tune.Run]], float]:
    def timer(runs: list[tune.Run]) -> float:
        with tables.recorded_lookups():
            for run in runs:
                run()
        return seconds[tables.lookup("fake", "copy", "any", CPU)["BLOCK"]]

    return timer


def test_the_fastest_that_is_right_is_written(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {4: 5e-6, 8: 3e-6, 16: 4e-6}
    out = shipped / "tuned"
    faults = tune.tune([case(8, 13, 14, 15, 16)], CPU, out, clock(seconds), copies=1)
    assert faults == 3
    assert json.loads((out / "fake.json").read_text()) == {"copy": {"any": candidate(8), "other": USED}}
    said = capsys.readouterr().out
    assert "[  1/  1]fake.copy.any" in said and "5.0 us" in said and "3.0 us" in said and "66.7%" in said
    assert "BLOCK=13 num_warps=4 num_stages=1: result 0 differs" in said
    assert "BLOCK=14 num_warps=4 num_stages=1: result 0 differs" in said
    assert "BLOCK=15 num_warps=4 num_stages=1: RuntimeError: out of resource: shared memory" in said


def test_what_is_written_is_used(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune.tune([case(8)], CPU, shipped / "tuned", clock({4: 2.0, 8: 1.0}), copies=1)
    monkeypatch.setenv(tables.ENVIRONMENT, str(shipped / "tuned"))
    assert tables.lookup("fake", "copy", "any", CPU) == candidate(8)


def test_noise_changes_nothing(shipped: Path) -> None:
    measured = tune.measure(case(8, 16), CPU, clock({4: 1.0, 8: 0.99, 16: 0.985}), copies=1)
    assert [one.config["BLOCK"] for one in measured] == [4, 8, 16]
    assert tune.best(measured).config == USED


def test_inputs_take_turns() -> None:
    prepared: list[Tensor] = []
    counts: list[int] = []

    def timer(runs: list[tune.Run]) -> float:
        counts.append(len(runs))
        return 1.0

    tune.measure(case(8, prepared=prepared), CPU, timer, copies=3)
    assert len(prepared) == 3 and counts == [3, 3]


def test_the_case_must_look_up_its_entry() -> None:
    with pytest.raises(ValueError, match=r"fake.copy.other: the case does not look up its entry"):
        tune.measure(case(8, bucket="other"), CPU, clock({}), copies=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([]) == 2
    assert capsys.readouterr().err == "tune: needs a CUDA GPU, and torch sees none here\n"


@pytest.mark.gpu
def test_cuda_seconds() -> None:
    x = torch.randn(1024, 1024, device="cuda")
    one, four = (tune.cuda_seconds([lambda n=n: [x @ x for _ in range(n)]]) for n in (1, 4))
    assert 2 < four / one < 6
