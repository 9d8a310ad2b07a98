"""Cells of a study: the pieces of work, what each waits for, and the files that hold their results."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from farl.study.plans import Plan

Result = dict[str, Any]
INDEX_SUFFIX = ".farl-index"


@dataclass(frozen=True)
class Cell:
    """One piece of work.

    Attributes:
        kind: "check" (every image and label of a task is decoded once), "pretrain" (an arm), or "tune".
        needs: keys of the cells that must be done before.
    """

    kind: Literal["check", "pretrain", "tune"]
    key: str
    task: str = ""
    arm: str = ""
    fraction: float = 0.0
    seed: int = 0
    needs: tuple[str, ...] = ()


def cells_of(plan: Plan) -> list[Cell]:
    """All cells in the order in which they are wanted: seed by seed, so that an unfinished study has whole pairs."""
    checks = [Cell("check", f"check-{task.name}", task=task.name) for task in plan.tasks]
    trained = [arm for arm in plan.arms if arm.pretrain is not None]
    pretrained = [Cell("pretrain", f"pretrain-{arm.name}", arm=arm.name) for arm in trained]
    tuned = []
    for seed in plan.seeds:
        for task in plan.tasks:
            for fraction in plan.fractions:
                for arm in plan.arms:
                    needs = [f"check-{task.name}", *([f"pretrain-{arm.name}"] if arm in trained else [])]
                    key = f"{task.name}-{fraction:g}-{arm.name}-seed{seed}"
                    tuned.append(Cell("tune", key, task.name, arm.name, fraction, seed, tuple(needs)))
    return [*checks, *pretrained, *tuned]


class Queue:
    """Which cell is next. Cells come in their own order, those whose needs are not met yet are passed over."""

    def __init__(self, cells: Sequence[Cell], done: set[str]) -> None:
        self.waiting = [cell for cell in cells if cell.key not in done]
        self.done, self.failed = set(done), set[str]()

    def take(self) -> Cell | None:
        """The next cell that can begin; None where there is none at the moment."""
        for cell in self.waiting:
            if self.done.issuperset(cell.needs):
                self.waiting.remove(cell)
                return cell
        return None

    def finish(self, cell: Cell, *, failed: bool = False) -> None:
        """Note that a cell ended. Cells that need a failed one will never begin, and are failed with it."""
        (self.failed if failed else self.done).add(cell.key)
        if failed:
            lost = [other for other in self.waiting if self.failed.intersection(other.needs)]
            self.failed.update(other.key for other in lost)
            self.waiting = [other for other in self.waiting if other.key not in self.failed]


def identity_of(plan: Plan, data: Path) -> str:
    """What tells this study from one of another plan or other data: names and sizes of all files count."""
    digest = hashlib.sha256(plan.fingerprint().encode())
    for path in sorted(data.rglob("*")):
        # An index lies beside shards once they have been opened.
        if not path.is_file() or path.name.startswith(".") or path.suffix == INDEX_SUFFIX:
            continue
        digest.update(f"\n{path.relative_to(data).as_posix()}\0{path.stat().st_size}".encode())
    return digest.hexdigest()[:16]


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    temporary.replace(path)


def read_cells(folder: Path, cells: Sequence[Cell], identity: str) -> dict[str, Result]:
    """The results that exist, by key.

    Raises:
        ValueError: one of another plan or other data, or not a result at all; one line with the fix.
    """
    results = {}
    for cell in cells:
        path = folder / f"{cell.key}.json"
        if not path.is_file():
            continue
        try:
            result = json.loads(path.read_text())
            foreign = result["identity"] != identity
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is not the result of a cell: remove it and run the same command again") from None
        if foreign:
            raise ValueError(
                f"{path} belongs to another plan or other data: use another --run-dir, or remove {folder.parent}"
            )
        results[cell.key] = result
    return results
