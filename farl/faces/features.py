"""Curves of the face features on the frontal plane, and the 68 landmarks that lie on them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from farl.faces.canvas import Array, ribbon, spline
from farl.faces.geometry import RIM, Head, HeadShape

SIDES = (-1, 1)  # left and right as seen in the picture


@dataclass(frozen=True)
class Eye:
    """Lid curves [n, 2] from the inner to the outer corner, and the iris centre and radius."""

    upper: Array
    lower: Array
    iris: Array
    radius: float

    @property
    def polygon(self) -> Array:
        return np.concatenate([self.upper, self.lower[::-1]])


def eye(shape: HeadShape, side: int, gaze: tuple[float, float] = (0, 0)) -> Eye:
    """The eye of one side, open as `shape.eye_open` says; `gaze` moves the iris, -1..1 both ways."""
    s = np.linspace(-1, 1, 21, dtype=np.float32)  # inner -> outer
    base = 0.015 - 0.5 * (s + 1) * shape.eye_tilt
    arch = (1 - np.abs(s) ** 2.2) * (1 + 0.12 * s)
    opening = max(shape.eye_open, 0.0)
    closed = max(0.0, 1 - opening / 0.05)
    rise = (0.95 * opening) * arch - 0.055 * closed * (1 - s**2)
    drop = 0.55 * opening * (1 - np.abs(s) ** 2.4) + (0.022 + 0.055) * closed * (1 - s**2)
    x = side * (shape.eye_x + s * shape.eye_half)
    radius = 0.128
    iris = np.array([side * shape.eye_x + 0.075 * gaze[0], 0.0 + 0.045 * gaze[1]], np.float32)
    return Eye(np.stack([x, base - rise], 1), np.stack([x, base + drop], 1), iris, radius)


def brow_curve(shape: HeadShape, side: int, worried: float = 0.0) -> Array:
    """Centre line [16, 2] from the inner to the outer end."""
    s = np.linspace(0, 1, 16, dtype=np.float32)
    x = shape.eye_x - 0.25 + 0.56 * s
    arch = shape.brow_arch * np.sin(np.pi * np.clip(s * 0.85 + 0.08, 0, 1))
    y = shape.brow_y - shape.brow_raise - arch + 0.05 * s**3 + worried * (0.09 * s - 0.07)
    return np.stack([side * x, y], 1)


def brow(shape: HeadShape, side: int, worried: float = 0.0) -> Array:
    """Outline [32, 2] of a brow."""
    curve = brow_curve(shape, side, worried)
    s = np.linspace(0, 1, len(curve), dtype=np.float32)
    return ribbon(curve, shape.brow_thick * (0.82 + 0.4 * s - 1.02 * s**2.2 + 0.08))


def nose_side(shape: HeadShape, side: int) -> Array:
    """Outline [n, 2] of one side from the bridge to the middle of the base."""
    w, y = shape.nose_width, shape.nose_y
    points = [
        (0.085, -0.10),
        (0.08, 0.1),
        (0.105, 0.27),
        (w * 0.93, y - 0.11),
        (w * 1.05, y - 0.03),
        (w * 0.9, y + 0.045),
    ]
    points += [(0.075, y + 0.07), (0.0, y + 0.085)]
    return spline([(side * px, py) for px, py in points], 26)


def nose_ridge(shape: HeadShape) -> Array:
    """[n, 2] from the bridge to the tip and the base."""
    y = np.concatenate([np.linspace(-0.02, shape.nose_y - 0.08, 12), [shape.nose_y + 0.085]])
    return np.stack([np.zeros_like(y), y], 1).astype(np.float32)


@dataclass(frozen=True)
class Mouth:
    """Four curves [n, 2] from the left to the right corner; the inner pair meet when the mouth is shut."""

    upper: Array
    upper_inner: Array
    lower_inner: Array
    lower: Array

    @property
    def upper_lip(self) -> Array:
        return np.concatenate([self.upper, self.upper_inner[::-1]])

    @property
    def lower_lip(self) -> Array:
        return np.concatenate([self.lower_inner, self.lower[::-1]])

    @property
    def inside(self) -> Array:
        return np.concatenate([self.upper_inner, self.lower_inner[::-1]])


def mouth(shape: HeadShape) -> Mouth:
    """The lips with the expression of `shape`."""
    s = np.linspace(-1, 1, 33, dtype=np.float32)
    x = shape.mouth_half * s
    gap, wide = shape.open_mouth, shape.smile
    line = shape.mouth_y - 0.10 * wide * s**2 + 0.02 * wide
    bulge = np.clip(1 - s**2, 0, 1)
    upper_inner = line - 0.22 * gap * bulge**0.8 * (1 - 0.55 * max(wide, 0))
    lower_inner = line + gap * bulge**0.7 * (1 + 0.15 * max(wide, 0))
    thin = 1 - 0.22 * max(wide, 0)
    bow = (1 - np.abs(s) ** 1.5) * (1 - 0.30 * np.exp(-((s / 0.17) ** 2)))
    upper = upper_inner - shape.lip * thin * 1.02 * bow
    lower = lower_inner + shape.lip * thin * 1.35 * bulge**0.75
    return Mouth(*(np.stack([x, y], 1) for y in (upper, upper_inner, lower_inner, lower)))


def _at(curve: Array, fractions: list[float]) -> Array:
    position = np.asarray(fractions) * (len(curve) - 1)
    low = np.minimum(position.astype(int), len(curve) - 2)
    t = (position - low)[:, None]
    return curve[low] * (1 - t) + curve[low + 1] * t


def landmarks(head: Head, worried: float = 0.0) -> Array:
    """68 landmarks in the iBUG order, float32 [68, 2] in view coordinates.

    The jaw runs along the rim of the face; on the side that turns away it follows the visible limb, as annotators mark
    it.
    """
    shape = head.shape
    y = np.linspace(0.06, 1, 9)
    y = head.chin * (y**0.85) * 0.995
    rim = head.half_width(y) * np.sin(RIM)
    rim[-1] = 0.0
    jaw = np.concatenate([np.stack([-rim, y], 1), np.stack([rim[:-1], y[:-1]], 1)[::-1]])
    fifths = [0.04, 0.27, 0.5, 0.73, 0.96]
    left, right = brow_curve(shape, -1, worried), brow_curve(shape, 1, worried)
    base = [_at(nose_side(shape, -1), [0.82, 0.92]), _at(nose_side(shape, 1), [0.92, 0.82])]
    bottom = np.array([[0, shape.nose_y + 0.07]])
    ridge = np.stack([np.zeros(4), np.linspace(-0.02, shape.nose_y - 0.08, 4)], 1)
    eyes = []
    for side in SIDES:
        e = eye(shape, side)
        up, low = _at(e.upper, [0, 0.33, 0.67, 1]), _at(e.lower, [0.33, 0.67])
        # The left eye of the picture starts at its outer corner, the right one at its inner corner.
        eyes.append(np.concatenate([up[::-1], low]) if side < 0 else np.concatenate([up, low[::-1]]))
    m = mouth(shape)
    sixths = [0, 0.19, 0.385, 0.5, 0.615, 0.81, 1]
    outer = np.concatenate([_at(m.upper, sixths), _at(m.lower, [0.81, 0.64, 0.5, 0.36, 0.19])])
    inner = np.concatenate([_at(m.upper_inner, [0.08, 0.3, 0.5, 0.7, 0.92]), _at(m.lower_inner, [0.7, 0.5, 0.3])])
    frontal = np.concatenate([jaw, _at(left, fifths)[::-1], _at(right, fifths), ridge, base[0], bottom, base[1]])
    return head.view_of(np.concatenate([frontal, *eyes, outer, inner])).astype(np.float32)
