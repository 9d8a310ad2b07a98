"""The ahead-of-time gate, in processes of its own: under TRITON_INTERPRET kernels cannot be compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from farl_kernels import tables

pytest.importorskip("triton")
from farl_kernels.aot import check, resources

PRODUCT = "fake.product.any/fake_product_kernel"
GOOD = {"BLOCK": 64, "num_warps": 4, "num_stages": 3}


def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=plain | (env or {}))


def gate_on_fakes(tmp_path: Path, *runs: tuple[dict[str, int], list[str]]) -> list[SimpleNamespace]:
    """Status, out and err of the gate on `gate_on_fakes.py` with each configuration and arguments."""
    script, results = Path(__file__).with_name("gate_on_fakes.py"), tmp_path / "results.json"
    done = run(str(script), json.dumps(runs), str(results))
    assert done.returncode == 0, done.stderr
    return [SimpleNamespace(**found) for found in json.loads(results.read_text())]


def test_a_regression_fails_the_check(tmp_path: Path) -> None:
    rows, folder = tmp_path / "rows.json", ["--budgets", str(tmp_path / "budgets")]
    made, same, more, small, spilling, too_large = gate_on_fakes(
        tmp_path,
        (GOOD, ["--update", "--json", str(rows), *folder]),
        (GOOD, ["--check", *folder]),
        (GOOD | {"num_stages": 5}, ["--check", "--arch", "sm_90", *folder]),
        (GOOD | {"BLOCK": 32, "num_stages": 1}, ["--check", *folder]),
        (GOOD | {"BLOCK": 128, "num_warps": 2}, ["--check", "--arch", "sm_80", "--budgets", str(tmp_path / "none")]),
        (GOOD | {"BLOCK": 128, "num_stages": 8}, ["--check", "--arch", "sm_80", "--budgets", str(tmp_path / "none")]),
    )
    assert made.status == 0, made.err
    kernels = {row["architecture"]: row for row in json.loads(rows.read_text())["kernels"]}
    assert set(kernels) == set(tables.architectures())
    assert kernels["sm_90"]["hgmma"] and not kernels["sm_90"]["hmma"] and kernels["sm_80"]["hmma"]
    assert all(row["ldgsts"] and row["spills"] == 0 and row["shared"] >= 2**15 for row in kernels.values())
    assert made.out.count(PRODUCT) == 2

    assert same.status == 0 and same.err == "", same.err

    assert more.status == 1
    assert f"FAILED sm_90 {PRODUCT}: 81920 bytes of shared memory, budget 49152" in more.err

    # No copies are started ahead in a single stage, and the products of 32 rows are no warp group's.
    assert small.status == 1
    assert f"FAILED sm_80 {PRODUCT}: no asynchronous copies (LDGSTS or TMA)" in small.err
    assert f"FAILED sm_90 {PRODUCT}: no HGMMA (warp-group products)" in small.err

    assert spilling.status == 1 and "hard limits only" in spilling.out
    assert "spilling loads and stores, 0 allowed" in spilling.err

    assert too_large.status == 1
    assert "bytes of shared memory, a block can have 166912" in too_large.err


def test_shipped_kernels_of_one_entry(tmp_path: Path) -> None:
    wanted = ["-m", "farl_kernels.aot", "--check", "--only", "token_loss.total"]
    found = run(*wanted)
    assert found.returncode == 0, found.stderr
    assert "token_loss.total.any/token_loss_total_kernel sm_80" in found.stdout

    quiet = run(*wanted, "--quiet")
    assert quiet.returncode == 0 and "token_loss_total_kernel" not in quiet.stdout and "2 kernels in" in quiet.stdout

    # A table that the environment names is what is compiled.
    table = {"total": {"any": {"BLOCK": 2048, "num_warps": 1, "num_stages": 1}}}
    (tmp_path / "token_loss.json").write_text(json.dumps(table))
    worse = run(*wanted, "--arch", "sm_80", env={tables.ENVIRONMENT: str(tmp_path)})
    assert worse.returncode == 1 and "spilling" in worse.stderr, worse.stdout


def test_the_interpreter_is_refused() -> None:
    refused = run("-m", "farl_kernels.aot", "--check", env={"TRITON_INTERPRET": "1"})
    assert refused.returncode == 2
    assert refused.stderr == "aot: TRITON_INTERPRET=1 is set, under which nothing is compiled: unset it\n"


def build(name: str = "x", *, own: bool = True, **case: bool) -> Any:
    flags = {"hgmma": False, "streams": False} | case
    return SimpleNamespace(name=name, architecture="sm_90", own=own, case=SimpleNamespace(**flags))


PLAIN = resources.Resources(64, 1024, 0, 0, 4, 0, 0, 0, 0, 8, 8)


def test_a_spill_is_allowed_only_with_a_reason() -> None:
    spilling = replace(PLAIN, spills=5)
    entry = {"registers": 64, "shared": 1024}
    assert check.over_limits(build(), PLAIN, None) == []
    for stated in ({}, {"spills": 5}, {"reason": "a test"}, {"spills": 4, "reason": "a test"}):
        assert len(check.over_limits(build(), spilling, {"sm_90": {"x": entry | stated}})) == 1
    stated = {"spills": 5, "reason": "a test"}
    assert check.over_limits(build(), spilling, {"sm_90": {"x": entry | stated}}) == []
    assert len(check.over_limits(build(), spilling, {"sm_80": {"x": entry | stated}})) == 1


def test_kernels_beside_the_entry_need_no_tensor_cores() -> None:
    wanted = {"hgmma": True, "streams": True}
    assert len(check.over_limits(build(**wanted), PLAIN, None)) == 2
    assert check.over_limits(build(own=False, **wanted), PLAIN, None) == []
    assert check.over_limits(build(**wanted), replace(PLAIN, hgmma=1, tma=1), None) == []


def test_budgets() -> None:
    budgets = {"sm_90": {"x": {"registers": 63, "shared": 1000}, "gone": {"registers": 1, "shared": 1}}}
    assert check.over_budget(build(), PLAIN, budgets) == [
        "64 registers, budget 63",
        "1024 bytes of shared memory, budget 1000",
    ]
    assert check.over_budget(build("new"), PLAIN, budgets) == [
        "no budget: look at its row, then write one with --update"
    ]
    assert check.stale([build()], budgets, ["sm_90"]) == ["sm_90 gone: a budget that no case uses; --update drops it"]


def test_update_keeps_what_was_stated_by_hand(tmp_path: Path) -> None:
    stated = {"spills": 5, "reason": "a test"}
    check.write_budgets([(build(), replace(PLAIN, spills=5)), (build("y"), PLAIN)], keep_others=False, folder=tmp_path)
    table = check.read_budgets(tmp_path)
    assert table == {"sm_90": {name: {"registers": 64, "shared": 1024} for name in "xy"}}
    table["sm_90"]["x"] |= stated
    check.budget_file(tmp_path).write_text(json.dumps(table))
    check.write_budgets([(build(), replace(PLAIN, spills=3))], keep_others=True, folder=tmp_path)
    assert check.read_budgets(tmp_path) == table
    check.write_budgets([(build(), PLAIN)], keep_others=False, folder=tmp_path)
    assert check.read_budgets(tmp_path) == {"sm_90": {"x": {"registers": 64, "shared": 1024}}}


def test_blocks_per_sm() -> None:
    # Registers: 65,536 of an SM; 128 registers and 4 warps are a quarter of it.
    assert resources.blocks_per_sm(128, 0, 4, "sm_80") == 4
    assert resources.blocks_per_sm(129, 0, 4, "sm_80") == 3
    assert resources.blocks_per_sm(16, 0, 1, "sm_80") == 32
    assert resources.blocks_per_sm(64, 0, 32, "sm_90") == 1
    assert resources.blocks_per_sm(32, 100 * 1024, 4, "sm_80") == 1
    assert resources.blocks_per_sm(32, 100 * 1024, 4, "sm_90") == 2
    assert resources.blocks_per_sm(32, 163 * 1024, 4, "sm_80") == 1
    assert resources.blocks_per_sm(255, 0, 16, "sm_80") == 0
