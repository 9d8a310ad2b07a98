"""What a fine-tuning run says at its end: one result as plain values, and one picture of its curves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farl.downstream.network import Network
from farl.downstream.task import Task
from farl.evaluation.provenance import describe_versions
from farl_engine.distributed import World
from farl_engine.metrics import memory_bytes

if TYPE_CHECKING:
    from farl.downstream.job import Job

Record = dict[str, Any]
# Columns of the line that a person reads.
SHOWN = 4


def plain_figures(figures: dict[str, float]) -> dict[str, float | None]:
    """Figures for JSON: None where there was nothing to count."""
    return {name: None if math.isnan(value) else float(value) for name, value in figures.items()}


def best_of(history: list[Record], task: Task) -> Record:
    """The evaluation with the best `main_metric`, the first of equals; the last one where none has a figure."""
    judged = [record for record in history if record["metrics"][task.main_metric] is not None]
    if not judged:
        return history[-1]
    choose = max if task.higher_is_better else min
    return choose(judged, key=lambda record: record["metrics"][task.main_metric])


def one_line(record: Record, history: list[Record], task: Task) -> str:
    """An evaluation for a person."""
    names = [task.main_metric, *(name for name in record["metrics"] if name != task.main_metric)]
    shown = "  ".join(f"{name} {_number(record['metrics'][name])}" for name in names[:SHOWN])
    best = best_of(history, task)
    mark = "" if best is record else f"  (best {_number(best['metrics'][task.main_metric])} at step {best['step']})"
    return f"epoch {record['epoch']:g}, step {record['step']}: {shown}{mark}"


def make_result(
    job: Job,
    identity: dict[str, Any],
    network: Network,
    history: list[Record],
    pictures: dict[str, Any] | None,
    world: World,
    seconds: float,
) -> dict[str, Any]:
    """The whole result, for JSON; draws the curves into the run folder on the way."""
    from farl.report.curves import read_metrics

    task = job.task
    result = {
        "task": task.name,
        "main_metric": task.main_metric,
        "higher_is_better": task.higher_is_better,
        "last": history[-1],
        "best": best_of(history, task),
        "best_is_chosen_on": "the test set itself: only `last` is a fair figure",
        "history": history,
        "settings": identity["settings"] | {"steps_per_epoch": job.steps_per_epoch},
        "data": {"train": identity["train"], "test": identity["test"]},
        "task_about": identity["task"],
        "backbone": network.backbone.about(),
        "parameters": {
            "backbone": sum(parameter.numel() for parameter in network.backbone.parameters()),
            "head": sum(parameter.numel() for parameter in network.head.parameters()),
            "trained": sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad),
        },
        "pictures": pictures,
        "run_dir": str(job.run_dir),
        "processes": world.size,
        "seconds": round(seconds, 2),
        "memory_bytes": memory_bytes(world.device),
        "versions": describe_versions(world.device),
    }
    training, _ = read_metrics(job.run_dir / "metrics.jsonl")
    draw_tuning(result, training, job.run_dir / "curves.png")
    return result


def draw_tuning(result: dict[str, Any], training: list[Record], path: Path) -> Path:
    """One PNG: the main metric over epochs with last and best marked, and the loss beside it.

    Args:
        result: as `make_result` gives it.
        training: lines of metrics.jsonl with "step" and "loss".
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from farl.report.style import BLUE, GREEN, MUTED, ORANGE, look, save

    metric, per_epoch = result["main_metric"], result["settings"]["steps_per_epoch"]
    points = [(record["epoch"], record["metrics"][metric]) for record in result["history"]]
    points = [(epoch, value) for epoch, value in points if value is not None]
    with look():
        figure = Figure(figsize=(9.5, 3.6), layout="constrained")
        axes = figure.add_subplot(1, 2, 1)
        axes.set_title(f"{metric.replace('_', ' ')} on the test set")
        if points:
            axes.plot(*zip(*points, strict=True), color=BLUE, marker="o" if len(points) <= 40 else None, markersize=3.5)
        for name, color, marker in (("last", ORANGE, "s"), ("best", GREEN, "*")):
            record = result[name]
            value = record["metrics"][metric]
            if value is not None:
                label = f"{name}: {_number(value)}, epoch {record['epoch']:g}"
                size = 11 if name == "best" else 7
                axes.plot(
                    record["epoch"], value, marker, color=color, markersize=size, label=label, zorder=3, clip_on=False
                )
        if points:
            axes.legend(title="best is chosen on the test set", title_fontsize=8)
        losses = figure.add_subplot(1, 2, 2)
        losses.set_title("training loss")
        steps = [record["step"] / per_epoch for record in training]
        losses.plot(steps, [record["loss"] for record in training], color=MUTED)
        for each in (axes, losses):
            each.set_xlabel("epoch")
            each.set_xlim(0, result["last"]["step"] / per_epoch)
            each.xaxis.set_major_locator(MaxNLocator(6))
        return save(figure, path)


def result_table(result: dict[str, Any]) -> str:
    """Last and best evaluation side by side, as plain text: the figures of the whole set, then those by name.

    Figures called "KIND/NAME" (of a class, an attribute or a subset) have a row a name and a column a kind.
    """
    last, best = result["last"], result["best"]
    names = [result["main_metric"], *(name for name in last["metrics"] if name != result["main_metric"])]
    whole = [name for name in names if "/" not in name]
    width = max(map(len, whole))
    rows = [
        f"{'':<{width}}  {'last':>9}  {'best':>9}",
        f"{'epoch':<{width}}  {last['epoch']:>9g}  {best['epoch']:>9g}",
        *(
            f"{name:<{width}}  {_number(last['metrics'][name]):>9}  {_number(best['metrics'].get(name)):>9}"
            for name in whole
        ),
    ]
    if by_name := [name for name in names if "/" in name]:
        rows += ["", *_by_name(by_name, last["metrics"], best["metrics"])]
    rows.append("best is chosen on the test set; last is the fair one")
    if result.get("test_samples_in_train"):
        count, total = result["test_samples_in_train"], result["data"]["test"]["samples"]
        rows.append(f"{count:,} of {total:,} test samples are in --train too: neither is fair")
    return "\n".join(rows)


def _by_name(figures: list[str], last: dict[str, float | None], best: dict[str, float | None]) -> list[str]:
    """Lines of a table; a kind whose last and best figures are all the same (shares of labels are) has one column."""
    kinds = list(dict.fromkeys(figure.partition("/")[0] for figure in figures))
    names = list(dict.fromkeys(figure.partition("/")[2] for figure in figures))
    width = max(map(len, names))
    lines = [" " * width] * 2 + [f"{name:<{width}}" for name in names]
    for kind in kinds:
        own = [f"{kind}/{name}" for name in names]
        columns = {"last": [last.get(figure) for figure in own], "best": [best.get(figure) for figure in own]}
        if columns["last"] == columns["best"]:
            columns = {"both": columns["last"]}
        cells = [
            "  ".join(f"{cell:>6}" for cell in row)
            for row in [tuple(columns), *zip(*(map(_number, column) for column in columns.values()), strict=True)]
        ]
        lines = [
            f"{line}  {cell:>{len(kind)}}"
            for line, cell in zip(lines, [kind.rjust(len(cells[0])), *cells], strict=True)
        ]
    return [line.rstrip() for line in lines]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
