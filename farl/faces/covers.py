"""What lies over a face: a mask, a scarf, a hand, a beam of sun."""

from __future__ import annotations

import numpy as np

from farl.faces import palette
from farl.faces.canvas import Array, circle, mix, ribbon, shift, spline
from farl.faces.features import SIDES
from farl.faces.scene import BACKGROUND, Scene


def paint_cover(scene: Scene) -> None:
    """Paints what lies over the face, if anything; call last."""
    painter = {"mask": _mask, "scarf": _scarf, "hand": _hand, "sun": _sun}.get(scene.traits.cover)
    if painter:
        painter(scene)


def _mask(scene: Scene) -> None:
    t, head, canvas, unit = scene.traits, scene.head, scene.canvas, scene.unit
    rgb = np.array(palette.MASK[t.cover_color], np.float32)
    chin = head.chin
    side = [
        (0, t.shape.nose_y - 0.26),
        (0.2, t.shape.nose_y - 0.17),
        (0.52, t.shape.nose_y - 0.10),
        (0.88, t.shape.nose_y - 0.02),
    ]
    side += [(0.83, 0.85), (0.62, chin - 0.18), (0.34, chin - 0.01), (0, chin + 0.03)]
    half = spline(side, 34)
    outline = head.pixels_of(np.concatenate([half, half[::-1] * (-1, 1)]), above=0.05)
    canvas.shade(canvas.stamp([shift(outline, 0, 0.06 * unit)], soft=0.05 * unit), (0.7, 0.6, 0.58))
    width = float(head.half_width(np.array([0.2]))[0])
    for s in SIDES:
        if scene.pose.yaw * s < 0.2:
            for y0, y1 in ((t.shape.nose_y - 0.02, 0.02), (0.86, 0.40)):
                a = head.view_of([(s * 0.86, y0)], above=0.05)[0]
                b = scene.pose.view([[s * (width + 0.06), y1, -0.05]])[0]
                canvas.paint(
                    canvas.stamp([ribbon(scene.at(np.stack([a, (a + b) / 2, b])), 0.035 * unit)]),
                    np.clip(rgb * 0.95, 0, 1),
                    label=BACKGROUND,
                )
    stamp = canvas.stamp([outline])
    middle = head.pixels_of([(0, 0.78)])[0]
    shade = scene.light.ball(stamp, middle, (1.0 * unit, 0.95 * unit), flat=0.2)
    canvas.paint(stamp, np.clip(rgb * shade, 0, 1), label=BACKGROUND)
    clip = stamp.full(canvas.size)
    for y in (0.62, 0.80, 0.98):
        fold = head.pixels_of([(x, y + 0.05 * (1 - x * x)) for x in np.linspace(-0.84, 0.84, 16)], above=0.05)
        canvas.shade(canvas.stamp([ribbon(fold, 0.04 * unit)], soft=0.015 * unit).times(clip), (0.80, 0.80, 0.84))


def _scarf(scene: Scene) -> None:
    t, canvas, unit, rng = scene.traits, scene.canvas, scene.unit, scene.rng
    rgb = np.array(palette.CLOTH[t.cover_color], np.float32)
    top = scene.head.view_of([(x, 0.60 + 0.14 * x * x) for x in np.linspace(-0.94, 0.94, 24)], above=0.10)
    x, y = top[12]
    width = scene.skull_radius[0]
    top[0], top[-1] = (scene.skull[0] - width - 0.12, 0.62), (scene.skull[0] + width + 0.12, 0.62)
    bottom = np.stack([np.linspace(x - 1.15, x + 1.15, 24), y + 1.18 - 0.25 * np.linspace(-1, 1, 24) ** 2], 1)
    outline = scene.at(np.concatenate([top, bottom[::-1]]).astype(np.float32))
    canvas.shade(canvas.stamp([outline - (0, 0.05 * unit)], soft=0.05 * unit), (0.68, 0.58, 0.56))
    stamp = canvas.stamp([outline])
    shade = scene.light.ball(stamp, scene.at(mix(top[12], bottom[12], 0.4)), (1.45 * unit, 1.5 * unit), flat=0.2)
    canvas.paint(stamp, np.clip(rgb * shade, 0, 1), label=BACKGROUND)
    clip = stamp.full(canvas.size)
    for level in (0.13, 0.32, 0.5, 0.68, 0.86):
        sway = 0.10 * np.sin(np.linspace(0, 3.1, 24) + rng.uniform(0, 6))
        curve = scene.at(mix(top, bottom, np.clip(level + sway, 0, 1)[:, None]))
        canvas.shade(canvas.stamp([ribbon(curve, 0.11 * unit)], soft=0.05 * unit).times(clip), (0.66, 0.64, 0.68))
        canvas.shade(
            canvas.stamp([ribbon(curve - (0, 0.10 * unit), 0.06 * unit)], soft=0.04 * unit).times(clip),
            (1.18, 1.18, 1.16),
        )


def _hand(scene: Scene) -> None:
    """A hand laid against one cheek, fingers up."""
    t, canvas, unit = scene.traits, scene.canvas, scene.unit
    side = 1 if scene.pose.yaw <= 0 else -1
    skin = np.array(t.skin_rgb, np.float32)
    heel = scene.at(scene.head.view_of([(side * 0.60, scene.head.chin - 0.12)]))[0]
    up = np.array([np.sin(scene.pose.roll), -np.cos(scene.pose.roll)], np.float32)
    out = np.array([-up[1], up[0]], np.float32) * side

    def spot(a: float, b: float) -> Array:
        return heel + (a * out + b * up) * unit

    wrist = ribbon(spline([spot(0.55, -1.7), spot(0.32, -0.8), spot(0.2, 0.0)], 12), np.linspace(0.62, 0.58, 12) * unit)
    fingers = [
        [spot(a, 0.0), spot(a + 0.02, 0.35), spot(a * 1.08 + 0.02, length)]
        for a, length in ((-0.10, 0.58), (0.09, 0.70), (0.28, 0.72), (0.46, 0.60))
    ]
    palm = circle(spot(0.18, -0.05), 0.36 * unit)
    rods = []
    for path in fingers:
        rods += [ribbon(spline(path, 10), 0.185 * unit), circle(path[2], 0.092 * unit, 16)]
    shapes = [wrist, palm, *rods]
    offset = np.array([-0.07 * scene.light.direction[0] - 0.04 * side, 0.05], np.float32) * unit
    canvas.shade(canvas.stamp([p + offset for p in shapes], soft=0.06 * unit), (0.64, 0.52, 0.50))
    stamp = canvas.stamp(shapes)
    shade = scene.light.ball(stamp, spot(0.2, 0.0), (0.85 * unit, 1.3 * unit), flat=0.35)
    canvas.paint(stamp, np.clip(skin * (1.02, 0.96, 0.94) * shade, 0, 1), label=BACKGROUND)
    clip = stamp.full(canvas.size)
    for a in (0.0, 0.19, 0.375):
        crease = spline([spot(a, 0.0), spot(a + 0.015, 0.35), spot(a * 1.06 + 0.01, 0.60)], 8)
        canvas.shade(canvas.stamp([ribbon(crease, 0.035 * unit)], soft=0.02 * unit).times(clip), (0.66, 0.52, 0.48))
    for path in fingers:
        nail = circle(path[2] + 0.02 * unit * up, 0.052 * unit, 14)
        canvas.paint(canvas.stamp([nail], soft=0.015 * unit) * 0.7, np.clip(mix(skin, (1, 0.82, 0.8), 0.55), 0, 1))


def _sun(scene: Scene) -> None:
    """A spot of hard light across the picture; it covers nothing, so labels stay."""
    size, rng = scene.canvas.size, scene.rng
    slope = rng.uniform(-0.5, 0.5) * size
    x = rng.uniform(0.1, 0.6) * size
    width = rng.uniform(0.18, 0.3) * size
    beam = np.array([(x, -2), (x + width, -2), (x + width + slope, size + 2), (x + slope, size + 2)], np.float32)
    scene.canvas.shade(scene.canvas.stamp([beam], soft=size / 60), (1.42, 1.34, 1.14))
