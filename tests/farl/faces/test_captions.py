"""Captions say nothing that the attributes deny, and vary."""

from __future__ import annotations

import re

import numpy as np
import pytest

from farl.faces.attributes import attributes_of
from farl.faces.captions import caption_of
from farl.faces.traits import Traits, sample

COUNT = 3000
# A phrase, and the attribute that must be true (or, with "!", false) of every face whose caption has it.
SAYS = {
    r"glasses|spectacles|shades": "Eyeglasses",
    r"sunglasses|dark glasses|shades": "Sunglasses",
    r"(?<!sun)(?<!dark )glasses|spectacles|eyeglasses": "!Sunglasses",
    r"smil|laughing|grinning|happy": "Smiling",
    r"frown|sad |serious|neutral": "!Smiling",
    r"surprised|open mouth|laughing": "Mouth_Slightly_Open",
    r"\bcap\b|beanie|\bhat\b": "Wearing_Hat",
    r"face mask|\bmask\b|scarf|hand ": "Face_Covered",
    r"\bbald\b|no hair": "Bald",
    r"black hair|black curls|black ponytail": "Black_Hair",
    r"(blond|blonde|golden) (hair|curls|ponytail|bun)": "Blond_Hair",
    r"brown (hair|curls|ponytail|bun)": "Brown_Hair",
    r"(red|ginger) (hair|curls|ponytail|bun)": "Red_Hair",
    r"(gray|grey|white) (hair|curls|ponytail|bun)": "Gray_Hair",
    r"(pink|blue) (hair|curls|ponytail|bun)": "Dyed_Hair",
    r"curl": "Curly_Hair",
    r"ponytail|tied|\bbun\b|\blong\b": "Long_Hair",
    r"\bshort\b|cropped": "!Long_Hair",
    r"bangs|fringe": "Bangs",
    r"(full|thick|a) beard\b|goatee": "Beard",
    r"m(o)?ustache": "Mustache",
    r"freckle": "Freckles",
    r"earrings": "Wearing_Earrings",
    r"lipstick": "Wearing_Lipstick",
    r"makeup|eye shadow": "Heavy_Makeup",
    r"eyes shut|closed eyes|sleeping": "Eyes_Closed",
    r"brown eyes|blue eyes|green eyes": "!Eyes_Closed",
    r"young": "Young",
    r"\bold\b|older|elderly|mature": "!Young",
    r"outdoors|outside|landscape|nature": "Outdoors",
    r"room|indoors|bookshelf|background|backdrop|\bwall\b|stripes": "!Outdoors",
}


@pytest.fixture(scope="module")
def people() -> list[tuple[Traits, str, dict[str, bool]]]:
    rows = []
    for i in range(COUNT):
        traits = sample(np.random.default_rng([0, i, 0]))
        rows.append((traits, caption_of(traits, np.random.default_rng([0, i, 1])), attributes_of(traits)))
    return rows


@pytest.mark.parametrize("phrase", SAYS)
def test_a_caption_never_contradicts_the_attributes(
    people: list[tuple[Traits, str, dict[str, bool]]], phrase: str
) -> None:
    name, wanted = SAYS[phrase].lstrip("!"), not SAYS[phrase].startswith("!")
    told = [(caption, attributes) for _, caption, attributes in people if re.search(phrase, caption)]
    assert len(told) >= 5, "no caption uses this phrase: the test would not see a mistake"
    for caption, attributes in told:
        assert attributes[name] == wanted, f"{caption!r}: {name} is {attributes[name]}"


def test_captions_vary_and_sometimes_repeat(people: list[tuple[Traits, str, dict[str, bool]]]) -> None:
    captions = [caption for _, caption, _ in people]
    assert 0.85 < len(set(captions)) / COUNT < 0.99
    words = [len(caption.split()) for caption in captions]
    assert 8 <= np.mean(words) <= 20 and min(words) >= 2 and max(words) <= 40
    assert len({word for caption in captions for word in re.findall(r"[a-z]+", caption)}) > 150


def test_captions_are_clean_text(people: list[tuple[Traits, str, dict[str, bool]]]) -> None:
    for _, caption, _ in people:
        assert re.fullmatch(r"[a-z][a-z, '-]*[a-z]", caption), caption
        assert not re.search(r"  | ,|,,|,$|\ba [aeio]|\ban [^aeiou]", caption), caption


def test_classes_are_balanced_enough_to_learn(people: list[tuple[Traits, str, dict[str, bool]]]) -> None:
    for name in people[0][2]:
        share = np.mean([attributes[name] for _, _, attributes in people])
        assert 0.03 < share < 0.97, f"{name}: {share:.3f}"


def test_captions_tell_faces_apart(people: list[tuple[Traits, str, dict[str, bool]]]) -> None:
    """Colours and things that are said must be enough for retrieval: most pairs differ in what is visibly said."""
    hats = sum(t.hat_color in c for t, c, _ in people if t.hat != "none") / sum(t.hat != "none" for t, _, _ in people)
    assert hats > 0.6
    backs = [t.background_color in c for t, c, _ in people if t.background in ("plain", "gradient")]
    assert np.mean(backs) > 0.4
