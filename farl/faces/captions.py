"""Captions: a random part of what is to be seen, in varied words and order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from farl.faces.traits import Traits

SUBJECTS = ("person", "person", "face", "head", "someone", "character")
OPENINGS = ("", "", "", "photo of ", "portrait of ", "close-up of ", "headshot of ", "picture of ")


@dataclass
class Facts:
    """Phrases by the slot they fit: `how` before the noun, `has` after "with", `wears` after "wearing", `does` as a
    participle, `where` as an adverb."""

    how: list[str] = field(default_factory=list)
    has: list[str] = field(default_factory=list)
    wears: list[str] = field(default_factory=list)
    does: list[str] = field(default_factory=list)
    where: list[str] = field(default_factory=list)


class _Words:
    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def one(self, *choices: str) -> str:
        """One of the choices, all equally likely."""
        return choices[int(self.rng.random() * len(choices))]

    def often(self, probability: float) -> bool:
        """True with this probability."""
        return bool(self.rng.random() < probability)


def _article(phrase: str) -> str:
    return f"an {phrase}" if phrase[:1] in "aeiou" else f"a {phrase}"


def _hair(t: Traits, w: _Words) -> str:
    color = {
        "dark brown": w.one("dark brown", "brown"),
        "blond": w.one("blond", "blonde", "golden"),
        "red": w.one("red", "ginger"),
    }
    color |= {"gray": w.one("gray", "grey"), "pink": w.one("pink", "dyed pink"), "blue": w.one("blue", "dyed blue")}
    name = color.get(t.hair_color, t.hair_color)
    if t.hair_style == "curly":
        return w.one(f"curly {name} hair", f"{name} curls", f"{name} curly hair")
    if t.hair_style == "bun":
        return w.one(f"{name} hair in a bun", f"a {name} bun", f"{name} hair tied up in a bun")
    if t.hair_style == "ponytail":
        return w.one(f"a {name} ponytail", f"{name} hair in a ponytail", f"{name} hair tied back")
    style = {
        "buzz": ("buzz cut", "cropped", "very short"),
        "short": ("short",),
        "side part": ("combed", "side-parted", "neat short"),
        "bob": ("chin-length", "bobbed"),
        "long": ("long", "long", "long straight" if not t.wavy else "long wavy"),
    }[t.hair_style]
    return w.one(f"{w.one(*style)} {name} hair", f"{name} hair", f"{name} {w.one(*style)} hair")


def _collect(t: Traits, w: _Words) -> Facts:
    f = Facts()
    if t.hair_style == "bald":
        if w.often(0.85):
            if w.often(0.6):
                f.how.append("bald")
            else:
                f.has.append(w.one("a bald head", "no hair"))
    elif w.often(0.85):
        f.has.append(_hair(t, w))
        if t.fringe and w.often(0.45):
            f.has.append(w.one("bangs", "a fringe"))
    if t.hat != "none" and w.often(0.92):
        kind = {
            "beanie": ("beanie", "knit hat", "woolly hat"),
            "cap": ("cap", "baseball cap"),
            "brim": ("hat", "wide-brimmed hat", "sun hat"),
        }
        f.wears.append(_article(f"{t.hat_color} {w.one(*kind[t.hat])}"))
    if t.glasses == "sunglasses" and w.often(0.9):
        f.wears.append(w.one("sunglasses", "dark glasses", "shades", f"{t.frame_color} sunglasses"))
    elif t.glasses in ("round", "square") and w.often(0.88):
        shape = "round" if t.glasses == "round" else w.one("square", "rectangular")
        f.wears.append(
            w.one(
                f"{t.frame_color} glasses",
                f"{shape} glasses",
                "glasses",
                f"{shape} {t.frame_color} eyeglasses",
                "spectacles",
            )
        )
    if t.cover == "mask" and w.often(0.92):
        f.wears.append(_article(w.one(f"{t.cover_color} face mask", f"{t.cover_color} mask", "face mask")))
    elif t.cover == "scarf" and w.often(0.92):
        f.wears.append(_article(w.one(f"{t.cover_color} scarf", f"thick {t.cover_color} scarf")))
    elif t.cover == "hand" and w.often(0.8):
        f.has.append(w.one("a hand on the cheek", "one hand on the face", "a hand against the cheek"))
    if t.beard != "none" and w.often(0.82):
        beard = {
            "stubble": ("stubble", "a stubbly chin", "light stubble"),
            "mustache": ("a mustache", "a moustache"),
            "goatee": ("a goatee", "a goatee beard"),
            "full": ("a beard", "a full beard", "a thick beard"),
        }
        f.has.append(w.one(*beard[t.beard]))
    _mood(t, w, f)
    if t.age > 0.62 and w.often(0.6):
        f.how.append(w.one("older", "elderly", "old", "mature"))
    elif t.age < 0.25 and w.often(0.35):
        f.how.append("young")
    if t.freckles and w.often(0.55):
        f.has.append(w.one("freckles", "freckled skin"))
    if t.earrings and w.often(0.6):
        f.wears.append(w.one("earrings", "hoop earrings", "round earrings"))
    if t.lipstick != "none" and w.often(0.6):
        f.wears.append(w.one(f"{t.lipstick} lipstick", "lipstick"))
    elif t.makeup and w.often(0.5):
        f.wears.append(w.one("makeup", "eye shadow"))
    if t.glasses != "sunglasses" and not t.eyes_closed and w.often(0.14):
        f.has.append(f"{t.iris} eyes")
    if w.often(0.16):
        tone = {"deep": "very dark", "dark brown": "dark brown", "tan": "tanned"}.get(t.skin, t.skin)
        f.has.append(f"{tone} skin")
    if w.often(0.42):
        garment = {
            "crew": ("shirt", "sweater", "top"),
            "v": ("v-neck", "top"),
            "turtleneck": ("turtleneck",),
            "shirt": ("shirt", "collared shirt"),
        }
        if t.collar == "striped":
            both = f"{t.cloth_color} and {t.cloth_color2}"
            f.wears.append(_article(w.one(f"striped {t.cloth_color} shirt", f"{both} striped top")))
        else:
            f.wears.append(_article(f"{t.cloth_color} {w.one(*garment[t.collar])}"))
    if w.often(0.62):
        f.where.append(_place(t, w))
    if w.often(0.22):
        light = {
            "warm": ("in warm light", "at golden hour"),
            "cool": ("in cool light",),
            "dim": ("in dim light", "in low light"),
        }
        light |= {"left": ("lit from the left",), "right": ("lit from the right",), "soft": ("in soft light",)}
        f.where.append(w.one(*light[t.light]))
    return f


def _mood(t: Traits, w: _Words, f: Facts) -> None:
    mood = {
        "smile": ("smiling", "with a smile", "smiling softly"),
        "laugh": ("laughing", "smiling broadly", "with a big smile", "grinning"),
        "surprised": ("looking surprised", "with a surprised look", "with an open mouth"),
        "sad": ("frowning", "looking sad", "with a sad expression"),
        "sleepy": ("with closed eyes", "with eyes shut", "sleeping"),
        "neutral": ("looking serious", "with a neutral expression", "with a calm face"),
    }[t.expression]
    if w.often(0.82 if t.expression != "neutral" else 0.18) and not (t.mouth_hidden and t.expression == "neutral"):
        if t.expression in ("smile", "laugh") and w.often(0.4):
            f.how.append(w.one("smiling", "happy") if t.expression == "smile" else w.one("laughing", "happy"))
        else:
            phrase = w.one(*mood)
            (f.has if phrase.startswith("with ") else f.does).append(phrase.removeprefix("with "))
    if abs(t.yaw) > 0.25 and w.often(0.55):
        side = "right" if t.yaw > 0 else "left"
        f.does.append(w.one(f"looking to the {side}", f"facing {side}", f"turned to the {side}"))


def _place(t: Traits, w: _Words) -> str:
    color, other = t.background_color, t.background_color2
    if t.background == "room":
        return w.one("in a room", "at home by a bookshelf", "indoors by a window", "in a room with books")
    if t.background == "outdoor":
        return w.one("outdoors", "outside in the hills", "in a green landscape", "in nature", "outside under the sky")
    if t.background == "bokeh":
        return w.one(
            "with blurred lights behind", "in front of city lights", "with bokeh lights", f"with blurred {color} lights"
        )
    if t.background == "stripes":
        return w.one(
            f"against {color} and {other} stripes", "in front of a striped wall", f"on a striped {color} background"
        )
    if t.background == "gradient":
        return w.one(f"on {_article(color)} and {other} background", f"against {_article(color)} to {other} backdrop")
    one = _article(color)
    return w.one(f"on {one} background", f"against {one} wall", f"in front of {one} backdrop", f"{color} background")


def _join(phrases: Sequence[str]) -> str:
    if len(phrases) < 2:
        return "".join(phrases)
    return ", ".join(phrases[:-1]) + " and " + phrases[-1]


def _short(t: Traits, w: _Words) -> str:
    """A plain caption, of the kind that many pictures share."""
    color = {"dark brown": "brown"}.get(t.hair_color, t.hair_color)
    hair = "bald person" if t.hair_style == "bald" else f"person with {color} hair"
    subject = w.one(_article(hair), _article(f"happy {hair}") if t.expression in ("smile", "laugh") else _article(hair))
    extras = []
    if t.hat != "none":
        extras.append("wearing a hat")
    if t.glasses != "none":
        extras.append("wearing sunglasses" if t.glasses == "sunglasses" else "wearing glasses")
    if t.cover == "mask":
        extras.append("wearing a face mask")
    if t.background == "outdoor":
        extras.append("outdoors")
    return (
        f"{subject} {w.one(*extras)}"
        if extras and w.often(0.8)
        else f"{w.one('a photo of ', 'portrait of ', '')}{subject}"
    )


def caption_of(t: Traits, rng: np.random.Generator) -> str:
    """One lower-case caption of about 5 to 25 words; it says only what the attributes say too."""
    w = _Words(rng)
    facts = _collect(t, w)
    for _ in range(4):
        if len(facts.how) + len(facts.has) + len(facts.wears) + len(facts.does) + len(facts.where) >= 3:
            break
        facts = _collect(t, w)
    for phrases in (facts.has, facts.wears, facts.does):
        rng.shuffle(phrases)
    # An alt text rarely tells all: cap what it says about one slot.
    facts.has, facts.wears = facts.has[: 2 + w.often(0.5)], facts.wears[: 2 + w.often(0.6)]
    if w.often(0.10):
        return _short(t, w)
    if w.often(0.22):
        tags = [*facts.how, *facts.has, *facts.wears, *facts.does, *facts.where]
        rng.shuffle(tags)
        tags = tags[: int(rng.integers(3, 7))]
        return ", ".join(
            [w.one("portrait", "face", "person", "headshot"), *tags] if w.often(0.7) or len(tags) < 3 else tags
        )
    rng.shuffle(facts.how)
    noun = w.one(*SUBJECTS)
    how = ", ".join(facts.how[:2])
    subject = f"someone {how}".strip() if noun == "someone" else _article(f"{how} {noun}".strip())
    has = f"with {_join(facts.has)}" if facts.has else ""
    wears = f"{w.one('wearing', 'wearing', 'in')} {_join(facts.wears)}" if facts.wears else ""
    middle = [part for part in (has, wears, *facts.does[:2]) if part]
    rng.shuffle(middle)
    where = " ".join(facts.where)
    text = f"{w.one(*OPENINGS)}{subject} {' '.join(middle)}".strip()
    if not where:
        return text
    if w.often(0.2) and not where.endswith("background"):
        return f"{where}, {text}"
    return f"{text}, {where}" if w.often(0.4) or where.endswith("background") else f"{text} {where}"
