from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from farl.evaluation.zero_shot import PHRASES, judge_scores, phrases_for, prompt_directions
from farl.faces import draw

CELEBA = """
5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose Black_Hair Blond_Hair Blurry
Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee Gray_Hair Heavy_Makeup High_Cheekbones Male
Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard Oval_Face Pale_Skin Pointy_Nose Receding_Hairline Rosy_Cheeks
Sideburns Smiling Straight_Hair Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace
Wearing_Necktie Young
"""


def test_the_table_has_all_of_celeba_and_two_different_sides() -> None:
    for name in CELEBA.split():
        assert phrases_for(name) == PHRASES[" ".join(name.replace("_", " ").lower().split())]
    for name, (for_it, against_it) in PHRASES.items():
        assert for_it and against_it and not set(for_it) & set(against_it), name


def test_names_outside_the_table_get_prompts_of_their_words() -> None:
    assert phrases_for("Green_Hair") == (("a person with green hair",), ("a person",))
    assert phrases_for("wearing-scarf") == (("a person wearing scarf",), ("a person",))
    assert phrases_for("Laughing") == (("a laughing person",), ("a person",))
    assert phrases_for("no freckles") == (("a person without freckles",), ("a person with freckles",))


def test_a_text_tower_that_understands_decides_right() -> None:
    def encode(texts: list[str]) -> torch.Tensor:
        """First axis: man against woman; second: eyeglasses or none."""
        man = [1.0 if " man" in text else -1.0 if "woman" in text else 0.0 for text in texts]
        glasses = [1.0 if "glasses" in text else -0.2 for text in texts]
        return torch.tensor([man, glasses, [1.0] * len(texts)]).T * 5

    images = torch.tensor([[1.0, -0.5, 1.0], [-1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [-1.0, -0.5, 1.0]])
    labels = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    names = ["Male", "Eyeglasses", "Bald"]
    result = judge_scores(images @ prompt_directions(names, encode).T, labels, names)
    assert result["attributes"]["Male"]["balanced_accuracy"] == 1
    assert result["attributes"]["Eyeglasses"]["average_precision"] == 1
    assert result["skipped"] == ["Bald"]
    assert result["mean"]["auc"] == 1
    assert result["mean"]["chance_average_precision"] == 0.5


def test_the_attributes_of_the_embedded_faces_are_in_the_table() -> None:
    for name in draw(0, size=32).attributes:
        assert " ".join(name.replace("_", " ").lower().split()) in PHRASES, name


def test_the_columns_of_the_photographs_are_in_the_table() -> None:
    if not os.environ.get("FARL_DATA"):
        pytest.skip("FARL_DATA is not set: no folder of photographs")
    header = (Path(os.environ["FARL_DATA"]) / "faces" / "attributes.csv").read_text().splitlines()[0].split(",")
    assert len(header) > 30
    for name in header[2:]:
        assert " ".join(name.replace("_", " ").lower().split()) in PHRASES, name
