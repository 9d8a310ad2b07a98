"""A small anti-aliased canvas: polygons become coverage stamps, stamps paint colour and class labels.

Image and label map come from the same stamps: the image blends with the fractional coverage, the label of a pixel
changes where a stamp covers at least half of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFilter

Array = NDArray[np.floating]
PixelT = TypeVar("PixelT", bound=np.generic)
SUPERSAMPLE = 3


@dataclass
class Stamp:
    """Coverage `alpha` float32 [h, w] in 0..1 of the canvas window rows x cols."""

    rows: slice
    cols: slice
    alpha: Array

    def __mul__(self, factor: float | Array) -> Stamp:
        return Stamp(self.rows, self.cols, self.alpha * np.float32(factor))

    def window(self, full: NDArray[PixelT]) -> NDArray[PixelT]:
        """The part of a full-canvas array [S, S, ...] under this stamp."""
        return full[self.rows, self.cols]

    def times(self, full: Array) -> Stamp:
        """This stamp with its coverage multiplied by a full-canvas map [S, S]."""
        return Stamp(self.rows, self.cols, self.alpha * self.window(full))

    def full(self, size: int) -> Array:
        """The coverage on the full canvas, float32 [size, size]."""
        out = np.zeros((size, size), np.float32)
        out[self.rows, self.cols] = self.alpha
        return out


class Canvas:
    """Square float image [S, S, 3] (sRGB, 0..1) and label map uint8 [S, S]."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.image: Array = np.zeros((size, size, 3), np.float32)
        self.labels = np.zeros((size, size), np.uint8)

    def stamp(self, polygons: Sequence[Array], *, cut: Sequence[Array] = (), soft: float = 0.0) -> Stamp:
        """Coverage of the union of closed polygons [n, 2] (pixel edges, x right, y down) minus those in `cut`.

        `soft` is the radius of a Gaussian blur in pixels. An empty or invisible shape gives an empty stamp.
        """
        drawer = Drawer(self.size, polygons, pad=1.0 + 2.5 * soft)
        if drawer.empty:
            return drawer.stamp()
        for polygon in polygons:
            drawer.polygon(polygon, 255)
        for polygon in cut:
            drawer.polygon(polygon, 0)
        return drawer.stamp(soft)

    def paint(self, stamp: Stamp, color: ArrayLike, *, label: int | None = None) -> None:
        """Blends `color` ([3], a window [h, w, 3] or the full [S, S, 3]) into the image where the stamp covers."""
        target = self.image[stamp.rows, stamp.cols]
        if not target.size:
            return
        source = np.asarray(color, np.float32)
        if source.ndim == 3 and source.shape[0] == self.size and target.shape[:2] != source.shape[:2]:
            source = source[stamp.rows, stamp.cols]
        target += stamp.alpha[..., None] * (source - target)
        if label is not None:
            self.label(stamp, label)

    def label(self, stamp: Stamp, label: int) -> None:
        """Gives the stamp's pixels a class without painting them."""
        stamp.window(self.labels)[stamp.alpha >= 0.5] = label

    def shade(self, stamp: Stamp, color: ArrayLike, strength: float = 1.0) -> None:
        """Multiplies the image by `color` where the stamp covers (shadows below 1, light above)."""
        target = self.image[stamp.rows, stamp.cols]
        factor = np.asarray(color, np.float32) - 1
        target *= 1 + strength * stamp.alpha[..., None] * factor


class Drawer:
    """Draws grey polygons at SUPERSAMPLE times the canvas resolution inside the bounding box of `polygons`."""

    def __init__(self, size: int, polygons: Sequence[Array], *, pad: float = 1.0, background: int = 0) -> None:
        points = np.concatenate(list(polygons)) if len(polygons) else np.zeros((1, 2), np.float32) - 1e6
        left, top = (min(max(int(v - pad), 0), size) for v in points.min(0).tolist())
        right, bottom = (min(max(int(v + pad) + 1, 0), size) for v in points.max(0).tolist())
        self.origin, self.shape = np.array([left, top]), (max(right - left, 0), max(bottom - top, 0))
        self.empty = 0 in self.shape
        extent = (1, 1) if self.empty else (self.shape[0] * SUPERSAMPLE, self.shape[1] * SUPERSAMPLE)
        self.image = Image.new("L", extent, background)
        self.draw = ImageDraw.Draw(self.image)

    def coordinates(self, points: Array) -> list[float]:
        # Pillow takes the corners of polygons as pixel edges, the boxes of ellipses as pixel centres.
        return ((points - self.origin) * SUPERSAMPLE).ravel().tolist()

    def polygon(self, points: Array, value: int) -> None:
        self.draw.polygon(self.coordinates(points), fill=value)

    def line(self, points: Array, value: int, width: float) -> None:
        self.draw.line(self.coordinates(points), fill=value, width=max(1, round(width * SUPERSAMPLE)), joint="curve")

    def circle(self, center: Array, radius: float, value: int) -> None:
        x, y = ((center - self.origin) * SUPERSAMPLE - 0.5).tolist()
        radius *= SUPERSAMPLE
        self.draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=value)

    def stamp(self, soft: float = 0.0) -> Stamp:
        rows = slice(int(self.origin[1]), int(self.origin[1] + self.shape[1]))
        cols = slice(int(self.origin[0]), int(self.origin[0] + self.shape[0]))
        if self.empty:
            return Stamp(slice(0, 0), slice(0, 0), np.zeros((0, 0), np.float32))
        small = self.image.reduce(SUPERSAMPLE)
        if soft > 0:
            small = small.filter(ImageFilter.GaussianBlur(soft))
        alpha = np.frombuffer(small.tobytes(), np.uint8) * np.float32(1 / 255)
        return Stamp(rows, cols, alpha.reshape(self.shape[1], self.shape[0]))


@lru_cache(maxsize=256)
def _spline_basis(count: int, samples: int, closed: bool) -> Array:
    """Catmull-Rom weights [samples, count]."""
    position = np.linspace(0, count if closed else count - 1, samples, endpoint=not closed)
    segment = np.minimum(position.astype(int), count - (1 if closed else 2))
    t = position - segment
    weights = np.stack(
        [
            -0.5 * t + t**2 - 0.5 * t**3,
            1 - 2.5 * t**2 + 1.5 * t**3,
            0.5 * t + 2 * t**2 - 1.5 * t**3,
            -0.5 * t**2 + 0.5 * t**3,
        ],
        1,
    )
    basis = np.zeros((samples, count), np.float32)
    for offset in range(4):
        index = segment + offset - 1
        index = index % count if closed else np.clip(index, 0, count - 1)
        np.add.at(basis, (np.arange(samples), index), weights[:, offset])
    return basis


def spline(points: ArrayLike, samples: int = 24, *, closed: bool = False) -> Array:
    """A smooth curve [samples, d] through control points [n, d] (Catmull-Rom)."""
    control = np.asarray(points, np.float32)
    return _spline_basis(len(control), samples, closed) @ control


def ribbon(curve: Array, width: ArrayLike) -> Array:
    """A closed polygon [2n, 2] around a curve [n, 2] with the full width [n] at each point."""
    step = np.empty_like(curve)
    step[1:-1] = curve[2:] - curve[:-2]
    step[0], step[-1] = curve[1] - curve[0], curve[-1] - curve[-2]
    length = np.sqrt((step * step).sum(1)) + 1e-6
    normal = step[:, ::-1] * (np.asarray(width, np.float32) / (2 * length))[:, None]
    normal[:, 0] *= -1
    return np.concatenate([curve + normal, (curve - normal)[::-1]]).astype(np.float32)


def circle(center: ArrayLike, radius: ArrayLike, samples: int = 28) -> Array:
    """Points [samples, 2] of a circle or an axis-aligned ellipse."""
    return np.asarray(center, np.float32) + _unit_circle(samples) * np.asarray(radius, np.float32)


@lru_cache(maxsize=32)
def _unit_circle(samples: int) -> Array:
    angle = np.linspace(0, 2 * np.pi, samples, endpoint=False)
    return np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)


def shift(points: Array, x: float, y: float) -> Array:
    """Points [n, 2] moved by (x, y)."""
    return points + np.array((x, y), np.float32)


def mix(a: ArrayLike, b: ArrayLike, t: ArrayLike) -> Array:
    """a + t (b - a) in float32."""
    first = np.asarray(a, np.float32)
    return first + np.asarray(t, np.float32) * (np.asarray(b, np.float32) - first)
