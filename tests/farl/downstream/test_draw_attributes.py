"""What stands on the pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from farl.downstream.attribute_scores import AttributeScores
from farl.downstream.draw_attributes import CELL, answers, draw_accuracies, draw_sheet
from farl.report.style import INK, RED

NAMES = ("Bald", "Smiling", "Young", "Male")
NAN = float("nan")


def test_wrong_answers_are_named_the_most_certain_first() -> None:
    said = np.array([0.6, 0.02, 0.9, 0.7])
    assert answers(said, np.array([0.0, 1.0, 1.0, NAN]), NAMES) == [
        ("Smiling: yes, said 2 %", RED),
        ("Bald: no, said 60 %", RED),
    ]
    assert answers(np.array([0.5, 0.49, 0.5, 0.5]), np.array([1.0, 0.0, 1.0, 1.0]), NAMES) == []


def test_without_truth_what_is_there_is_named() -> None:
    assert answers(np.array([0.6, 0.02, 0.9, 0.4]), None, NAMES) == [("Young 90 %", INK), ("Bald 60 %", INK)]


def test_a_sheet_holds_every_image() -> None:
    colors = [(250, 10, 10), (10, 250, 10), (10, 10, 250), (250, 250, 10)]
    samples = [
        {"image": np.full((40, 20 + 40 * (i % 2), 3), color, np.uint8), "attributes": np.zeros(4), "name": f"a/{i}.jpg"}
        for i, color in enumerate(colors)
    ]
    sheet = draw_sheet(samples, [np.full(4, 0.9)] * 4, [0.0, 0.0, 0.0, NAN], NAMES)
    found = np.asarray(sheet).reshape(-1, 3)
    for color, shape in zip(colors, [(40, 20), (40, 60)] * 2, strict=True):
        scale = CELL / max(shape)
        assert (found == color).all(1).sum() == round(shape[0] * scale) * round(shape[1] * scale)
    bare = [{"image": sample["image"], "name": sample["name"]} for sample in samples]
    assert draw_sheet(bare, [np.full(4, 0.9)] * 4, [NAN] * 4, NAMES).size == sheet.size


def test_more_wrong_answers_than_fit_are_counted() -> None:
    names = [f"attribute_with_a_rather_long_name_{i}" for i in range(40)]
    sample = {"image": np.zeros((8, 8, 3), np.uint8), "attributes": np.zeros(40), "name": "x"}
    sheet = draw_sheet([sample], [np.full(40, 0.9)], [0.0], names)
    assert sheet.height < 300


@pytest.mark.parametrize("known", [True, False])
def test_accuracies_are_drawn(tmp_path: Path, known: bool) -> None:
    scores = AttributeScores(NAMES)
    labels = np.random.default_rng(0).integers(0, 2, (20, 4)).astype(np.float32)
    labels[:, 2] = NAN
    if known:
        import torch

        scores.update(torch.from_numpy(labels).nan_to_num(0.0) - 0.5, torch.from_numpy(labels))
    figures = {name: None if np.isnan(value) else value for name, value in scores.compute().items()}
    picture = np.asarray(Image.open(draw_accuracies(figures, tmp_path / "a.png")).convert("RGB")).reshape(-1, 3)
    blue = (picture == (0x35, 0x65, 0xC9)).all(1).sum()
    assert (blue > 5000) == known
