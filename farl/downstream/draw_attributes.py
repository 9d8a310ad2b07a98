"""Pictures of attributes: a sheet of faces with their wrong answers, and the accuracy of each attribute."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from farl.downstream.sheet_text import fit
from farl.downstream.task import Sample
from farl.report.style import INK, MUTED, PAPER, RED

CELL = 170  # pixels; the longer side of a picture
TEXT = 250  # width of the answers beside it
GAP = 10
TITLE = 22
LINE = 17
LINES = (CELL - 4) // LINE


def answers(
    probabilities: NDArray[np.floating], labels: NDArray[np.floating] | None, names: Sequence[str]
) -> list[tuple[str, str]]:
    """Lines of text with their colour, the most certain first.

    With labels the wrong answers, each with what is true; without them what is said to be there.
    """
    if labels is None:
        yes = [i for i in np.argsort(-probabilities) if probabilities[i] >= 0.5]
        return [(f"{names[i]} {100 * probabilities[i]:.0f} %", INK) for i in yes]
    said = probabilities >= 0.5
    wrong = np.flatnonzero(~np.isnan(labels) & (said != (labels == 1)))
    order = wrong[np.argsort(-np.abs(probabilities[wrong] - 0.5))]
    return [(f"{names[i]}: {'yes' if labels[i] else 'no'}, said {100 * probabilities[i]:.0f} %", RED) for i in order]


def draw_sheet(
    samples: Sequence[Sample],
    predictions: Sequence[NDArray[np.floating]],
    scores: Sequence[float],
    names: Sequence[str],
    *,
    per_row: int = 3,
) -> Image.Image:
    """A sheet of the samples in the given order, each with its wrong answers beside it.

    Samples without "attributes" have what was answered with yes.

    Args:
        predictions: probabilities [A] of yes. scores: share of right answers, 0 to 1; NaN is left out.
    """
    font = ImageFont.load_default(13)
    per_row = max(1, min(per_row, len(samples)))
    block, row_height = CELL + TEXT + 2 * GAP, TITLE + CELL + GAP
    sheet = Image.new("RGB", (per_row * block + GAP, math.ceil(len(samples) / per_row) * row_height + 3 * GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    has_truth = all("attributes" in sample for sample in samples)
    text = "wrong answers: what is true, and the probability of yes" if has_truth else "what is there, by probability"
    pen.text((GAP, GAP // 2), text, MUTED, font)
    for index, (sample, probabilities, score) in enumerate(zip(samples, predictions, scores, strict=True)):
        left, top = GAP + (index % per_row) * block, 3 * GAP + (index // per_row) * row_height
        truth = sample["attributes"] if has_truth else None
        lines = answers(probabilities, truth, names)
        right = "" if truth is None or math.isnan(score) else f"{len(lines)} of {(~np.isnan(truth)).sum()} wrong   "
        pen.text((left, top), fit(pen, right + _short(str(sample["name"])), block - GAP, font), INK, font)
        picture = Image.fromarray(sample["image"])
        scale = CELL / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        method = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
        sheet.paste(picture.resize(size, method), (left, top + TITLE - 2))
        if len(lines) > LINES:
            lines = [*lines[: LINES - 1], (f"and {len(lines) - LINES + 1} more", MUTED)]
        for place, (line, color) in enumerate(lines):
            y = top + TITLE - 4 + place * LINE
            pen.text((left + CELL + GAP, y), fit(pen, line, TEXT, font), color, font)
    return sheet


def draw_accuracies(figures: Mapping[str, float | None], path: Path) -> Path:
    """A PNG with a bar for each attribute: its accuracy, and beside it that of always giving the frequent answer.

    Args:
        figures: as `AttributeScores.compute` gives them; those without a figure are left out. The attribute that gains
            most over the frequent answer is on top.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    from farl.report.style import BLUE, ORANGE, look, save

    rows = []
    for key, accuracy in figures.items():
        kind, _, name = key.partition("/")
        majority, share = figures.get(f"majority/{name}"), figures.get(f"positives/{name}")
        if kind == "accuracy" and None not in (accuracy, majority, share) and not math.isnan(float(accuracy or 0)):
            rows.append((name, 100 * float(accuracy or 0), 100 * float(majority or 0), 100 * float(share or 0)))
    rows.sort(key=lambda row: row[1] - row[2])
    with look():
        figure = Figure(figsize=(8.5, 1.3 + 0.22 * max(1, len(rows))), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title("accuracy by attribute, against always giving the frequent answer")
        lowest = min([50.0, *(min(row[1:3]) for row in rows)])
        for place, (_, accuracy, majority, _) in enumerate(rows):
            color = BLUE if accuracy > majority else ORANGE
            axes.barh(place, accuracy - lowest, left=lowest, height=0.62, color=color)
            axes.plot([majority, majority], [place - 0.42, place + 0.42], color=INK, linewidth=2)
        axes.set_yticks(range(len(rows)), [f"{name.replace('_', ' ')} ({share:.0f} % yes)" for name, *_, share in rows])
        axes.set_xlim(lowest, 100)
        axes.set_ylim(-0.7, len(rows) - 0.3)
        axes.set_xlabel("% right")
        axes.grid(visible=False, axis="y")
        key = (
            Line2D([], [], color=INK, linewidth=2, label="always the frequent answer"),
            Patch(color=BLUE, label="the model, better than that"),
            Patch(color=ORANGE, label="the model, not better"),
        )
        figure.legend(handles=key, loc="outside lower center", ncols=3)
        return save(figure, path)


def _short(name: str) -> str:
    """The last part of a path."""
    return name.rsplit("/", 1)[-1]
