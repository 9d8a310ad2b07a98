"""Reads result files: those of pytest-benchmark with our additions, and those of `bench.gpu`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Key = tuple[str, str, str, str]
# Ahead of the single ops.
WHOLE = ("whole step", "whole step with decoding", "image tower", "loader", "loader with 1 % bad samples")


@dataclass(frozen=True)
class Result:
    """One time; `info` holds what else the benchmark noted (see `bench.contest.record`)."""

    op: str
    shape: str
    mode: str
    contender: str
    seconds: float
    info: dict[str, Any]
    file: str

    @property
    def ours(self) -> bool:
        return is_ours(self.contender)


@dataclass
class Results:
    """All results of one machine.

    Attributes:
        times: the newest result of each (op, shape, mode, contender).
        missing: the reason for each of those that has no time.
        machines: what each file says of its machine; ceilings: what it measured.
        checks: outcomes of tests, by file.
        facts: op -> sentences, of the newest file that has any.
    """

    folder: Path
    times: dict[Key, Result] = field(default_factory=dict)
    missing: dict[Key, str] = field(default_factory=dict)
    machines: dict[str, dict[str, Any]] = field(default_factory=dict)
    ceilings: dict[str, dict[str, Any]] = field(default_factory=dict)
    checks: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    facts: dict[str, list[str]] = field(default_factory=dict)

    @property
    def ops(self) -> list[str]:
        """Operations: what a user waits for first, then in the order in which they were met."""
        met = dict.fromkeys([*(key[0] for key in [*self.times, *self.missing]), *self.facts])
        return [*(op for op in WHOLE if op in met), *(op for op in met if op not in WHOLE)]

    def shapes(self, op: str) -> list[str]:
        return list(dict.fromkeys(key[1] for key in [*self.times, *self.missing] if key[0] == op))

    def contenders(self, op: str, shape: str) -> list[str]:
        """Ours first, then peers; the fastest first."""
        names = dict.fromkeys(key[3] for key in [*self.times, *self.missing] if key[:2] == (op, shape))
        return sorted(names, key=lambda name: (not is_ours(name), self._rank(op, shape, name)))

    def time(self, op: str, shape: str, mode: str, contender: str) -> Result | None:
        return self.times.get((op, shape, mode, contender))

    def modes(self, op: str, shape: str) -> list[str]:
        present = {key[2] for key in self.times if key[:2] == (op, shape)}
        return [mode for mode in ("forward", "backward", "both") if mode in present]

    def _rank(self, op: str, shape: str, contender: str) -> float:
        for mode in ("both", "forward", "backward"):
            found = self.time(op, shape, mode, contender)
            if found is not None:
                return found.seconds
        return float("inf")


def is_ours(contender: str) -> bool:
    return contender.startswith("farl")


def load(folder: Path) -> Results:
    """The results in the JSON files of `folder`; of two files with the same benchmark the later one counts."""
    results = Results(folder)
    contents = {path: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    for path, content in sorted(contents.items(), key=lambda item: item[1].get("datetime", "")):
        machine = content.get("machine_info", {}).get("farl")
        if machine:
            results.machines[path.name] = machine
        if content.get("ceilings"):
            results.ceilings[path.name] = content["ceilings"]
        steps = [step for step in content.get("steps", []) if step["counts"] or step["status"] != "ok"]
        if steps and "benchmarks" not in content:
            results.checks[path.name] = steps
        results.facts |= _facts(content)
        for left in content.get("not_measured", []):
            results.missing[_key(left)] = left["reason"]
        for benchmark in content.get("benchmarks", []):
            info = benchmark.get("extra_info", {})
            if "seconds" not in info:
                continue
            key = _key(info)
            results.times[key] = Result(*key, info["seconds"], info, path.name)
    for key in results.times:
        results.missing.pop(key, None)
    return results


def _facts(content: dict[str, Any]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for fact in content.get("facts", []):
        found.setdefault(fact["op"], []).append(fact["text"])
    return found


def _key(labels: dict[str, Any]) -> Key:
    return labels["op"], labels["shape"], labels["mode"], labels["contender"]
