"""Overlays, mistakes and the sheet."""

from __future__ import annotations

import math

import numpy as np

from farl.downstream.draw_parsing import CELL, class_colors, draw_sheet, mistakes, overlay

NAMES = ["background", "skin", "hair"]


def test_classes_have_colours_of_their_own() -> None:
    for count in (3, 11, 19, 40):
        colors = class_colors(count)
        assert colors.shape == (count, 3) and len({tuple(color) for color in colors.tolist()}) == count
    assert np.array_equal(class_colors(19)[:11], class_colors(11))


def test_the_background_is_the_image_and_classes_are_tinted() -> None:
    image = np.full((2, 2, 3), 100, np.uint8)
    found = overlay(image, np.array([[0, 1], [2, 255]], np.uint8), 3)
    assert found[0, 0].tolist() == [100] * 3
    for pixel, color in ((found[0, 1], class_colors(3)[1]), (found[1, 0], class_colors(3)[2]), (found[1, 1], 255)):
        assert np.abs(pixel - (40 + 0.6 * np.asarray(color, float))).max() <= 0.5


def test_mistakes_have_the_colour_of_the_truth_and_the_unlabelled_has_none() -> None:
    image = np.full((1, 4, 3), 100, np.uint8)
    truth, prediction = np.array([[0, 1, 2, 255]], np.uint8), np.array([[1, 1, 1, 1]], np.uint8)
    found = mistakes(image, truth, prediction, 3)
    assert found[0, 1].tolist() == found[0, 3].tolist() == [195] * 3
    assert found[0, 2].tolist() == class_colors(3)[2].tolist()
    assert found[0, 0].tolist() not in ([195] * 3, class_colors(3)[1].tolist())


def test_the_sheet_has_a_place_for_every_sample() -> None:
    rng = np.random.default_rng(0)
    samples, predictions = [], []
    for shape in ((20, 30), (50, 10), (400, 300)):
        image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        samples.append({"image": image, "mask": rng.integers(0, 3, shape, dtype=np.uint8), "name": "a/b/" + "c" * 300})
        predictions.append(rng.integers(0, 3, shape, dtype=np.uint8))
    sheet = draw_sheet(samples, predictions, [0.1, 0.2, math.nan], NAMES)
    assert sheet.mode == "RGB" and sheet.width > 8 * CELL and sheet.height > 2 * CELL
    one = draw_sheet(samples[:1], predictions[:1], [0.1], NAMES)
    assert 4 * CELL < one.width < 5 * CELL
    bare = [{"image": samples[0]["image"], "name": "x"}]
    assert 2 * CELL < draw_sheet(bare, predictions[:1], [math.nan], NAMES).width < 3 * CELL


def test_many_classes_get_a_legend_of_several_lines() -> None:
    sample = {"image": np.zeros((8, 8, 3), np.uint8), "mask": np.zeros((8, 8), np.uint8), "name": "x"}
    heights = [
        draw_sheet([sample], [sample["mask"]], [1.0], ["background", *(f"class number {i}" for i in range(n))]).height
        for n in (3, 60)
    ]
    assert heights[1] > heights[0] + 50
