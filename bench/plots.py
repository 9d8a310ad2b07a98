"""Results as pictures: bars for each shape of an op, and lines over N for the contrastive loss."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from bench.results import Results, is_ours
from bench.tables import MODE_HEADS, duration, main_mode
from farl.report.style import BLUE, FAINT, GREEN, INK, MUTED, ORANGE, RED, VIOLET, look, save

PEER = "#b9bfcc"
# Of a bar that would make the others unreadable only this many times the fastest is drawn.
LONGEST = 8.0
LINE_COLORS = (BLUE, ORANGE, GREEN, RED, VIOLET, MUTED, INK)
CONTRASTIVE = "contrastive loss, softmax"


def draw(results: Results, folder: Path, device: str) -> dict[str, Path]:
    """Draw every op into `folder`; returns op -> picture. Ops with no time have none."""
    pictures = {}
    with look():
        for op in results.ops:
            shapes = [shape for shape in results.shapes(op) if main_mode(results, op, shape)]
            if not shapes:
                continue
            figure = lines(results, op, shapes) if op == CONTRASTIVE and len(shapes) > 1 else bars(results, op, shapes)
            pictures[op] = save(figure, folder / f"bench-{slug(device)}-{slug(op)}.png")
    return pictures


def slug(text: str) -> str:
    """Lower-case letters and digits, joined by hyphens."""
    return "-".join(re.findall(r"[a-z0-9]+", text.lower()))


def bars(results: Results, op: str, shapes: list[str]) -> Figure:
    """One panel a shape, one bar a contender, shortest time on top."""
    counts = [len(bar_list(results, op, shape)) for shape in shapes]
    heights = [0.26 * count + 0.55 for count in counts]
    figure = Figure(figsize=(8.4, sum(heights) + 0.55), layout="constrained")
    axes = figure.subplots(len(shapes), 1, height_ratios=heights, squeeze=False)[:, 0]
    for panel, shape in zip(axes, shapes, strict=True):
        bar_panel(panel, results, op, shape)
    figure.suptitle(capital(op), x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    floors = [line for panel in axes for line in panel.get_lines()]
    if floors:
        label = ["least time by the machine's ceilings"]
        figure.legend(floors[:1], label, loc="upper right", fontsize=8, frameon=False)
    return figure


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def bar_list(results: Results, op: str, shape: str) -> list[tuple[str, float]]:
    """(contender, seconds) in the main mode, the fastest first."""
    mode = main_mode(results, op, shape)
    assert mode is not None
    times = ((name, results.time(op, shape, mode, name)) for name in results.contenders(op, shape))
    return sorted(((name, time.seconds) for name, time in times if time), key=lambda item: item[1])


def bar_panel(panel: Axes, results: Results, op: str, shape: str) -> None:
    mode = main_mode(results, op, shape)
    assert mode is not None
    found = bar_list(results, op, shape)
    limit = found[0][1] * LONGEST
    for row, (name, seconds) in enumerate(found):
        drawn = min(seconds, limit)
        panel.barh(row, drawn, color=BLUE if is_ours(name) else PEER, height=0.68)
        text = duration(seconds) + (" (cut)" if drawn < seconds else "")
        panel.annotate(text, (drawn, row), (4, 0), textcoords="offset points", va="center", fontsize=8, color=INK)
    floors = [results.times[op, shape, mode, name].info.get("floor_seconds", 0.0) for name, _ in found]
    if max(floors) > 0.02 * found[0][1]:
        panel.axvline(max(floors), color=RED, linewidth=1.2, linestyle=(0, (4, 2)))
    panel.set_yticks(range(len(found)), [name for name, _ in found], fontsize=8)
    panel.tick_params(axis="y", length=0)
    panel.set_xticks([])
    panel.set_xlim(0, 1.17 * min(found[-1][1], limit))
    panel.invert_yaxis()
    panel.grid(False)
    panel.spines[["bottom", "left"]].set_visible(False)
    passes = not op.startswith(("whole step", "loader", "decoding"))
    head = f", {MODE_HEADS[mode]}" if passes else ""
    panel.set_title(shape + head, fontsize=9, fontweight="normal", color=MUTED)


def lines(results: Results, op: str, shapes: list[str]) -> Figure:
    """Time, and peak memory where it was measured, over N."""
    series: dict[str, list[tuple[int, float, float]]] = {}
    for shape in shapes:
        count = int(shape.split("=")[1].split(", D")[0].replace(",", ""))
        for name in results.contenders(op, shape):
            time = results.time(op, shape, "both", name)
            if time is not None:
                peak = float(time.info.get("peak_bytes", 0.0))
                series.setdefault(name, []).append((count, time.seconds, peak))
    memory = any(peak for points in series.values() for *_, peak in points)
    figure = Figure(figsize=(9.6 if memory else 6.4, 4.8), layout="constrained")
    panels = figure.subplots(1, 2 if memory else 1, squeeze=False)[0]
    ends: list[set[int]] = [{count for points in series.values() for count, *_ in points}] * len(panels)
    for color, (name, points) in zip(itertools.cycle(LINE_COLORS), series.items(), strict=False):
        points.sort()
        style = {"marker": "o", "markersize": 4, "color": color, "linestyle": "-" if is_ours(name) else "--"}
        x = [count for count, *_ in points]
        panels[0].plot(x, [seconds * 1e3 for _, seconds, _ in points], label=name, **style)
        if memory:
            panels[1].plot(x, [peak / 2**20 for *_, peak in points], label=name, **style)
    titles = ("forward + backward, ms", "peak memory, MiB")
    for panel, title, counts in zip(panels, titles, ends, strict=False):
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        panel.set_xticks(sorted(counts), [f"{count:,}" for count in sorted(counts)], rotation=30, fontsize=8)
        panel.set_xlabel("pairs N")
        panel.set_title(title, fontsize=10)
        panel.grid(color=FAINT)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(capital(op), x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    return figure
