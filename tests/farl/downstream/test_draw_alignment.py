"""The sheet of faces with landmarks: dots lie where the points are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageColor

from farl.downstream.draw_alignment import CELL, FOUND, TRUE, draw_face, draw_sheet


def spots(picture: Image.Image, color: str) -> np.ndarray:
    """Mean place (x, y) of the pixels of about that colour."""
    distance = np.abs(np.asarray(picture, int) - ImageColor.getrgb(color)).sum(-1)
    rows, columns = (distance < 60).nonzero()
    return np.array([columns.mean(), rows.mean()])


def test_dots_lie_on_their_pixels() -> None:
    """A white pixel at a point: its square in the enlarged picture and the dot have the same middle."""
    image = np.zeros((60, 80, 3), np.uint8)
    image[20, 30] = 255
    frame, away = np.array([[20.0, 10.0], [44.0, 34.0]]), np.array([[-500.0, -500.0], [30.0, 20.0]])
    lit = np.asarray(draw_face(image, frame, away - 500), float).min(-1)
    lit[lit < 120] = 0  # lines and dots have colours
    rows, columns = np.mgrid[:CELL, :CELL]
    middle = np.array([(lit * columns).sum(), (lit * rows).sum()]) / lit.sum()
    dotted = draw_face(np.zeros_like(image), frame, away)
    assert spots(dotted, FOUND) == pytest.approx(middle, abs=0.6)
    # Two corners of the frame, whose middle is the picture's.
    assert spots(draw_face(np.zeros_like(image), frame, away - 500), TRUE) == pytest.approx((CELL - 1) / 2, abs=0.6)


@pytest.mark.parametrize("labelled", [True, False])
def test_sheet(labelled: bool) -> None:
    rng = np.random.default_rng(0)
    samples: list[dict[str, Any]] = []
    for i in range(5):
        samples.append({"image": np.full((40 + i, 50, 3), 90, np.uint8), "name": f"folder/{'long' * 20}{i}.jpg"})
        if labelled:
            samples[-1]["points"] = rng.uniform(5, 35, (19, 2))
    predictions = [rng.uniform(0, 40, (19, 2)) for _ in samples]
    sheet = draw_sheet(samples, predictions, [0.5, 0.3, 0.2, float("nan"), 0.1])
    assert sheet.width > 4 * CELL and sheet.height > 2 * CELL
    pixels = np.asarray(sheet, int)[40:]
    assert (np.abs(pixels - ImageColor.getrgb(FOUND)).sum(-1) < 30).sum() > 500
    assert bool((np.abs(pixels - ImageColor.getrgb(TRUE)).sum(-1) < 30).sum() > 500) is labelled
