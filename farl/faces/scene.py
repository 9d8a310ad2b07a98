"""What every painter needs: the traits, the posed head, the light, the canvas and a random stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from farl.faces.canvas import Array, Canvas, Stamp, circle, ribbon, spline
from farl.faces.geometry import Head, Pose
from farl.faces.light import Light, make_light, roll_normals
from farl.faces.traits import Traits

BACKGROUND, SKIN, LEFT_BROW, RIGHT_BROW, LEFT_EYE, RIGHT_EYE = range(6)
TAPER = np.sin(np.linspace(0.15, np.pi - 0.15, 10)).astype(np.float32)
NOSE, UPPER_LIP, INNER_MOUTH, LOWER_LIP, HAIR = range(6, 11)


@dataclass
class Scene:
    """One picture in the making."""

    traits: Traits
    canvas: Canvas
    head: Head
    light: Light
    rng: np.random.Generator

    @property
    def pose(self) -> Pose:
        return self.head.pose

    @property
    def unit(self) -> float:
        """Pixels in one head unit."""
        return self.head.pose.scale

    @property
    def worried(self) -> float:
        """How far the brows rise inwards, 0..1."""
        return 1.0 if self.traits.expression == "sad" else 0.0

    @cached_property
    def skull(self) -> Array:
        """Centre of the skull in view coordinates."""
        return self.pose.view([[0.0, -0.30, -0.22]])[0]

    @cached_property
    def skull_radius(self) -> tuple[float, float]:
        """Half width and height of the skull as seen, in view coordinates."""
        turn = abs(self.pose.yaw)
        return float(np.hypot(np.cos(turn), 1.16 * np.sin(turn)) * self.head.shape.width), 1.13

    @cached_property
    def outline(self) -> Array:
        """Silhouette of the head in pixels."""
        return self.pose.pixels(self.head.outline())

    @cached_property
    def face_stamp(self) -> Stamp:
        """Coverage of the head."""
        return self.canvas.stamp([self.outline])

    def lit(self, rgb: tuple[float, float, float] | Array, normal: tuple[float, float, float]) -> Array:
        """A colour under the light on a surface with this normal (head axes)."""
        direction = np.asarray(normal, np.float32)
        turned = (direction / np.linalg.norm(direction)) @ self.pose.rotation.T
        return np.asarray(rgb, np.float32) * self.light.shade(roll_normals(turned, self.pose.roll))

    def spots(self, centers: Sequence[Sequence[float]], radius: tuple[float, float], soft: float) -> Stamp:
        """Soft ellipses at frontal points; `radius` and `soft` in head units."""
        shapes = [self.head.pixels_of(circle(center, radius, 18)) for center in centers]
        return self.canvas.stamp(shapes, soft=soft * self.unit)

    def strokes(self, paths: Sequence[Sequence[Sequence[float]]], width: float, soft: float) -> Stamp:
        """Tapering soft lines along frontal points; `width` and `soft` in head units."""
        curves = [self.head.pixels_of(spline(path, 10)) for path in paths]
        return self.canvas.stamp(
            [ribbon(curve, TAPER * (width * self.unit)) for curve in curves], soft=soft * self.unit
        )

    def at(self, view: Array) -> Array:
        """View coordinates -> pixels."""
        return self.pose.pixels(view)


def make_scene(traits: Traits, size: int, rng: np.random.Generator) -> Scene:
    """Poses the head of `traits` on an empty canvas of `size` pixels and lights it."""
    center = (size * (0.5 + traits.shift[0] - 0.09 * traits.yaw), size * (0.475 + traits.shift[1]))
    pose = Pose(traits.yaw, traits.pitch, traits.roll, traits.zoom * size, center)
    return Scene(traits, Canvas(size), Head(traits.shape, pose), make_light(traits.light, rng), rng)
