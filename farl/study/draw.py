"""One picture of a study: a column for each task, figures above and differences to scratch below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from farl.study.plans import SCRATCH, Plan

# Arms lie beside each other by this factor, so that their intervals can be told apart.
STEP = 1.09


def draw_study(plan: Plan, rows: Sequence[dict[str, Any]], path: Path, *, whole: bool) -> Path:
    """Draw the rows of `compare` as a PNG; `whole`: no cell is missing."""
    from matplotlib.figure import Figure

    from farl.report.style import BLUE, GREEN, MUTED, ORANGE, VIOLET, look, save

    arms = [arm.name for arm in plan.arms]
    trained = [arm for arm in arms if arm != SCRATCH]
    colors = {**dict(zip(trained, (BLUE, ORANGE, GREEN, VIOLET) * len(trained), strict=False)), SCRATCH: MUTED}
    with look():
        figure = Figure(figsize=(4.3 * len(plan.tasks) + 0.6, 6.6), layout="constrained")
        grid = figure.subplots(2, len(plan.tasks), squeeze=False, sharex=True, height_ratios=(1.35, 1))
        for column, task in enumerate(plan.tasks):
            top, bottom = grid[0][column], grid[1][column]
            own = [row for row in rows if row["task"] == task.name]
            for place, arm in enumerate(arms):
                shift = STEP ** (place - (len(arms) - 1) / 2)
                line = [row for row in own if row["arm"] == arm]
                style = {"color": colors[arm], "marker": "o", "markersize": 4.5, "capsize": 2.5, "elinewidth": 1.3}
                _points(top, line, "own", shift, {**style, "label": arm})
                if arm != SCRATCH:
                    _points(bottom, line, "difference", shift, {**style, "linestyle": "none"})
            better = "" if all(row["higher_is_better"] for row in own) else ", lower is better"
            top.set_title(f"{task.name}: {task.label}, %{better}")
            top.set_xscale("log")
            bottom.axhline(0, color=MUTED, linewidth=1.2, zorder=1)
            bottom.set_xticks(plan.fractions, [f"{100 * fraction:g} %" for fraction in plan.fractions])
            bottom.set_xticks([], minor=True)
            bottom.set_xlim(min(plan.fractions) / 1.6, max(plan.fractions) * 1.6)
            bottom.set_xlabel("labels used")
            if column == 0:
                top.set_ylabel(f"mean of {len(plan.seeds)} seeds, {plan.confidence:.0%} interval")
                bottom.set_ylabel(f"better than {SCRATCH} by, points")
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=len(arms))
        note = "" if whole else " (partial: cells are missing)"
        figure.suptitle(f"Fine-tuning after equal pre-training, by labels{note}", x=0.01, ha="left", fontsize=12)
        return save(figure, path)


def _points(axes: Any, rows: Sequence[dict[str, Any]], kind: str, shift: float, style: dict[str, Any]) -> None:
    """Means with their intervals, of those rows that have any."""
    known = [row for row in rows if row[kind]["mean"] is not None]
    x = [row["fraction"] * shift for row in known]
    means = [row[kind]["mean"] for row in known]
    ends = [(row[kind]["low"], row[kind]["high"]) for row in known]
    # An interval needs two seeds; one alone is a point.
    below = [0.0 if low is None else mean - low for mean, (low, _) in zip(means, ends, strict=True)]
    above = [0.0 if high is None else high - mean for mean, (_, high) in zip(means, ends, strict=True)]
    axes.errorbar(x, means, yerr=(below, above), **style)
