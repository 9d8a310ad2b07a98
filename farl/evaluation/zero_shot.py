"""Zero-shot attributes: is the image nearer to the prompts for an attribute or to those against it?

The score of an image is cos(image, mean of prompts for) - cos(image, mean of prompts against); above 0 means yes. Each
phrase is put into every template, the normalised text features are averaged and normalised again (the prompt ensembles
of CLIP, Radford et al. 2021, section 3.1.4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from farl.evaluation.features import encode_captions
from farl.evaluation.measures import accuracies, average_precision, mean_of_known, number_or_none, roc_auc

TEMPLATES = ("{}", "a photo of {}", "a portrait of {}", "close-up of {}")
_MEN = ("a clean-shaven man", "a man without a beard")
_PLAIN = ("a person", "a man", "a woman")

# Name (see `_plain_name`) -> phrases for, phrases against. The first part is CelebA's list.
PHRASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "5 o clock shadow": (("a man with a five o'clock shadow", "a man with stubble"), _MEN),
    "arched eyebrows": (("a person with arched eyebrows",), ("a person with straight eyebrows", "a person")),
    "attractive": (("an attractive person",), ("an unattractive person", "a person")),
    "bags under eyes": (("a person with bags under the eyes",), ("a person with smooth skin", "a person")),
    "bald": (("a bald man", "a bald person"), ("a person with hair", "a man with hair")),
    "bangs": (("a person with bangs", "a woman with bangs"), ("a person with a bare forehead", "a person")),
    "big lips": (("a person with big lips", "a person with full lips"), ("a person with thin lips", "a person")),
    "big nose": (("a person with a big nose",), ("a person with a small nose", "a person")),
    "black hair": (("a person with black hair",), ("a person with blond hair", "a person with brown hair", "a person")),
    "blond hair": (("a person with blond hair",), ("a person with black hair", "a person with brown hair", "a person")),
    "blurry": (("a blurry person", "a blurry face"), ("a sharp face", "a person")),
    "brown hair": (("a person with brown hair",), ("a person with black hair", "a person with blond hair", "a person")),
    "bushy eyebrows": (("a person with bushy eyebrows",), ("a person with thin eyebrows", "a person")),
    "chubby": (("a chubby person",), ("a slim person", "a person")),
    "double chin": (("a person with a double chin",), ("a person with a slim chin", "a person")),
    "eyeglasses": (("a person wearing eyeglasses", "a person with glasses"), _PLAIN),
    "goatee": (("a man with a goatee",), _MEN),
    "gray hair": (("a person with gray hair",), ("a person with black hair", "a person with brown hair", "a person")),
    "heavy makeup": (("a woman with heavy makeup",), ("a person without makeup", "a person")),
    "high cheekbones": (("a person with high cheekbones",), ("a person with flat cheeks", "a person")),
    "male": (("a man",), ("a woman",)),
    "mouth slightly open": (("a person with an open mouth",), ("a person with a closed mouth", "a person")),
    "mustache": (("a man with a mustache",), _MEN),
    "narrow eyes": (("a person with narrow eyes",), ("a person with wide open eyes", "a person")),
    "no beard": (("a person without a beard", "a clean-shaven person"), ("a man with a beard", "a bearded man")),
    "oval face": (("a person with an oval face",), ("a person with a round face", "a person")),
    "pale skin": (("a person with pale skin",), ("a person with dark skin", "a person")),
    "pointy nose": (("a person with a pointy nose",), ("a person with a round nose", "a person")),
    "receding hairline": (("a man with a receding hairline",), ("a man with full hair", "a person")),
    "rosy cheeks": (("a person with rosy cheeks",), ("a person with pale cheeks", "a person")),
    "sideburns": (("a man with sideburns",), ("a man without sideburns", "a person")),
    "smiling": (("a smiling person", "a smiling man", "a smiling woman"), ("a serious person", *_PLAIN)),
    "straight hair": (("a person with straight hair",), ("a person with wavy hair", "a person with curly hair")),
    "wavy hair": (("a person with wavy hair",), ("a person with straight hair", "a person")),
    "wearing earrings": (("a woman wearing earrings", "a person wearing earrings"), ("a woman", "a person")),
    "wearing hat": (("a person wearing a hat", "a man wearing a hat"), _PLAIN),
    "wearing lipstick": (("a woman wearing lipstick",), ("a person without makeup", "a person")),
    "wearing necklace": (("a woman wearing a necklace",), ("a woman", "a person")),
    "wearing necktie": (("a man wearing a necktie", "a person wearing a necktie"), _PLAIN),
    "young": (
        ("a young person", "a young man", "a young woman"),
        ("an older person", "an older man", "an older woman"),
    ),
    # What the embedded faces (farl.faces) have beyond CelebA's list.
    "beard": (("a person with a beard", "a bearded man"), ("a person without a beard", "a clean-shaven person")),
    "curly hair": (("a person with curly hair",), ("a person with straight hair", "a person with short hair")),
    "dyed hair": (
        ("a person with dyed hair", "a person with pink hair", "a person with blue hair"),
        ("a person with brown hair", "a person with black hair", "a person with blond hair"),
    ),
    "eyes closed": (("a person with closed eyes", "a sleepy person"), ("a person with open eyes", "a person")),
    "face covered": (
        ("a person wearing a face mask", "a person wearing a scarf", "a person with a hand on the face"),
        ("a person",),
    ),
    "freckles": (("a person with freckles",), ("a person with smooth skin", "a person")),
    "long hair": (("a person with long hair",), ("a person with short hair", "a bald person")),
    "outdoors": (("a person outdoors", "a person in the open air"), ("a person indoors", "a person in a room")),
    "red hair": (("a person with red hair", "a person with ginger hair"), ("a person with brown hair", "a person")),
    "sunglasses": (("a person wearing sunglasses",), ("a person wearing eyeglasses", "a person")),
}


def phrases_for(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Phrases for and against an attribute; a name not in `PHRASES` gives "a person with NAME" against "a person"."""
    plain = _plain_name(name)
    if plain in PHRASES:
        return PHRASES[plain]
    if plain.startswith("no "):
        return (f"a person without {plain[3:]}",), (f"a person with {plain[3:]}",)
    if plain.startswith("wearing "):
        return (f"a person {plain}",), ("a person",)
    if plain.endswith("ing"):
        return (f"a {plain} person",), ("a person",)
    return (f"a person with {plain}",), ("a person",)


def prompt_directions(
    names: Sequence[str], encode: Callable[[list[str]], Tensor], templates: Sequence[str] = TEMPLATES
) -> Tensor:
    """[A, E], for each attribute the mean direction of the prompts for it minus that of the prompts against it.

    Args:
        encode: texts -> features [n, E], in any scale.
    """
    directions = []
    for name in names:
        sides = []
        for phrases in phrases_for(name):
            prompts = [template.format(phrase) for phrase in phrases for template in templates]
            sides.append(F.normalize(F.normalize(encode(prompts), dim=1).mean(0), dim=0))
        directions.append(sides[0] - sides[1])
    return torch.stack(directions)


def zero_shot_attributes(
    model: Any,
    tokenizer: Callable[[list[str]], Any],
    image_features: Tensor,
    labels: Tensor,
    names: list[str],
    *,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Judge prompts against labels; no label is used to choose anything.

    Args:
        image_features: [N, E]; labels: [N, A] of 0, 1 or NaN; names: A names, as CelebA's or any others.

    Returns:
        `attributes`: {name: balanced_accuracy (guessing: 0.5), average_precision, chance_average_precision (share of
        positives), auc (guessing: 0.5), positives, labelled, prompts}, `mean` over the attributes of which both classes
        occur, and `skipped`: those without.
    """
    directions = prompt_directions(names, lambda texts: encode_captions(model, texts, tokenizer, device=device))
    return judge_scores(F.normalize(image_features.float(), dim=1) @ directions.T, labels, names)


def judge_scores(scores: Tensor, labels: Tensor, names: list[str]) -> dict[str, Any]:
    """The figures of `zero_shot_attributes` from scores [N, A], of which those above 0 mean yes."""
    _, balanced = accuracies(scores > 0, labels)
    positives, labelled = (labels == 1).sum(0), (~labels.isnan()).sum(0)
    figures = {
        "balanced_accuracy": balanced,
        "average_precision": average_precision(scores, labels),
        "chance_average_precision": positives.double() / labelled,
        "auc": roc_auc(scores, labels),
    }
    judged = (positives > 0) & (positives < labelled)
    attributes = {
        name: {key: number_or_none(values[a]) for key, values in figures.items()}
        | {
            "positives": int(positives[a]),
            "labelled": int(labelled[a]),
            "prompts": dict(zip(("for", "against"), map(list, phrases_for(name)), strict=True)),
        }
        for a, name in enumerate(names)
        if judged[a]
    }
    return {
        "attributes": attributes,
        "mean": {key: mean_of_known(values[judged]) for key, values in figures.items()}
        | {"chance_balanced_accuracy": 0.5, "chance_auc": 0.5},
        "skipped": [name for a, name in enumerate(names) if not judged[a]],
        "templates": list(TEMPLATES),
    }


def _plain_name(name: str) -> str:
    """ "5_o_Clock_Shadow" and "Wearing-Hat" as plain lower-case words."""
    return " ".join(name.replace("_", " ").replace("-", " ").lower().split())
