"""Who is in picture `index`: every choice that a picture, its caption and its attributes are made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from farl.faces import palette
from farl.faces.geometry import HeadShape

HAIR_STYLES = {"bald": 7, "buzz": 8, "short": 18, "side part": 12, "bob": 11, "long": 16, "curly": 13, "bun": 8}
HAIR_STYLES["ponytail"] = 7
LONG_STYLES = ("bob", "long", "ponytail", "bun")
EXPRESSIONS = {"neutral": 34, "smile": 27, "laugh": 17, "surprised": 9, "sad": 6, "sleepy": 7}
HATS = {"none": 74, "beanie": 10, "cap": 9, "brim": 7}
BEARDS = {"none": 66, "stubble": 9, "mustache": 7, "goatee": 6, "full": 12}
GLASSES = {"none": 66, "round": 12, "square": 11, "sunglasses": 11}
COVERS = {"none": 84, "mask": 5, "scarf": 4, "hand": 4, "sun": 3}
BACKGROUNDS = {"plain": 24, "gradient": 18, "stripes": 12, "bokeh": 17, "room": 14, "outdoor": 15}
COLLARS = {"crew": 5, "v": 3, "turtleneck": 2, "shirt": 3, "striped": 3}


@dataclass(frozen=True)
class Traits:
    """One person in one picture. Words are keys of `farl.faces.palette` or of the tables above."""

    shape: HeadShape
    soft: bool  # a finer build
    yaw: float
    pitch: float
    roll: float
    zoom: float
    shift: tuple[float, float]
    gaze: tuple[float, float]
    skin: str
    skin_rgb: tuple[float, float, float]
    hair_style: str
    hair_color: str
    hair_rgb: tuple[float, float, float]
    hair_volume: float
    part: float
    fringe: bool
    wavy: bool
    iris: str
    expression: str
    age: float
    freckles: bool
    beard: str
    glasses: str
    frame_color: str
    hat: str
    hat_color: str
    earrings: bool
    lipstick: str  # "none" or a colour
    makeup: bool
    cover: str
    cover_color: str
    background: str
    background_color: str
    background_color2: str
    collar: str
    cloth_color: str
    cloth_color2: str
    light: str  # soft, left, right, warm, cool, dim
    jpeg_quality: int

    @property
    def mouth_hidden(self) -> bool:
        return self.cover in ("mask", "scarf")

    @property
    def hair_shown(self) -> bool:
        return self.hair_style != "bald"

    @property
    def eyes_closed(self) -> bool:
        return self.expression == "sleepy"


def _pick(rng: np.random.Generator, table: Mapping[str, float] | tuple[str, ...]) -> str:
    names = list(table)
    if not isinstance(table, Mapping):
        return names[int(rng.random() * len(names))]
    weights = np.cumsum(list(table.values()))
    return names[int(np.searchsorted(weights, rng.random() * weights[-1], side="right"))]


def _tint(rng: np.random.Generator, rgb: tuple[float, float, float], spread: float) -> tuple[float, float, float]:
    hue = 0.0 if max(rgb) - min(rgb) < 0.03 else spread / 3  # greys stay grey
    r, g, b = np.clip(np.array(rgb) * rng.normal(1, spread) * rng.normal(1, hue, 3), 0.02, 0.96).tolist()
    return r, g, b


def _shape(rng: np.random.Generator, expression: str, soft: bool) -> HeadShape:
    def near(mean: float, sd: float) -> float:
        return float(mean + sd * np.clip(rng.normal(), -2, 2))

    smile = {"smile": near(0.8, 0.15), "laugh": near(1.0, 0.12), "sad": near(-0.65, 0.1)}.get(
        expression, near(0.0, 0.08)
    )
    open_mouth = {"laugh": near(0.15, 0.03), "surprised": near(0.25, 0.04)}.get(expression, 0.0)
    eye_open = near(0.155, 0.014)
    eye_open *= {"surprised": 1.3, "laugh": 0.80, "smile": 0.92, "sleepy": 0.0}.get(expression, 1.0)
    mouth_half = near(0.33, 0.025) + 0.07 * max(smile, 0) - (0.10 if expression == "surprised" else 0)
    return HeadShape(
        width=near(1.0, 0.035),
        chin=near(1.34, 0.05),
        taper=near(2.15 if soft else 2.4, 0.2),
        square=near(1.55 if soft else 1.85, 0.18),
        eye_x=near(0.43, 0.018),
        eye_half=near(0.232 if soft else 0.215, 0.014),
        eye_tilt=near(0.02, 0.025),
        brow_y=near(-0.33, 0.02),
        nose_y=near(0.50, 0.035),
        nose_width=near(0.18 if soft else 0.205, 0.02),
        nose_height=near(0.28 if soft else 0.33, 0.03),
        mouth_y=near(0.85, 0.025),
        mouth_half=mouth_half,
        lip=near(0.10 if soft else 0.08, 0.014),
        cheek=near(0.06, 0.02),
        open_mouth=max(open_mouth, 0.0),
        smile=smile,
        eye_open=eye_open,
        brow_raise={"surprised": 0.11, "sad": 0.03}.get(expression, near(0.0, 0.015)),
        brow_arch=near(0.06, 0.02),
        brow_thick=near(0.075 if soft else 0.105, 0.014),
    )


def sample(rng: np.random.Generator) -> Traits:
    """Draws one set of traits; combinations that could not be seen together are resolved here."""
    cover = _pick(rng, COVERS)
    hidden_mouth = cover in ("mask", "scarf")
    soft = bool(rng.random() < 0.5)  # finer or coarser build; beards and make-up follow it
    age = float(rng.beta(1.3, 2.2))
    skin = _pick(rng, tuple(palette.SKIN))
    expression = _pick(rng, EXPRESSIONS)
    if hidden_mouth and expression in ("smile", "laugh", "sad", "surprised"):
        expression = "neutral"
    glasses = _pick(rng, GLASSES)
    if glasses == "sunglasses" and expression == "sleepy":
        expression = "neutral"
    style = _pick(rng, {k: v * (1.6 if (k in LONG_STYLES) == soft else 0.5) for k, v in HAIR_STYLES.items()})
    if soft and style == "bald" and rng.random() < 0.7:
        style = "curly"
    natural = {"black": 24, "dark brown": 12, "brown": 17, "blond": 18, "red": 10, "pink": 4, "blue": 4}
    if skin in ("brown", "dark brown", "deep"):
        natural |= {"black": 40, "blond": 9, "red": 5}
    if age > 0.5:
        natural |= {"gray": 45, "white": 25}
    else:
        natural |= {"gray": 2, "white": 1}
    hair_color = _pick(rng, natural)
    hat = _pick(rng, HATS)
    if hat != "none" and style == "bun":
        style = "long"
    beard = "none" if soft or hidden_mouth else _pick(rng, BEARDS | {"none": 34})
    makeup = soft and bool(rng.random() < 0.38)
    wears_lipstick = soft and not hidden_mouth and bool(rng.random() < (0.8 if makeup else 0.2))
    backdrop = _pick(rng, tuple(palette.BACKDROP))
    cloth = _pick(rng, tuple(palette.CLOTH))
    return Traits(
        shape=_shape(rng, expression, soft),
        soft=soft,
        yaw=float(np.clip(rng.normal(0, 0.27), -0.62, 0.62)),
        pitch=float(np.clip(rng.normal(0.02, 0.10), -0.24, 0.26)),
        roll=float(np.clip(rng.normal(0, 0.10), -0.32, 0.32)),
        zoom=float(rng.uniform(0.208, 0.248)),
        shift=(float(rng.normal(0, 0.018)), float(rng.normal(0, 0.014))),
        gaze=(float(np.clip(rng.normal(0, 0.3), -0.7, 0.7)), float(np.clip(rng.normal(0, 0.18), -0.4, 0.4))),
        skin=skin,
        skin_rgb=_tint(rng, palette.SKIN[skin], 0.035),
        hair_style=style,
        hair_color=hair_color,
        hair_rgb=_tint(rng, palette.HAIR[hair_color], 0.06),
        hair_volume=float(rng.uniform(0.75, 1.25)),
        part=float(rng.choice([-1, 1]) * rng.uniform(0.0, 0.42)),
        fringe=style in ("short", "bob", "long", "ponytail", "bun") and hat == "none" and bool(rng.random() < 0.36),
        wavy=bool(rng.random() < 0.4),
        iris=_pick(rng, {"brown": 30, "dark": 22, "blue": 16, "green": 10, "gray": 6, "hazel": 8}),
        expression=expression,
        age=age,
        freckles=skin in ("pale", "fair", "light", "olive") and bool(rng.random() < 0.28),
        beard=beard,
        glasses=glasses,
        frame_color=_pick(rng, {"black": 36, "brown": 18, "gold": 14, "red": 13, "blue": 12, "white": 7}),
        hat=hat,
        hat_color=_pick(rng, tuple(palette.CLOTH)),
        earrings=bool(rng.random() < (0.42 if soft else 0.10)) and style not in ("long", "bob") and cover != "scarf",
        lipstick=_pick(rng, tuple(palette.LIPSTICK)) if wears_lipstick else "none",
        makeup=makeup,
        cover=cover,
        cover_color=_pick(rng, tuple(palette.MASK if cover == "mask" else palette.CLOTH)),
        background=_pick(rng, BACKGROUNDS),
        background_color=backdrop,
        background_color2=_pick(rng, tuple(k for k in palette.BACKDROP if k != backdrop)),
        collar=_pick(rng, COLLARS),
        cloth_color=cloth,
        cloth_color2=_pick(rng, tuple(k for k in palette.CLOTH if k != cloth)),
        light=_pick(rng, {"soft": 40, "left": 16, "right": 16, "warm": 11, "cool": 8, "dim": 9}),
        jpeg_quality=int(np.clip(rng.normal(88, 6), 68, 96)),
    )
