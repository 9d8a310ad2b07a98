"""How far a study is: a bar on a terminal, elsewhere a line a cell."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TextIO

from farl.progress import Progress
from farl.study.cells import Cell, Result


class StudyProgress:
    """Counts cells and estimates the rest from the seconds of finished cells of the same kind and task.

    Args:
        cells: all. results: of those that are done already. jobs: processes that share the rest.
    """

    def __init__(self, cells: Sequence[Cell], results: Mapping[str, Result], jobs: int) -> None:
        self._cells, self._jobs = cells, jobs
        self._seconds = {key: result["wall_seconds"] for key, result in results.items()}
        self._terminal = sys.stderr.isatty()
        # Without a terminal the lines of the cells say more than its own, which then never come.
        self._bar = Progress(len(cells), "study", unit="cells", interval=float("inf"))
        if results:
            self._bar.update(len(results))

    def done(self, cell: Cell, result: Result) -> None:
        """Count a finished cell."""
        self._seconds[cell.key] = result["wall_seconds"]
        self._bar.update()
        if self._terminal:
            return
        figure = ""
        if cell.kind == "tune":
            metric = result["metric"]
            value = result["metrics"][metric]
            figure = f"  {metric} {'-' if value is None else f'{100 * value:.2f} %'}"
        rest = timedelta(seconds=round(self.seconds_left()))
        print(
            f"{self._bar.count}/{len(self._cells)}  {cell.key}{figure}  {result['wall_seconds']:.0f} s  eta {rest}",
            flush=True,
        )

    def say(self, text: str, file: TextIO | None = None) -> None:
        """A line of its own."""
        print(f"\n{text}" if self._terminal else text, file=file, flush=True)

    def seconds_left(self) -> float:
        """Of all processes together, as if the rest were shared out evenly; kinds not seen yet count as the mean."""
        known: dict[tuple[str, str], list[float]] = {}
        for cell in self._cells:
            if cell.key in self._seconds:
                known.setdefault(_likeness(cell), []).append(self._seconds[cell.key])
        if not known:
            return 0.0
        means = {name: sum(values) / len(values) for name, values in known.items()}
        other = sum(means.values()) / len(means)
        left = [means.get(_likeness(cell), other) for cell in self._cells if cell.key not in self._seconds]
        return sum(left) / self._jobs

    def __enter__(self) -> StudyProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _likeness(cell: Cell) -> tuple[str, str]:
    return cell.kind, cell.task or cell.arm
