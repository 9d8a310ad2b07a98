"""A sheet of parsed faces: image, truth, prediction and mistakes in a row, with a legend of the classes."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont

from farl.downstream.confusion import UNLABELLED
from farl.downstream.sheet_text import fit
from farl.downstream.task import Sample
from farl.report.style import INK, MUTED, PAPER, RED

CELL = 200  # pixels; the longer side of a picture
GAP = 10
TITLE = 22
OPACITY = 0.6
# Distinct on skin and hair alike, and neighbours in a face far apart; more classes get hues of their own.
COLORS = (
    "#000000", "#f2b48c", "#3565c9", "#2b9a66", "#00c2d1", "#7d55c7", "#ffd84d", "#e0457b", "#7a1f2b", "#ff8a3d",
    "#6b4a2b",
)  # fmt: skip
COLUMNS = ("image", "truth", "prediction", "mistakes")


def class_colors(count: int) -> NDArray[np.uint8]:
    """RGB [count, 3]; the background's is not drawn."""
    colors = np.zeros((count, 3), np.uint8)
    for index in range(count):
        if index < len(COLORS):
            colors[index] = ImageColor.getrgb(COLORS[index])
        else:
            # Steps of the golden angle keep any number of hues apart.
            hue = (index * 0.381966) % 1.0
            colors[index] = np.round(255 * np.array(colorsys.hsv_to_rgb(hue, 0.75, 0.55 + 0.4 * (index % 2))))
    return colors


def overlay(image: NDArray[np.uint8], labels: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """The image with its classes in colour, RGB [H, W, 3]; the background stays, unlabelled pixels turn white."""
    palette = np.full((256, 3), 255, np.uint8)
    palette[:count] = class_colors(count)
    blend = (1 - OPACITY) * image + OPACITY * palette[labels]
    return np.where(labels[..., None] == 0, image, blend.round().astype(np.uint8))


def mistakes(
    image: NDArray[np.uint8], truth: NDArray[np.uint8], prediction: NDArray[np.uint8], count: int
) -> NDArray[np.uint8]:
    """The image in pale gray, and on wrong pixels the colour of the true class (red where it is the background)."""
    palette = np.full((256, 3), 255, np.uint8)
    palette[:count] = class_colors(count)
    palette[0] = ImageColor.getrgb(RED)
    pale = np.repeat(160 + image.mean(-1, keepdims=True) * 0.35, 3, -1).clip(0, 255).astype(np.uint8)
    wrong = (truth != prediction) & (truth != UNLABELLED)
    return np.where(wrong[..., None], palette[truth], pale)


def draw_sheet(
    samples: Sequence[Sample],
    predictions: Sequence[NDArray[np.uint8]],
    scores: Sequence[float],
    classes: Sequence[str],
    *,
    per_row: int = 2,
) -> Image.Image:
    """A sheet of the samples in the given order, `per_row` of them beside each other.

    Samples without "mask" have image and prediction alone.

    Args:
        predictions: label maps [H, W] of the original images.
        scores: mean F1 of each, 0 to 1; NaN is left out.
    """
    with_truth = all("mask" in sample for sample in samples)
    columns = COLUMNS if with_truth else (COLUMNS[0], COLUMNS[2])
    font = ImageFont.load_default(13)
    block = len(columns) * (CELL + GAP) + GAP
    per_row = max(1, min(per_row, len(samples)))
    width = per_row * block
    legend = _legend(classes, width - 2 * GAP, font)
    rows = math.ceil(len(samples) / per_row)
    row_height = TITLE + CELL + GAP
    sheet = Image.new("RGB", (width, legend.height + TITLE + rows * row_height + 2 * GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    sheet.paste(legend, (GAP, GAP))
    top = legend.height + GAP
    for place in range(per_row):
        for column, name in enumerate(columns):
            pen.text((place * block + GAP + column * (CELL + GAP), top), name, INK, font)
    for index, (sample, prediction, score) in enumerate(zip(samples, predictions, scores, strict=True)):
        left = (index % per_row) * block + GAP
        y = top + TITLE + (index // per_row) * row_height
        value = "" if math.isnan(score) else f"mean F1 {100 * score:.1f}   "
        pen.text((left, y), fit(pen, value + _short(str(sample["name"])), block - 2 * GAP, font), MUTED, font)
        for column, pixels in enumerate(_pictures(sample, prediction, len(classes), with_truth)):
            picture = Image.fromarray(pixels)
            scale = CELL / max(picture.size)
            size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
            method = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
            sheet.paste(picture.resize(size, method), (left + column * (CELL + GAP), y + TITLE - 2))
    return sheet


def _pictures(sample: Sample, prediction: NDArray[np.uint8], count: int, with_truth: bool) -> list[NDArray[np.uint8]]:
    image = sample["image"]
    found = overlay(image, prediction, count)
    if not with_truth:
        return [image, found]
    truth = sample["mask"]
    return [image, overlay(image, truth, count), found, mistakes(image, truth, prediction, count)]


def _legend(classes: Sequence[str], width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> Image.Image:
    """Squares with names, in lines that fit the width; the background as the colour that mistakes have for it."""
    colors = [ImageColor.getrgb(RED), *map(tuple, class_colors(len(classes)).tolist()[1:])]
    names = [f"{classes[0]} (only in mistakes)", *classes[1:]]
    places, x, y = [], 0, 0
    for name in names:
        step = 34 + round(font.getlength(name))
        if x and x + step > width:
            x, y = 0, y + TITLE
        places.append((x, y))
        x += step
    picture = Image.new("RGB", (width, y + TITLE + GAP), PAPER)
    pen = ImageDraw.Draw(picture)
    for (left, top), color, name in zip(places, colors, names, strict=True):
        pen.rectangle((left, top + 2, left + 12, top + 14), fill=color)
        pen.text((left + 18, top), name, INK, font)
    return picture


def _short(name: str) -> str:
    """The last two parts of a path."""
    return "/".join(name.split("/")[-2:])
