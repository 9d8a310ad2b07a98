"""Binary attributes of a picture: what can be seen, under CelebA's names where it has one."""

from __future__ import annotations

from farl.faces.traits import LONG_STYLES, Traits


def attributes_of(t: Traits) -> dict[str, bool]:
    """All attributes, in a fixed order. Things under a mask or scarf do not count, because nobody can see them."""
    color = t.hair_color if t.hair_shown else ""
    return {
        "Bald": t.hair_style == "bald",
        "Bangs": t.fringe,
        "Beard": t.beard in ("full", "goatee"),
        "Black_Hair": color == "black",
        "Blond_Hair": color == "blond",
        "Brown_Hair": color in ("brown", "dark brown"),
        "Curly_Hair": t.hair_style == "curly",
        "Dyed_Hair": color in ("pink", "blue"),
        "Eyeglasses": t.glasses != "none",
        "Eyes_Closed": t.eyes_closed,
        "Face_Covered": t.cover in ("mask", "scarf", "hand"),
        "Freckles": t.freckles,
        "Gray_Hair": color in ("gray", "white"),
        "Heavy_Makeup": t.makeup,
        "Long_Hair": t.hair_style in LONG_STYLES and t.hair_style != "bob",
        "Mouth_Slightly_Open": t.expression in ("laugh", "surprised"),
        "Mustache": t.beard in ("mustache", "goatee", "full"),
        "Outdoors": t.background == "outdoor",
        "Red_Hair": color == "red",
        "Smiling": t.expression in ("smile", "laugh"),
        "Sunglasses": t.glasses == "sunglasses",
        "Wearing_Earrings": t.earrings,
        "Wearing_Hat": t.hat != "none",
        "Wearing_Lipstick": t.lipstick != "none",
        "Young": t.age <= 0.45,
    }
