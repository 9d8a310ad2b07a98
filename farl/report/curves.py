"""The curves of a run, from its `metrics.jsonl` alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from farl.report.style import BLUE, GREEN, INK, MUTED, ORANGE, VIOLET, look, save
from farl_engine.data.stages import STAGES

Record = dict[str, Any]
COLUMNS = 4
# Longer curves are drawn faint, with their running mean over them.
SMOOTH_FROM = 80


def read_metrics(path: str | Path) -> tuple[list[Record], list[Record]]:
    """Read `metrics.jsonl`: (training lines, evaluation lines), each ascending by step.

    An evaluation line has an "eval" object. Of two lines of one step the later counts (a run may write a step again
    after a crash), a line cut short is left out. A missing file gives two empty lists.
    """
    path = Path(path)
    training: dict[int, Record] = {}
    evaluation: dict[int, Record] = {}
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (json.JSONDecodeError, KeyError, TypeError, ValueError):
            continue
        if isinstance(record.get("eval"), dict):
            evaluation[step] = {"step": step, **record["eval"]}
        if "loss" in record:
            training[step] = record
    return [training[s] for s in sorted(training)], [evaluation[s] for s in sorted(evaluation)]


@dataclass(frozen=True)
class Curve:
    """One line of a panel: the value of a record (None: nothing to draw there), its legend and its look."""

    value: Callable[[Record], float | None]
    label: str = ""
    color: str = BLUE
    width: float = 1.8
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """Curves that belong together; `areas` are stacked under them."""

    title: str
    curves: Sequence[Curve]
    areas: Sequence[Curve] = ()
    held_out: bool = False
    scale: str = "linear"
    unit: str = ""  # "percent", "thousands", "power" or nothing
    smooth: bool = True


def _key(name: str, factor: float = 1.0) -> Callable[[Record], float | None]:
    def value(record: Record) -> float | None:
        number = record.get(name)
        if not isinstance(number, (int, float)) or not math.isfinite(number):
            return None
        return factor * number

    return value


def _waited_for(stage: str) -> Callable[[Record], float | None]:
    """The part of the time waited that falls to a stage: as large as its part of what the loader did meanwhile."""

    def value(record: Record) -> float | None:
        loader, waited = record.get("loader"), _key("data_wait_fraction")(record)
        if waited is None or not isinstance(loader, dict):
            return None
        busy = sum(_key(name)(loader) or 0.0 for name in STAGES)
        return waited * (_key(stage)(loader) or 0.0) / busy if busy else 0.0

    return value


def _panels(global_batch: int | None) -> list[Panel]:
    guess = [Curve(lambda _: 1 / global_batch, "chance", MUTED, 1.2, True)] if global_batch else []
    guess_loss = [Curve(lambda _: math.log(global_batch), "chance", MUTED, 1.2, True)] if global_batch else []
    both = "image to text", "text to image"
    return [
        Panel("Loss", [Curve(_key("loss"))]),
        Panel("Contrastive loss", [Curve(_key("loss_contrastive")), *guess_loss]),
        Panel("Masked-token loss", [Curve(_key("loss_mim"), color=VIOLET)]),
        Panel(
            "Retrieval in the batch",
            [
                Curve(_key("accuracy_image_to_text"), both[0], BLUE),
                Curve(_key("accuracy_text_to_image"), both[1], ORANGE),
                *guess,
            ],
            unit="percent",
        ),
        Panel(
            "Held-out recall at 1",
            [
                Curve(_key("image_to_text_r1"), both[0], BLUE),
                Curve(_key("text_to_image_r1"), both[1], ORANGE),
                Curve(_key("chance_r1"), "chance", MUTED, 1.2, True),
            ],
            held_out=True,
            unit="percent",
        ),
        Panel(
            "Held-out recall at 5",
            [
                Curve(_key("image_to_text_r5"), both[0], BLUE),
                Curve(_key("text_to_image_r5"), both[1], ORANGE),
                Curve(_key("chance_r5"), "chance", MUTED, 1.2, True),
            ],
            held_out=True,
            unit="percent",
        ),
        Panel("Masked tokens guessed right", [Curve(_key("accuracy_mim"), color=VIOLET)], unit="percent"),
        Panel("Logit scale", [Curve(_key("logit_scale"), color=GREEN)], smooth=False),
        Panel("Gradient norm", [Curve(_key("grad_norm"), color=GREEN)], scale="log"),
        Panel("Learning rate", [Curve(_key("lr"), color=GREEN)], unit="power", smooth=False),
        Panel("Pairs a second", [Curve(_key("pairs_per_second"), color=ORANGE)], unit="thousands"),
        Panel(
            "Time waiting for data, by stage",
            [Curve(_key("data_wait_fraction"), color=INK, width=1.2)],
            areas=[
                Curve(_waited_for("read"), "reading", GREEN),
                Curve(_waited_for("decode"), "decoding", ORANGE),
                Curve(_waited_for("text"), "text", VIOLET),
                Curve(_waited_for("device_decode"), "decoding on the GPU", BLUE),
            ],
            unit="percent",
        ),
    ]


def draw_curves(
    training: Sequence[Record],
    evaluation: Sequence[Record],
    path: str | Path,
    *,
    title: str = "",
    global_batch: int | None = None,
) -> Path | None:
    """Draw every curve that has at least one point as a PNG.

    Args:
        training, evaluation: as `read_metrics` returns them.
        global_batch: pairs a step, for the lines of chance (loss ln B, accuracy 1/B).

    Returns:
        The path, or None where there is nothing to draw.
    """
    filled = []
    for panel in _panels(global_batch):
        records = evaluation if panel.held_out else training
        if any(not curve.dashed and _points(curve, records)[0].size for curve in panel.curves):
            filled.append((panel, records))
    if not filled:
        return None
    columns = min(COLUMNS, len(filled))
    rows = -(-len(filled) // columns)
    with look():
        figure = Figure(figsize=(4.0 * columns, 2.75 * rows + (0.5 if title else 0.1)), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.14, h_pad=0.12)  # type: ignore[union-attr]
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold")
        last = max(record["step"] for record in [*training, *evaluation])
        for number, (panel, records) in enumerate(filled):
            axes = figure.add_subplot(rows, columns, number + 1)
            _draw(axes, panel, records)
            axes.set_xlim(0, max(1, last))
            if number >= len(filled) - columns:
                axes.set_xlabel("step")
        return save(figure, path)


def _points(curve: Curve, records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(record["step"], value) for record in records if (value := curve.value(record)) is not None]
    table = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _draw(axes: Axes, panel: Panel, records: Sequence[Record]) -> None:
    axes.set_title(panel.title)
    areas = [(curve, *_points(curve, records)) for curve in panel.areas]
    # A stage that hardly ever takes a part would only lengthen the legend.
    areas = [(curve, steps, part) for curve, steps, part in areas if part.size and part.max() > 0.005]
    if areas:
        smooth = running_mean if areas[0][1].size >= SMOOTH_FROM else np.asarray
        parts, colors = [smooth(part) for *_, part in areas], [curve.color for curve, *_ in areas]
        axes.stackplot(areas[0][1], parts, labels=[curve.label for curve, *_ in areas], colors=colors, alpha=0.55)
    values = []
    for curve in panel.curves:
        steps, numbers = _points(curve, records)
        if not numbers.size:
            continue
        style = {"color": curve.color, "label": curve.label or None}
        if curve.dashed:
            axes.axhline(numbers[-1], linestyle=(0, (4, 3)), linewidth=curve.width, **style)
            values.append(numbers)
            continue
        values.append(numbers)
        marker = "o" if numbers.size <= (40 if panel.held_out else 1) else None
        if numbers.size >= SMOOTH_FROM and panel.smooth:
            axes.plot(steps, numbers, color=curve.color, linewidth=0.8, alpha=0.3)
            numbers = running_mean(numbers)
        axes.plot(steps, numbers, linewidth=curve.width, marker=marker, markersize=3.5, **style)
    low, high = min(v.min() for v in values), max(v.max() for v in values)
    if panel.scale == "log" and low > 0 and high / low > 20:
        axes.set_yscale("log")
    elif panel.unit:
        axes.set_ylim(0, high * 1.12 if high > 0 else 1)
    if panel.unit == "percent":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if high > 0.05 else 1))
    elif panel.unit == "thousands":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y / 1000:g}k" if y >= 1000 else f"{y:g}"))
    elif panel.unit == "power":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0e}".replace("e-0", "e-") if y else "0"))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if areas or any(curve.label for curve in panel.curves):
        axes.legend(loc="best", handlelength=1.4, borderaxespad=0.2)


def running_mean(values: np.ndarray, share: float = 0.02) -> np.ndarray:
    """Mean over a window (Hann, about `share` of the curve to either side) centred on each point: it does not lag."""
    reach = max(1, round(share * len(values)))
    window = np.hanning(2 * reach + 3)[1:-1]
    weight = np.convolve(np.ones_like(values), window, mode="same")
    return np.convolve(values, window, mode="same") / weight
