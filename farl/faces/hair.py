"""Hair: locks between two boundary curves, and curls.

Curves are in view coordinates. A lock runs from its roots (first points) to its tips; strands follow the blend of its
two sides, so that hair flows along the outline of the style.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from farl.faces.canvas import Array, Drawer, Stamp, mix, shift, spline
from farl.faces.scene import HAIR, Scene

STEPS = 15


@dataclass(frozen=True)
class Look:
    """How a lock is drawn. `ragged`: how far tips differ (share of the length); `wave`: sideways swing in units."""

    strands: int = 26
    ragged: float = 0.03
    wave: float = 0.0
    shine: float = 0.30  # where along the lock the light catches
    gloss: float = 0.55
    dark: float = 1.0


def smooth(points: ArrayLike) -> Array:
    """A curve of STEPS points through control points."""
    return spline(np.asarray(points, np.float32), STEPS)


class HairPainter:
    """Paints the locks of one person and remembers their coverage for the shadow on the face."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.rgb = np.array(scene.traits.hair_rgb, np.float32)
        light = scene.light
        self.base = self.rgb * light.shade(np.array([0.0, -0.35, 0.93], np.float32))
        self.shadow = self.rgb * (0.42, 0.38, 0.40) * light.fill**0.2
        self.gleam = np.clip(mix(self.base * 1.45 + 0.05, light.key**0.5, 0.30), 0, 1)
        self.shade_front = scene.rng.uniform(0.9, 1.05)

    def lock(self, first: Array, second: Array, look: Look | None = None, *, label: int = HAIR) -> None:
        """Paints the hair between two sides, view coordinates [STEPS, 2] from the roots to the tips."""
        look = look or Look()
        scene, rng = self.scene, self.scene.rng
        strands = max(4, int(look.strands * min(scene.canvas.size / 160, 1.6)))
        k = np.linspace(0, 1, strands + 1, dtype=np.float32)[:, None, None]
        grid = first * (1 - k) + second * k
        t = np.linspace(0, 1, grid.shape[1], dtype=np.float32)
        length = 1 + look.ragged * rng.uniform(-1, 1, strands + 1).astype(np.float32)[:, None, None]
        grid = grid[:, :1] + (grid - grid[:, :1]) * length
        if look.wave:
            phase = rng.uniform(0, 6.3) + 1.3 * k[:, :, 0] + rng.normal(0, 0.25, (strands + 1, 1))
            grid[..., 0] += look.wave * np.sin(t * 11 + phase) * np.minimum(t * 3, 1)
        pixels = scene.at(grid.astype(np.float32))
        outline = np.concatenate([pixels[0], pixels[1:-1, -1], pixels[-1, ::-1], pixels[-2:0:-1, 0]])
        drawer = Drawer(scene.canvas.size, [outline], background=110)
        stamp = scene.canvas.stamp([outline])
        if drawer.empty:
            return
        tones = rng.normal(0, 1, strands)
        tones = np.clip(
            112 + 30 * (tones * 0.7 + 0.7 * np.sin(np.linspace(0, rng.uniform(8, 15), strands) + rng.uniform(0, 6))),
            20,
            215,
        )
        for i in np.argsort(tones):
            drawer.polygon(np.concatenate([pixels[i], pixels[i + 1, ::-1]]), int(tones[i]))
        band = Drawer(scene.canvas.size, [outline], background=0)
        along = np.exp(-(((t - look.shine) / 0.13) ** 2)) + 0.45 * np.exp(-(((t - look.shine - 0.42) / 0.10) ** 2))
        for j in np.flatnonzero(along[1:] + along[:-1] > 0.04).tolist():
            quad = np.concatenate([pixels[:, j], pixels[::-1, j + 1]])
            band.polygon(quad, int(255 * min((along[j] + along[j + 1]) / 2, 1)))
        self._tone(stamp, drawer.stamp().alpha, band.stamp(soft=0.03 * scene.unit).alpha, look, label)

    def _tone(self, stamp: Stamp, tone: Array, band: Array, look: Look, label: int) -> None:
        tone = (tone - 110 / 255)[..., None] * 2.2
        side = self.roundness(stamp)
        color = self.base * look.dark * side
        color = (
            color
            + np.minimum(tone, 0) * (color - self.shadow * look.dark)
            + np.maximum(tone, 0) * (self.gleam - color) * 0.35
        )
        shine = (band[..., None] * (0.55 + 0.9 * tone)).clip(0, 1) * look.gloss
        color = color + shine * (self.gleam - color) * np.clip(side, 0, 1)
        self.scene.canvas.paint(stamp, np.clip(color, 0, 1), label=label)

    def roundness(self, stamp: Stamp) -> Array:
        """Light on the head as a ball, so that the side away from the light is darker."""
        scene = self.scene
        rx, ry = scene.skull_radius
        center = scene.at(shift(scene.skull, 0, 0.25))
        shade = scene.light.ball(stamp, center, (1.35 * rx * scene.unit, 1.75 * ry * scene.unit), flat=0.25)
        return 0.25 + 0.75 * shade / scene.light.shade(np.array([0.0, -0.35, 0.93], np.float32))

    def curls(self, centers: Array, radius: Array, *, label: int = HAIR) -> None:
        """Small shaded coils at view coordinates [n, 2]."""
        scene, rng = self.scene, self.scene.rng
        pixels, r = scene.at(centers), radius * scene.unit
        corners = np.concatenate([pixels - r[:, None], pixels + r[:, None]])
        cover, tone = Drawer(scene.canvas.size, [corners]), Drawer(scene.canvas.size, [corners], background=40)
        if cover.empty:
            return
        toward = np.array([scene.light.direction[0], scene.light.direction[1]], np.float32) * 0.30
        for p, q in zip(pixels, r, strict=True):
            cover.circle(p, float(q), 255)
            shade = int(rng.integers(70, 125))
            tone.circle(p, float(q), int(shade * 0.55))
            tone.circle(p + toward * q * 0.6, float(q) * 0.80, shade)
            tone.circle(p + toward * q * 1.1, float(q) * 0.48, min(shade + 45, 255))
            tone.circle(p + toward * q * 0.9, float(q) * 0.24, int(shade * 0.7))
        stamp = cover.stamp()
        self._tone(stamp, tone.stamp(soft=0.012 * scene.unit).alpha, np.zeros_like(stamp.alpha), Look(), label)

    # Outlines shared by the styles.

    def crown(self, volume: float | Array, start: float, stop: float) -> Array:
        """Arc over the skull in view coordinates; angles in degrees from the top, positive to the right."""
        rx, ry = self.scene.skull_radius
        angle = np.radians(np.linspace(start, stop, STEPS))
        lift = 0.9 + 0.25 * np.cos(angle)
        x, y = (rx + volume * 0.8) * np.sin(angle), -(ry + volume * lift) * np.cos(angle)
        return (self.scene.skull + np.stack([x, y], 1)).astype(np.float32)

    def on_face(self, points: list[tuple[float, float]], above: float = 0.02) -> Array:
        return self.scene.head.view_of(spline(points, STEPS), above=above)
