"""Hard limits and budgets: which compiled kernels the gate lets through.

`budgets/triton_<major>.<minor>.json` holds, for an architecture and a kernel, the registers and shared memory that it
took when the budget was written: ``{"sm_90": {"op.kernel.bucket/function": {"registers": 96, "shared": 32768}}}``. A
kernel may spill only where its entry says, by hand, ``"spills": N`` and ``"reason": "..."``. Under a triton that has no
file only the hard limits hold.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import triton

from farl_kernels.aot.build import Build
from farl_kernels.aot.resources import Resources, shared_limit

FOLDER = Path(__file__).with_name("budgets")
Budgets = dict[str, dict[str, dict[str, Any]]]


def triton_version() -> str:
    """Major and minor: "3.9"."""
    return ".".join(triton.__version__.split(".")[:2])


def budget_file(folder: Path = FOLDER) -> Path:
    return folder / f"triton_{triton_version()}.json"


def read_budgets(folder: Path = FOLDER) -> Budgets | None:
    """The budgets of this triton, or None where it has none."""
    path = budget_file(folder)
    return json.loads(path.read_text()) if path.exists() else None


def write_budgets(measured: list[tuple[Build, Resources]], *, keep_others: bool, folder: Path = FOLDER) -> Path:
    """Make what was measured the budget; allowances for spills stay. `keep_others`: entries not measured stay too."""
    before = read_budgets(folder) or {}
    after: Budgets = {name: dict(entries) for name, entries in before.items()} if keep_others else {}
    for build, resources in measured:
        entry = {"registers": resources.registers, "shared": resources.shared}
        stated = before.get(build.architecture, {}).get(build.name, {})
        entry |= {key: stated[key] for key in ("spills", "reason") if key in stated and resources.spills}
        after.setdefault(build.architecture, {})[build.name] = entry
    folder.mkdir(exist_ok=True)
    path = budget_file(folder)
    lines = [
        f' "{architecture}": {{\n'
        + ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(entries.items()))
        + "\n }"
        for architecture, entries in sorted(after.items())
    ]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return path


def over_limits(build: Build, resources: Resources, budgets: Budgets | None) -> list[str]:
    """What no kernel may do, a line each. `budgets` may state allowances for spills."""
    found: list[str] = []
    stated = (budgets or {}).get(build.architecture, {}).get(build.name, {})
    allowed = stated.get("spills", 0) if stated.get("reason") else 0
    if resources.spills > allowed:
        found.append(f"{resources.spills} spilling loads and stores, {allowed} allowed")
    limit = shared_limit(build.architecture)
    if resources.shared > limit:
        found.append(f"{resources.shared} bytes of shared memory, a block can have {limit}")
    elif resources.blocks_per_sm == 0:
        found.append("not one block fits on an SM")
    if build.own and build.case.hgmma and build.architecture == "sm_90" and not resources.hgmma:
        found.append("no HGMMA (warp-group products)")
    if build.own and build.case.streams and not (resources.ldgsts or resources.tma):
        found.append("no asynchronous copies (LDGSTS or TMA)")
    return found


def over_budget(build: Build, resources: Resources, budgets: Budgets) -> list[str]:
    """What this kernel did not do when its budget was written, a line each."""
    budget = budgets.get(build.architecture, {}).get(build.name)
    if budget is None:
        return ["no budget: look at its row, then write one with --update"]
    units = {"registers": "registers", "shared": "bytes of shared memory"}
    return [
        f"{getattr(resources, name)} {unit}, budget {budget[name]}"
        for name, unit in units.items()
        if getattr(resources, name) > budget[name]
    ]


def stale(measured: list[Build], budgets: Budgets | None, architectures: list[str]) -> list[str]:
    """Budgets of kernels that no case starts any more."""
    names = {(build.architecture, build.name) for build in measured}
    return [
        f"{architecture} {name}: a budget that no case uses; --update drops it"
        for architecture in architectures
        for name in (budgets or {}).get(architecture, {})
        if (architecture, name) not in names
    ]
