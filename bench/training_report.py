"""What `bench.training` found, for people: a picture, a table in words, and a part of `docs/benchmarks.md`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from bench.tables import NOT_MEASURED
from bench.training_curves import EXACT_BOUND, relative, windows
from farl.report.style import BLUE, GREEN, INK, MUTED, ORANGE, RED, VIOLET, look, save

FILE = "training.json"
WAIT_TARGET = 0.01
START_TARGET = 60.0
# Pairs a second of a whole step of farl-b16 with cached tokens on one GPU whose name has this in it.
RATE_TARGET = ("H200", 2_770.0)
COLORS = (BLUE, ORANGE, GREEN, VIOLET, MUTED)
Found = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A line of the table; `met` is None where there is no target."""

    what: str
    measured: str
    target: str = ""
    met: bool | None = None

    @property
    def verdict(self) -> str:
        return "" if self.met is None else "pass" if self.met else "MISS"


def rows(content: Found) -> list[Row]:
    """All figures of a result file, beside their targets."""
    found, device = content["training"], content["machine_info"]["farl"].get("device", "")
    run, starts = found.get("run"), found["starts"]
    table = [
        _start("start to first update, empty caches of compilers", starts.get("cold"), None),
        _start("start to first update, warm", starts.get("warm"), START_TARGET),
    ]
    if run is None:
        return [*table, Row("run", NOT_MEASURED)]
    steady, plan = run["steady"], found["plan"]
    cut = f", of {run['updates_planned']} planned: time was up" if run["stopped"] else ""
    table.append(Row("updates", f"{run['updates']}{cut}"))
    if run["training"]:
        first, last = run["training"][0], run["training"][-1]
        table.append(Row("loss, first and last update", f"{first['loss']:.3f}, {last['loss']:.3f}"))
    if run["evaluation"]:
        table += _retrieval(run["evaluation"][-1])
    if steady:
        name, target = RATE_TARGET
        aimed = name in device and plan["model"] == "farl-b16" and plan["processes"] == 1
        rate = steady["pairs_per_second"]
        limit = f">= {target:,.0f}" if aimed else ""
        table.append(Row("pairs a second", f"{rate:,.0f}", limit, rate >= target if aimed else None))
        wait = steady["data_wait_fraction"]
        table.append(Row("waiting for data", f"{wait:.2%}", f"<= {WAIT_TARGET:.0%}", wait <= WAIT_TARGET))
    if run["memory_bytes"]:
        table.append(Row("peak memory of a process", f"{run['memory_bytes'] / 2**30:.2f} GiB"))
    return table + [_compared(each) for each in found.get("comparisons", [])]


def _start(what: str, start: Found | None, target: float | None) -> Row:
    limit = "" if target is None else f"<= {target:.0f} s"
    if start is None or start["seconds"] is None:
        return Row(what, NOT_MEASURED, limit)
    return Row(what, f"{start['seconds']:.1f} s", limit, None if target is None else start["seconds"] <= target)


def _retrieval(line: Found) -> list[Row]:
    chance = f"guessing: {line['chance_r1']:.1%}, {line['chance_r5']:.1%}"
    return [
        Row(
            f"{way.replace('_', ' ')}, recall at 1 and 5 of {line['pairs']:,} held-out pairs",
            f"{line[f'{way}_r1']:.1%}, {line[f'{way}_r5']:.1%} ({chance})",
        )
        for way in ("image_to_text", "text_to_image")
    ]


def _compared(each: Found) -> Row:
    cut = f" of {each['asked']}" if each["updates"] < each["asked"] else ""
    largest = f"largest difference of the loss {each['largest']:.1e}"
    if each["ratio"] is None:
        what = f"engine {each['engine']} and {each['against']}, {each['updates']}{cut} updates"
        return Row(what, largest, f"<= {each['bound']:.0e}", each["passed"])
    what = f"engine {each['engine']}, {each['updates']}{cut} updates: distance from {each['against']} over eager's"
    return Row(what, f"{each['ratio']:.2f} ({largest})", f"<= {each['bound']:g}", each["passed"])


def heading(content: Found) -> list[str]:
    """What was run, in sentences."""
    found = content["training"]
    plan, data = found["plan"], found.get("data")
    precision = {"bf16": "bfloat16", "fp32": "fp32"}[plan["precision"]]
    where = f", {plan['processes']} processes" if plan["processes"] > 1 else ""
    lines = [
        f"{plan['model']}, {plan['batch']} pairs an update, {precision}, engine {plan['engine']}{where}, "
        f"{_data(data) if data else 'no data'}, visual tokens from a cache."
    ]
    if data and data["by_person"]:
        lines.append("Held-out photographs are of other people than those trained on.")
    if plan["engines"]:
        lines.append(
            f"Engines are compared with {plan['engine_model']}, {plan['engine_batch']} pairs an update, same seed."
        )
    return lines


def _data(data: Found) -> str:
    counted = "train" in data
    return f"{data['train']:,} {data['what']} and {data['held_out']:,} held out" if counted else data["what"]


def failures(content: Found) -> list[str]:
    return [f"{each['what']}: {each['status']}" for each in content["training"]["failed"]]


def words(content: Found) -> list[str]:
    """The result in words, for a terminal."""
    table = rows(content)
    wide = max(len(row.what) for row in table)
    lines = [*heading(content), ""]
    for row in table:
        aim = f"   target {row.target}: {row.verdict or NOT_MEASURED}" if row.target else ""
        lines.append(f"  {row.what:<{wide}}  {row.measured}{aim}")
    for failure in content["training"]["failed"]:
        lines.append(f"  {failure['what']}: {failure['status']}")
        lines += [f"    | {line}" for line in failure.get("tail", ())]
    return lines


def section(folder: Path, images: Path, beside: Path) -> list[str]:
    """The part of `docs/benchmarks.md` about training on one machine; nothing where `folder` has no such result.

    Args:
        folder: of the results. images: for the picture. beside: of the page, from which the picture is linked.
    """
    path = folder / FILE
    if not path.is_file():
        return []
    content = json.loads(path.read_text())
    lines = ["### Real training runs", "", " ".join(heading(content)), ""]
    picture = draw(content, images / f"bench-{folder.name}-training.png")
    if picture is not None:
        lines += [f"![Training runs]({picture.relative_to(beside).as_posix()})", ""]
    lines += ["| | measured | target | |", "|---|---|---|---|"]
    lines += [f"| {row.what} | {row.measured} | {row.target} | {row.verdict.lower()} |" for row in rows(content)]
    lines += ["", *(f"- {failure}" for failure in failures(content))]
    run = content["training"].get("run")
    lines += ["", "The run:", "", "```", run["command"], "```"] if run else []
    return [*lines, ""]


def draw(content: Found, path: Path) -> Path | None:
    """Curves of the run and differences between engines, as a PNG; None where there is neither."""
    found = content["training"]
    run = found.get("run") or {}
    training, evaluation = run.get("training") or [], run.get("evaluation") or []
    panels: list[Callable[[Axes], None]] = []
    if training:
        panels += [lambda axes: _loss(axes, training), lambda axes: _guessed(axes, training)]
    if evaluation:
        panels.append(lambda axes: _recall(axes, evaluation))
    if len(training) > 1:
        panels += [lambda axes: _rate(axes, training[1:]), lambda axes: _wait(axes, training[1:])]
    if found.get("comparisons"):
        panels.append(lambda axes: _engines(axes, found))
    if not panels:
        return None
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    with look():
        figure = Figure(figsize=(4.4 * columns, 2.9 * lines + 0.5), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.14, h_pad=0.12)  # type: ignore[union-attr]
        machine = content["machine_info"]["farl"].get("device", "unknown device")
        title = f"{found['plan']['model']} in training on {machine}"
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
        for number, panel in enumerate(panels, 1):
            panel(figure.add_subplot(lines, columns, number))
        return save(figure, path)


def _plot(axes: Axes, records: list[Found], keys: dict[str, tuple[str, str]], title: str) -> None:
    """`keys`: name in the record -> label, colour."""
    for key, (label, color) in keys.items():
        points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=color, label=label, marker="o" if len(points) < 12 else None)
    axes.set_title(title)
    axes.set_xlabel("update")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _from_zero(axes: Axes, *, legend: bool = True) -> None:
    """The axis of values from zero on, with room for a legend above the curves."""
    top = max((float(np.nanmax(line.get_ydata())) for line in axes.get_lines()), default=1.0)
    axes.set_ylim(0, max(top, 1e-6) * (1.3 if legend else 1.1))
    if legend:
        axes.legend(loc="upper center", ncols=3, handlelength=1.2, columnspacing=1.0)


def _loss(axes: Axes, training: list[Found]) -> None:
    keys = {
        "loss": ("both", INK),
        "loss_contrastive": ("contrastive", BLUE),
        "loss_mim": ("masked tokens", VIOLET),
    }
    _plot(axes, training, keys, "Loss")
    _from_zero(axes)


def _guessed(axes: Axes, training: list[Found]) -> None:
    _plot(axes, training, {"accuracy_mim": ("", VIOLET)}, "Masked tokens guessed right")
    _from_zero(axes, legend=False)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))


def _recall(axes: Axes, evaluation: list[Found]) -> None:
    chance = evaluation[-1]["chance_r5"]
    axes.axhline(chance, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.2, label="guessing")
    keys = {"image_to_text_r5": ("image to text", BLUE), "text_to_image_r5": ("text to image", ORANGE)}
    _plot(axes, evaluation, keys, "Held-out recall at 5")
    _from_zero(axes)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if axes.get_ylim()[1] > 0.1 else 1))


def _rate(axes: Axes, training: list[Found]) -> None:
    _plot(axes, training, {"pairs_per_second": ("", ORANGE)}, "Pairs a second")
    _from_zero(axes, legend=False)


def _wait(axes: Axes, training: list[Found]) -> None:
    axes.axhline(WAIT_TARGET, color=RED, linestyle=(0, (4, 3)), linewidth=1.2, label="target")
    _plot(axes, training, {"data_wait_fraction": ("measured", INK)}, "Time waiting for data")
    _from_zero(axes)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))


def _engines(axes: Axes, found: Found) -> None:
    """How far the curves of the engines are from the one that all are measured by."""
    plain = found["plan"]["engines"][0]
    rounded = found["comparisons"][0]["ratio"] is not None
    name = f"{plain} fp32" if rounded else plain
    reference = found["engines"][name]["loss"]
    for color, (engine, each) in zip(
        COLORS, ((key, value) for key, value in found["engines"].items() if key != name), strict=False
    ):
        steps = list(range(1, min(len(reference), len(each["loss"])) + 1))
        if not steps:
            continue
        right, mine = (dict(enumerate(losses, 1)) for losses in (reference, each["loss"]))
        apart = np.abs(relative(mine, right, steps))
        if rounded:
            # As it is judged: by the root mean square of windows.
            parts = windows(len(steps))
            steps = [steps[part.stop - 1] for part in parts]
            apart = np.array([np.sqrt(np.mean(np.square(apart[part]))) for part in parts])
        # A logarithmic axis has no zero.
        drawn = apart > 0
        label = engine if drawn.any() else f"{engine}: none"
        axes.plot(np.array(steps)[drawn], apart[drawn], color=color, label=label, marker=".")
    if not rounded:
        axes.axhline(EXACT_BOUND, color=RED, linestyle=(0, (4, 3)), linewidth=1.2, label="bound")
    values = np.concatenate([line.get_ydata() for line in axes.get_lines()])
    if values.size:
        axes.set_ylim(np.nanmin(values) / 3, np.nanmax(values) * 12)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-")))
    axes.set_title(f"Loss of engines, relative to {name}")
    axes.set_xlabel("update")
    axes.legend(loc="upper center", ncols=3, handlelength=1.2, columnspacing=1.0)
