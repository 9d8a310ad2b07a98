from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from farl.study.cells import Cell, cells_of
from farl.study.plans import Plan
from farl.study.progress import StudyProgress
from farl.study.report import write_report
from farl.study.study import Study

VERSIONS = {"farl": "0"}


def _result(cell: Cell, plan: Plan) -> dict[str, Any]:
    result: dict[str, Any] = {"kind": cell.kind, "wall_seconds": 2.0, "cpu_seconds": 1.0, "versions": VERSIONS}
    if cell.kind == "pretrain":
        return result | {"arm": cell.arm, "losses": {"loss": 3.0}}
    if cell.kind == "tune":
        metrics = {plan.task(cell.task).metric: 0.5 + 0.1 * (cell.arm == "mim") + 0.01 * cell.seed}
        result |= {"task": cell.task, "fraction": cell.fraction, "arm": cell.arm, "seed": cell.seed}
        result |= {"metrics": metrics, "higher_is_better": cell.task != "alignment"}
    return result


def test_a_report_with_missing_cells_says_so(tiny: Plan, tmp_path: Path) -> None:
    cells = cells_of(tiny)
    lost = {"parsing-0.1-mim-seed1", "pretrain-contrast", *(c.key for c in cells if c.arm == "contrast")}
    results = {cell.key: _result(cell, tiny) for cell in cells if cell.key not in lost}
    page = write_report(Study(tiny, tmp_path, "x"), cells, results, {"pretrain-contrast": "no such file"})
    text = page.read_text()
    assert f"**Partial: {len(lost)} of {len(cells)} cells are missing.**" in text
    assert "- `pretrain-contrast` failed: no such file" in text
    assert "| parsing, mean F1 | 10 % | mim | 60.00 | +10.00 | - | 1 of 2 |" in text
    assert "| parsing, mean F1 | 10 % | contrast | - | - | - | 0 of 2 |" in text
    # Every seed has the same difference: the interval has no width.
    same = "| 100 % | mim | 60.50 [54.15, 66.85] |"
    assert f"| parsing, mean F1 {same} +10.00 [+10.00, +10.00] | **yes** | 2 of 2 |" in text
    assert f"| alignment, NME (diagonal) {same} -10.00 [-10.00, -10.00] | no | 2 of 2 |" in text
    content = json.loads((tmp_path / "study.json").read_text())
    assert set(content["missing"]) == lost
    assert len(content["cells"]) == len(cells) - len(lost)
    assert content["seconds"]["tune"]["cpu"] == len([c for c in cells if c.kind == "tune" and c.key not in lost])
    with Image.open(tmp_path / "study.png") as picture:
        assert picture.width > 600


def test_a_report_of_nothing_can_be_drawn(tiny: Plan, tmp_path: Path) -> None:
    text = write_report(Study(tiny, tmp_path, "x"), cells_of(tiny), {}, {}).read_text()
    assert "54 of 54 cells are missing" in text


def test_the_rest_is_estimated_from_cells_of_the_same_kind(tiny: Plan) -> None:
    cells = cells_of(tiny)
    results = {cell.key: {"wall_seconds": 1.0} for cell in cells if cell.kind != "tune"}
    first = next(cell for cell in cells if cell.kind == "tune")
    results |= {first.key: {"wall_seconds": 5.0}}
    progress = StudyProgress(cells, results, jobs=2)
    per_task = 2 * 4 * 2
    other = (3 * 1.0 + 3 * 1.0 + 5.0) / 7  # checks of three tasks, pre-trainings of three arms, parsing
    assert progress.seconds_left() == pytest.approx(((per_task - 1) * 5 + 2 * per_task * other) / 2)
