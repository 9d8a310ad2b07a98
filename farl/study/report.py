"""What a study says: the plan in words, study.json, study.md and study.png, from the cells that exist."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from farl.study.cells import Cell, Result, cells_of, write_json
from farl.study.plans import SCRATCH, Plan
from farl.study.statistics import compare
from farl.study.study import Study


def describe_plan(plan: Plan) -> str:
    """The plan for a person, as it stands before the run."""
    cells, train = cells_of(plan), plan.pretrain
    updates = train["steps"] * sum(arm.pretrain is not None for arm in plan.arms)
    tuned = [cell for cell in cells if cell.kind == "tune"]
    lines = [f"{plan.name}: {plan.about}", f"plan {plan.fingerprint()}", ""]
    if plan.faces is not None:
        first, second = plan.faces
        lines.append(
            f"data: {first.train:,} drawn faces of {first.size} px (seed {first.seed}) to pre-train on; "
            f"{second.train:,} and {second.val:,} held-out ones of {second.size} px (seed {second.seed}) for the tasks"
        )
    else:
        lines.append("data: real photographs, split by person (alignment: by photograph), see docs/study.md")
    lines.append(
        f"pre-training: {train['model']}, {train['steps']:,} updates of {train['global_batch']}, "
        + ", ".join(f"{name} {value:g}" for name, value in train.items() if isinstance(value, float))
    )
    for arm in plan.arms:
        changes = ", ".join(f"{name} {value:g}" for name, value in (arm.pretrain or {}).items())
        what = "random weights, others for each seed" if arm.pretrain is None else changes or "as above"
        lines.append(f"  {arm.name}: {what}")
    lines.append("tasks:")
    for task in plan.tasks:
        settings = ", ".join(f"{name} {value}" for name, value in {**task.task, **task.settings}.items())
        lines.append(
            f"  {task.name}: {task.updates:,} updates at every fraction, {task.crop} px, {settings}; "
            f"{task.label} on at most {task.test_images} test images"
        )
    fractions = ", ".join(f"{100 * fraction:g} %" for fraction in plan.fractions)
    images = sum(plan.task(cell.task).updates * plan.task(cell.task).settings.get("batch", 0) for cell in tuned)
    lines += [
        f"labels: {fractions}; seeds {', '.join(map(str, plan.seeds))}",
        f"test: {plan.test}",
        "",
        f"{len(cells)} cells: {sum(cell.kind == 'pretrain' for cell in cells)} pre-trainings "
        f"({updates:,} updates, {updates * train['global_batch']:,} images), {len(tuned)} fine-tunings "
        f"({sum(plan.task(cell.task).updates for cell in tuned):,} updates, {images:,} images), "
        f"{len(plan.tasks)} checks of the files",
    ]
    return "\n".join(lines)


def write_report(
    study: Study, cells: Sequence[Cell], results: Mapping[str, Result], failures: Mapping[str, str]
) -> Path:
    """Write study.json, study.md and study.png into the run folder; the page's path."""
    from farl.study.draw import draw_study

    plan, run_dir = study.plan, study.run_dir
    rows = compare(plan, results)
    missing = [cell.key for cell in cells if cell.key not in results]
    content = {
        "plan": {"fingerprint": plan.fingerprint(), **asdict(plan), "test": plan.test},
        "identity": study.identity,
        "machine": {"cores": os.cpu_count(), "machine": platform.machine(), "system": platform.system()},
        "versions": [dict(pair) for pair in sorted({tuple(result["versions"].items()) for result in results.values()})],
        "seconds": spent(results),
        "missing": missing,
        "failures": dict(failures),
        "statistics": rows,
        "cells": [results[cell.key] for cell in cells if cell.key in results],
    }
    write_json(run_dir / "study.json", content)
    draw_study(plan, rows, run_dir / "study.png", whole=not missing)
    page = run_dir / "study.md"
    temporary = run_dir / f".study.md.{os.getpid()}.tmp"
    temporary.write_text(page_text(study, cells, results, failures, rows))
    temporary.replace(page)
    return page


def spent(results: Mapping[str, Result]) -> dict[str, dict[str, float]]:
    """ "wall" and "cpu" seconds, and the number, of the cells of each kind."""
    kinds: dict[str, dict[str, float]] = {}
    for result in results.values():
        sums = kinds.setdefault(result["kind"], {"cells": 0, "wall": 0.0, "cpu": 0.0})
        sums["cells"] += 1
        sums["wall"] += result["wall_seconds"]
        sums["cpu"] += result["cpu_seconds"]
    return {kind: {name: round(value, 1) for name, value in sums.items()} for kind, sums in kinds.items()}


def page_text(
    study: Study,
    cells: Sequence[Cell],
    results: Mapping[str, Result],
    failures: Mapping[str, str],
    rows: Sequence[dict[str, Any]],
) -> str:
    """study.md."""
    plan = study.plan
    missing = [cell.key for cell in cells if cell.key not in results]
    lines = [f"# Study {plan.name}", ""]
    if missing:
        lines += [
            f"**Partial: {len(missing)} of {len(cells)} cells are missing.** No row with a missing seed is judged.",
            "",
        ]
        lines += [f"- `{key}` failed: {reason}" for key, reason in failures.items()]
        lines += [""] * bool(failures)
    lines += ["![Study](study.png)", "", plan.test, ""]
    lines += [
        f"Figures in percent, mean [{plan.confidence:.0%} interval] over seeds.",
        "",
        f"| task | labels | arm | figure | better than {SCRATCH} by | separates | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        task = plan.task(row["task"])
        judged = {True: "**yes**", False: "no", None: "-"}[row.get("separates")] if row["arm"] != SCRATCH else ""
        difference = format_interval(row["difference"], sign=True) if "difference" in row else ""
        lines.append(
            f"| {task.name}, {task.label} | {100 * row['fraction']:g} % | {row['arm']} | {format_interval(row['own'])} "
            f"| {difference} | {judged} | {len(row['seeds'])} of {len(plan.seeds)} |"
        )
    lines += ["", "| pre-training | last losses | wall | CPU time |", "|---|---|---|---|"]
    for cell in cells:
        if cell.kind == "pretrain":
            result = results.get(cell.key)
            if result is None:
                lines.append(f"| {cell.arm} | missing | | |")
                continue
            losses = ", ".join(f"{name} {value:.3f}" for name, value in result["losses"].items())
            wall, cpu = (f"{result[f'{kind}_seconds'] / 60:.1f} min" for kind in ("wall", "cpu"))
            lines.append(f"| {cell.arm} | {losses} | {wall} | {cpu} |")
    lines += ["", _cost(results), "", "The plan:", "", "```", describe_plan(plan), "```", ""]
    return "\n".join(lines)


def format_interval(figures: Mapping[str, Any], *, sign: bool = False) -> str:
    """Mean and interval; "-" where there is nothing."""
    if figures["mean"] is None:
        return "-"
    plus = "+" if sign else ""
    text = f"{figures['mean']:{plus}.2f}"
    return text if figures["low"] is None else f"{text} [{figures['low']:{plus}.2f}, {figures['high']:{plus}.2f}]"


def _cost(results: Mapping[str, Result]) -> str:
    sums = spent(results)
    hours = math.fsum(part["cpu"] for part in sums.values()) / 3600
    parts = ", ".join(f"{kind} {part['cpu'] / 60:.0f} min ({part['cells']:g} cells)" for kind, part in sums.items())
    return (
        f"CPU time of all cells: {hours:.2f} hours, that is {hours / 2:.2f} on two cores with nothing else to do "
        f"({parts}). Drawing the faces is not counted, nor is what a killed pre-training had done since its last save."
    )
