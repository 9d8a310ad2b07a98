"""A sheet of faces with true and found landmarks, and what lies between them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from farl.downstream.sheet_text import fit
from farl.downstream.task import Sample
from farl.report.style import INK, MUTED, PAPER

CELL = 260  # pixels; side of a picture
GAP = 10
TITLE = 22
TRUE, FOUND, BETWEEN = "#2bd673", "#ff4d6d", "#ffd84d"
MARGIN = 0.15  # around the points, of their longer side


def draw_sheet(
    samples: Sequence[Sample],
    predictions: Sequence[NDArray[np.floating]],
    scores: Sequence[float],
    *,
    per_row: int = 4,
) -> Image.Image:
    """A sheet of the samples in the given order, each cut to its face.

    Samples without "points" have the found ones alone.

    Args:
        predictions: points [N, 2] in pixels of the original images, with pixel centres at whole numbers.
        scores: NME of each as a fraction; NaN is left out.
    """
    font = ImageFont.load_default(13)
    per_row = max(1, min(per_row, len(samples)))
    rows = math.ceil(len(samples) / per_row)
    step = CELL + GAP
    sheet = Image.new("RGB", (per_row * step + GAP, TITLE + rows * (step + TITLE) + GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    left = GAP
    for name, color in (("true", TRUE), ("found", FOUND)):
        pen.ellipse((left, GAP + 1, left + 8, GAP + 9), fill=color)
        pen.text((left + 14, GAP - 3), name, INK, font)
        left += 70
    for index, (sample, found, score) in enumerate(zip(samples, predictions, scores, strict=True)):
        x, y = GAP + index % per_row * step, TITLE + GAP + index // per_row * (step + TITLE)
        value = "" if math.isnan(score) else f"NME {100 * score:.2f} %   "
        pen.text((x, y - 2), fit(pen, value + str(sample["name"]).split("/")[-1], CELL, font), MUTED, font)
        sheet.paste(draw_face(sample["image"], sample.get("points"), found), (x, y + TITLE - 4))
    return sheet


def draw_face(
    image: NDArray[np.uint8], points: NDArray[np.floating] | None, found: NDArray[np.floating], size: int = CELL
) -> Image.Image:
    """The part of an image around its points, `size` pixels a side, with true points in green and found ones in red.

    Args:
        image: RGB [H, W, 3]. points: true ones [N, 2], or None. found: [N, 2].
    """
    # A wild prediction must not shrink the face to a dot.
    frame = np.asarray(found if points is None else points, np.float64)
    low, high = frame.min(0), frame.max(0)
    side = max(float((high - low).max()), 1.0) * (1 + 2 * MARGIN)
    corner = (low + high) / 2 + 0.5 - side / 2
    scale = size / side
    box = (*corner, *(corner + side))
    picture = Image.fromarray(image).transform((size, size), Image.Transform.EXTENT, box, Image.Resampling.BICUBIC)
    # Twice as large and shrunk again: smooth dots and lines.
    picture = picture.resize((2 * size, 2 * size), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)

    def place(p: NDArray[np.floating]) -> list[tuple[float, float]]:
        return [(float(x), float(y)) for x, y in (np.asarray(p) + 0.5 - corner) * scale * 2]

    truth, guess = place(points) if points is not None else [], place(found)
    for start, end in zip(truth, guess, strict=False):
        pen.line((*start, *end), fill=BETWEEN, width=2)
    for spots, color in ((truth, TRUE), (guess, FOUND)):
        for x, y in spots:
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=color)
    return picture.resize((size, size), Image.Resampling.LANCZOS)
