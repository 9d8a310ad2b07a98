"""Adds to the results the machine, the ceilings, and what could not be measured and why."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from bench import ceilings, contest, machine


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["farl"] = machine.describe()


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    commit = machine.commit()
    commit_info |= {"id": commit["id"], "dirty": commit["dirty"]}


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    # On a GPU that has failed nothing can be measured; what was before that is kept.
    with contextlib.suppress(RuntimeError):
        output_json["ceilings"] = ceilings.measured()
    output_json["not_measured"] = contest.NOT_MEASURED
    output_json["facts"] = contest.FACTS
    # Neither the host's name nor its kernel says anything of the result; the flags of its CPU fill the file.
    info = output_json["machine_info"]
    for key in ("node", "release", "python_build"):
        info.pop(key, None)
    info["cpu"] = {key: info.get("cpu", {}).get(key) for key in ("arch", "brand_raw", "count")}
    # What is drawn is the median: the single rounds would only make the files large.
    for result in output_json["benchmarks"]:
        result["stats"].pop("data", None)
