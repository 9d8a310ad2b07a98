"""Contact sheets: faces with their masks, landmarks and captions, for people to look at."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from farl.faces.face import Face, draw

MASK_COLORS = np.array(
    [
        (38, 41, 51),
        (236, 188, 160),
        (120, 81, 169),
        (165, 120, 210),
        (46, 134, 193),
        (93, 173, 226),
        (244, 208, 63),
        (231, 76, 60),
        (110, 20, 30),
        (236, 112, 140),
        (110, 78, 55),
    ],
    np.uint8,
)
TEXT_LINES, LINE_HEIGHT = 4, 15


def overlay(face: Face) -> NDArray[np.uint8]:
    """The face's mask in colours over its image, with its landmarks: uint8 [S, S, 3]."""
    colors = MASK_COLORS[face.mask].astype(np.float32)
    picture = Image.fromarray((0.30 * face.image + 0.70 * colors).astype(np.uint8))
    drawer = ImageDraw.Draw(picture)
    radius = max(len(face.mask) / 140, 0.8)
    for x, y in face.landmarks.tolist():
        box = (x - radius, y - radius, x + radius, y + radius)
        drawer.ellipse(box, fill=(255, 255, 255), outline=(20, 20, 20))
    return np.asarray(picture)


def sample_sheet(
    path: str | Path | None,
    rows: int = 3,
    cols: int = 6,
    *,
    size: int = 160,
    seed: int = 0,
    start: int = 0,
    labels: bool = True,
    captions: bool = True,
) -> Image.Image:
    """Draws rows x cols faces, with a row of masks and landmarks under each row and captions below.

    Args:
        path: image file to write; None to write nothing.
        size: side of a face in pixels; start: index of the first face.
        labels, captions: leave the masks or the words out.

    Raises:
        ValueError: rows or cols below 1, or what `draw` raises.
    """
    if rows < 1 or cols < 1:
        raise ValueError(f"rows and cols must be at least 1, got {rows} x {cols}")
    gap = max(size // 40, 2)
    text_height = TEXT_LINES * LINE_HEIGHT + gap if captions else 0
    height = (size + gap) * (2 if labels else 1) + text_height
    sheet = Image.new("RGB", (cols * (size + gap) + gap, rows * height + gap), (252, 252, 250))
    drawer, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for number in range(rows * cols):
        face = draw(start + number, seed=seed, size=size)
        x, y = gap + number % cols * (size + gap), gap + number // cols * height
        sheet.paste(Image.fromarray(face.image), (x, y))
        if labels:
            y += size + gap
            sheet.paste(Image.fromarray(overlay(face)), (x, y))
        if captions:
            lines = textwrap.wrap(face.caption, max(size // 6, 8), max_lines=TEXT_LINES, placeholder=" ...")
            drawer.multiline_text((x, y + size + gap), "\n".join(lines), fill=(40, 40, 48), font=font, spacing=3)
    if path is not None:
        sheet.save(path)
    return sheet
