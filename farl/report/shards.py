"""The picture of a set of shards: samples with their captions, bad ones by cause, and histograms."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from farl.report.style import BLUE, FAINT, GREEN, INK, MUTED, ORANGE, RED, VIOLET, frame, look, save
from farl.report.text import fitted
from farl.tokenizer import CONTEXT_LENGTH

COLUMNS, GOOD_CELLS, BAD_CELLS = 8, 16, 8
# Inches.
_WIDTH, _MARGIN, _CELL = 16.0, 0.3, 1.75
_GAP = (_WIDTH - 2 * _MARGIN - COLUMNS * _CELL) / (COLUMNS - 1)
_CAPTION_LINES, _LINE = 3, 0.155
_ROW = _CELL + 0.32 + _CAPTION_LINES * _LINE
_CHART = 2.15


@dataclass(frozen=True)
class Cell:
    """One sample of the sheet.

    Attributes:
        image: uint8 [h, w, 3], or None where nothing can be shown.
        text: caption, or of a bad sample what is wrong with it.
        note: small print: size, or where it lies.
        cause: of a bad sample. caption: of a bad sample.
    """

    image: np.ndarray[Any, Any] | None
    text: str
    note: str
    cause: str = ""
    caption: str = ""


def draw_shards(figures: dict[str, Any], good: Sequence[Cell], bad: Sequence[Cell], path: str | Path) -> Path:
    """Writes the PNG.

    Args:
        figures: what `farl.data check` counted. good, bad: cells in reading order.
    """
    good_height = -(-len(good) // COLUMNS) * _ROW + (0.42 if good else 0)
    bad_height = -(-len(bad) // COLUMNS) * _ROW + (0.42 if bad else 0)
    height = 1.0 + good_height + bad_height + 2 * (_CHART + 0.75)
    with look():
        figure = Figure(figsize=(_WIDTH, height))
        _head(figure, figures, height)
        top = height - 0.95
        _sheet(figure, "Samples at equal distances", good, top)
        _sheet(figure, "Bad samples, one of each cause first", bad, top - good_height)
        _charts(figure, figures, top - good_height - bad_height)
        return save(figure, path)


def _place(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes by inches from the left and from below their upper edge."""
    w, h = figure.get_size_inches()
    return figure.add_axes((left / w, (top - height) / h, width / w, height / h))


def _write(figure: Figure, x: float, y: float, text: str, **style: Any) -> None:
    w, h = figure.get_size_inches()
    figure.text(x / w, y / h, text, va=style.pop("va", "top"), **style)


def _head(figure: Figure, figures: dict[str, Any], height: float) -> None:
    about = "about " if figures["sampled"] else ""
    bad = sum(figures["bad"].values())
    size = figures["shard_bytes"]
    parts = [
        f"{figures['samples']:,} samples",
        f"{figures['shards']:,} shard{'s' * (figures['shards'] != 1)}, "
        + (f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"),
        f"{about}{bad:,} bad ({figures['bad_fraction']:.2%})",
    ]
    _write(figure, _MARGIN, height - 0.22, "   ·   ".join(parts), fontsize=17, fontweight="bold")
    how = "every pixel decoded" if figures["decoded"] else "headers read"
    seen = "all of them looked at"
    if figures["sampled"]:
        low, high = figures["bad_fraction_interval"]
        seen = f"{figures['checked']:,} looked at, spread evenly; bad: 95 % interval {low:.2%} to {high:.2%}"
    _write(
        figure, _MARGIN, height - 0.6, f"{seen}; {how}; fingerprint {figures['fingerprint']}", fontsize=10, color=MUTED
    )


def _sheet(figure: Figure, title: str, cells: Sequence[Cell], top: float) -> None:
    if not cells:
        return
    _write(figure, _MARGIN, top - 0.08, title, fontsize=12, fontweight="bold")
    for number, cell in enumerate(cells):
        left = _MARGIN + number % COLUMNS * (_CELL + _GAP)
        y = top - 0.42 - number // COLUMNS * _ROW
        axes = _place(figure, left, y, _CELL, _CELL)
        frame(axes, RED if cell.cause else FAINT, 2.0 if cell.cause else 1.0)
        axes.set_facecolor("#f6f7fa")
        if cell.image is not None:
            axes.imshow(cell.image, interpolation="lanczos", extent=_inside(cell.image), aspect="auto")
            axes.set(xlim=(0, 1), ylim=(0, 1))
        elif cell.text:
            shown = fitted(cell.text, 8, _CELL - 0.2, 8)
            axes.text(0.5, 0.5, shown, ha="center", va="center", fontsize=8, color=MUTED, transform=axes.transAxes)
        y -= _CELL + 0.06
        if cell.cause:
            _write(figure, left, y, fitted(cell.cause, 9, _CELL, 1), fontsize=9, color=RED, fontweight="bold")
            lines = [(cell.note, MUTED, 1), (cell.caption or "(no caption)", INK, 2)]
        else:
            _write(figure, left, y, fitted(cell.note, 7.5, _CELL, 1), fontsize=7.5, color=MUTED)
            lines = [(cell.text, INK, 3)]
        y -= 0.15
        for text, color, count in lines:
            _write(figure, left, y, fitted(text, 8, _CELL, count), fontsize=8, color=color, linespacing=1.25)
            y -= count * _LINE


def _inside(image: np.ndarray[Any, Any]) -> tuple[float, float, float, float]:
    """Extent in a unit square that keeps the picture's shape, centred."""
    height, width = image.shape[:2]
    w, h = width / max(width, height) / 2, height / max(width, height) / 2
    return 0.5 - w, 0.5 + w, 0.5 - h, 0.5 + h


def _charts(figure: Figure, figures: dict[str, Any], top: float) -> None:
    width = (_WIDTH - 2 * _MARGIN) / 4

    def axes(number: int, title: str, indent: float = 0.35) -> Axes:
        left, y = _MARGIN + number % 4 * width + indent, top - 0.42 - number // 4 * (_CHART + 0.75)
        made = _place(figure, left, y, width - indent - 0.3, _CHART)
        made.set_title(title, fontsize=10.5, x=-indent / (width - indent - 0.3))
        return made

    histograms = figures["histograms"]
    _histogram(axes(0, "Longer side, pixels"), histograms["long_side"], BLUE, log=True)
    _histogram(axes(1, "Width / height"), histograms["percent_wide"], BLUE, log=True, factor=0.01)
    _histogram(axes(2, "Caption length, characters"), histograms["caption_characters"], GREEN)
    cut = figures["captions_cut"] / max(figures["good"], 1)
    over = f" ({_share(cut)} over {CONTEXT_LENGTH}, cut)" if cut else ""
    tokens = axes(3, f"Caption length, tokens{over}")
    _histogram(tokens, histograms["caption_tokens"], GREEN)
    if cut:
        tokens.axvline(CONTEXT_LENGTH, color=RED, linewidth=1.2, linestyle=(0, (4, 2)))
    good = max(figures["good"], 1)
    formats = list(figures["formats"].items())
    kinds = {name: count / good for name, count in formats[:4]}
    if len(formats) > 4:
        kinds["other formats"] = sum(count for _, count in formats[4:]) / good
    traits = ("progressive", "gray", "cmyk", "exif_rotated")
    kinds |= {name.replace("exif_", "EXIF-").replace("cmyk", "CMYK"): figures[name] / good for name in traits}
    _bars(axes(4, "Kinds of images, share of the good ones", 1.15), kinds, [VIOLET] * (len(kinds) - 4) + [BLUE] * 4)
    ways = {"hardware": "JPEG engine", "gpu": "GPU, other JPEG", "cpu": "CPU"}
    decoded = {label: figures["decoded_by"][way] / good for way, label in ways.items()}
    _bars(axes(5, "Decoded on a GPU machine by", 1.25), decoded, [ORANGE])
    samples = max(figures["samples"], 1)
    causes = {name.replace("_", " "): count / samples for name, count in list(figures["bad"].items())[:7]}
    _bars(axes(6, "Bad samples by cause, share of all", 1.25), causes, [RED])
    shards = {name: sum(causes.values()) for name, causes in list(figures["bad_by_shard"].items())[:7]}
    _bars(axes(7, "Shards with most bad samples", 1.25), shards, [RED], shares=False)


def _histogram(axes: Axes, binned: dict[str, Any], color: str, *, log: bool = False, factor: float = 1.0) -> None:
    """Shares by bin, over the bins that hold something."""
    edges, counts = factor * np.array(binned["edges"]), np.array(binned["counts"], dtype=np.float64)
    filled = np.flatnonzero(counts)
    if not filled.size:
        return _nothing(axes)
    shares = counts / counts.sum()
    axes.bar(edges[:-1], shares, np.diff(edges), align="edge", color=color, edgecolor="white", linewidth=0.6)
    first, last = filled[0], filled[-1]
    if log:
        axes.set_xscale("log", base=2)
        # A set of one size gets an axis with more than one tick.
        pad = max(2, (12 - (last - first)) // 2)
        first, last = max(0, first - pad), min(len(counts) - 1, last + pad)
        ticks = [edge for edge in edges if np.isclose(np.log2(edge) % 1, 0) or np.isclose(np.log2(edge) % 1, 1)]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=9)
        axes.minorticks_off()
    else:
        first = 0
    axes.set_xlim(edges[first], edges[last + 1])
    if not log and last == len(counts) - 1:
        axes.text(1.0, -0.16, "and more", transform=axes.transAxes, ha="right", fontsize=8, color=MUTED)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if shares.max() > 0.045 else 1))
    axes.grid(axis="x", visible=False)
    return None


def _bars(axes: Axes, values: dict[str, float], colors: Sequence[str], *, shares: bool = True) -> None:
    if not values:
        return _nothing(axes)
    names = list(values)
    most = max(values.values()) or 1.0
    for row, name in enumerate(names):
        axes.barh(row, values[name], color=colors[row % len(colors)], height=0.62)
        text = _share(values[name]) if shares else f"{values[name]:,.0f}"
        axes.annotate(text, (values[name], row), (4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(names)), [textwrap.shorten(name, 24, placeholder="…") for name in names], color=INK)
    axes.tick_params(axis="y", length=0)
    axes.set(xlim=(0, 1.28 * most), ylim=(max(len(names), 4) - 0.4, -0.6), xticks=[])
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    return None


def _nothing(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.text(0.0, 0.9, "none", transform=axes.transAxes, color=MUTED, va="top")


def _share(value: float) -> str:
    """A share with as many digits as it needs to be seen."""
    return "0 %" if value == 0 else f"{100 * value:.1f} %" if value >= 0.001 else f"{100 * value:.2g} %"
