"""Eyes and brows. Both sides are drawn together: few large stamps cost less than many small ones."""

from __future__ import annotations

import numpy as np

from farl.faces import palette
from farl.faces.canvas import Array, Canvas, Stamp, circle, mix, ribbon, shift
from farl.faces.features import SIDES, Eye, brow, brow_curve, eye
from farl.faces.scene import LEFT_BROW, LEFT_EYE, Scene


def paint_brows(scene: Scene, layer: Canvas) -> None:
    """Paints both brows on the unlit face."""
    t, head, shape, rng = scene.traits, scene.head, scene.traits.shape, scene.rng
    hair = np.array(t.hair_rgb, np.float32)
    if t.hair_color in ("pink", "blue", "white"):
        hair = np.array(palette.HAIR["brown"], np.float32)
    tone = mix(hair * 0.62, np.array(t.skin_rgb, np.float32) * 0.45, 0.25)
    polygons = [head.pixels_of(brow(shape, side, scene.worried)) for side in SIDES]
    for label, polygon in enumerate(polygons, LEFT_BROW):
        stamp = layer.stamp([polygon])
        layer.label(stamp, label)
    layer.paint(layer.stamp(polygons, soft=0.022 * scene.unit) * 0.78, tone)
    count = 15 if scene.unit > 30 else 8
    k = np.linspace(0, 12, count).astype(int)
    hairs = []
    for side in SIDES:
        base = brow_curve(shape, side, scene.worried)[k] + np.stack(
            [0 * k, shape.brow_thick * rng.uniform(0, 0.35, count)], 1
        )
        rise = -shape.brow_thick * (0.75 - 0.04 * k) + 0.005 * k
        tip = base + np.stack([side * rng.uniform(0.07, 0.12, count), rise], 1)
        hairs.append(
            np.stack(
                [
                    base - (0.014, 0),
                    (base + tip) / 2 - (0.011, 0),
                    tip,
                    (base + tip) / 2 + (0.011, 0),
                    shift(base, 0.014, 0),
                ],
                1,
            )
        )
    strands = head.pixels_of(np.concatenate(hairs).reshape(-1, 2)).reshape(-1, 5, 2)
    layer.paint(layer.stamp(list(strands)) * 0.55, tone * 0.7)


def paint_eyes(scene: Scene, layer: Canvas, skin: Array) -> None:
    """Paints both eyes on the unlit face; catchlights come after the light."""
    t, head, shape = scene.traits, scene.head, scene.traits.shape
    eyes = [eye(shape, side, t.gaze) for side in SIDES]
    polygons = [head.pixels_of(e.polygon) for e in eyes]
    for label, polygon in enumerate(polygons, LEFT_EYE):
        stamp = layer.stamp([polygon])
        layer.label(stamp, label)
    creases = [(e.upper[2:-1:3] - (0, 0.055 + 0.18 * shape.eye_open)).tolist() for e in eyes]
    layer.shade(scene.strokes(creases, 0.035, 0.014), (0.64, 0.50, 0.46), 0.8)
    lash_rgb = mix(skin * 0.14, (0.06, 0.04, 0.04), 0.6)
    if t.eyes_closed:
        _closed(scene, layer, eyes, lash_rgb)
        return
    white = layer.stamp(polygons)
    full = white.full(layer.size)
    iris_rgb = np.array(palette.IRIS[t.iris], np.float32)
    layer.paint(white, (0.95, 0.935, 0.925))
    corners = [(side * (shape.eye_x - shape.eye_half), 0.02) for side in SIDES]
    layer.shade(scene.spots(corners, (0.06, 0.05), 0.02).times(full), (0.92, 0.72, 0.70))

    def discs(scale: float, dy: float = 0.0, soft: float = 0.0) -> Stamp:
        centers = [(e.iris[0], e.iris[1] + dy * e.radius) for e in eyes]
        return scene.spots(centers, (scale * eyes[0].radius, scale * eyes[0].radius), soft).times(full)

    layer.paint(discs(1.0), iris_rgb * 0.42)
    layer.paint(discs(0.86, soft=0.012), iris_rgb)
    layer.paint(discs(0.55, 0.38, 0.03) * 0.7, mix(iris_rgb, (1, 0.96, 0.85), 0.42))
    layer.paint(discs(0.47), (0.03, 0.025, 0.03))
    lids = [np.concatenate([e.upper - (0, 0.05), shift(e.upper, 0, 0.052)[::-1]]) for e in eyes]
    shadow = layer.stamp([head.pixels_of(lid) for lid in lids], soft=0.022 * scene.unit).times(full)
    layer.shade(shadow, (0.50, 0.46, 0.50))
    _lashes(scene, layer, eyes, lash_rgb, skin)


def _lashes(scene: Scene, layer: Canvas, eyes: list[Eye], lash_rgb: Array, skin: Array) -> None:
    head, unit = scene.head, scene.unit
    bold = (1.5 if scene.traits.makeup else 1.0) * (1.0 if scene.traits.soft else 0.78)
    thickness = np.linspace(0.022, 0.060, 21) * unit * bold
    thickness[-3:] *= np.array([0.9, 0.7, 0.35])
    upper = [ribbon(head.pixels_of(e.upper), thickness) for e in eyes]
    if bold >= 1:
        for side, e in zip(SIDES, eyes, strict=True):
            tip = e.upper[-3:]
            flick = np.stack([tip[0], tip[-1] + (side * 0.02, -0.005), tip[-1] + (side * 0.075, -0.045 * bold)])
            upper.append(ribbon(head.pixels_of(flick), np.array([0.05, 0.04, 0.004]) * unit))
    layer.paint(layer.stamp(upper), lash_rgb)
    lower = [ribbon(head.pixels_of(e.lower[3:]), np.linspace(0.006, 0.022, 18) * unit * bold) for e in eyes]
    layer.paint(layer.stamp(lower) * 0.6, mix(lash_rgb, skin * 0.5, 0.4))


def _closed(scene: Scene, layer: Canvas, eyes: list[Eye], lash_rgb: Array) -> None:
    head, unit = scene.head, scene.unit
    shapes = []
    for side, e in zip(SIDES, eyes, strict=True):
        shapes.append(ribbon(head.pixels_of(e.lower), np.linspace(0.035, 0.06, 21) * unit))
        for k in range(8, 21, 3):
            p = e.lower[k]
            hair = np.stack([p, shift(p, side * 0.003 * (k - 8), 0.03), shift(p, side * 0.007 * (k - 6), 0.055)])
            shapes.append(ribbon(head.pixels_of(hair), np.array([0.025, 0.018, 0.006]) * unit))
    layer.paint(layer.stamp(shapes, soft=0.006 * unit) * 0.95, lash_rgb)


def paint_catchlights(scene: Scene) -> None:
    """They belong to the eye's wet surface, so they go on after the face is lit."""
    t, canvas = scene.traits, scene.canvas
    if t.eyes_closed or t.glasses == "sunglasses":
        return
    offset = np.array([0.045 * np.sign(scene.light.direction[0]), -0.045], np.float32)
    bright = 0.95 if t.light != "dim" else 0.6
    eyes = [eye(t.shape, side, t.gaze) for side in SIDES]
    clip = canvas.stamp([scene.head.pixels_of(e.polygon) for e in eyes]).full(canvas.size)
    for by, radius, strength in ((offset, 0.034, 1.0), (-0.9 * offset, 0.018, 0.5)):
        dots = [scene.head.pixels_of(circle(e.iris + by, radius, 12)) for e in eyes]
        canvas.paint(canvas.stamp(dots).times(clip) * (strength * bright), (1, 1, 1))
