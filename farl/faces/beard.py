"""Beards and moustaches: a soft base and short strokes over it."""

from __future__ import annotations

import numpy as np

from farl.faces import palette
from farl.faces.canvas import Array, Canvas, Drawer, mix, spline
from farl.faces.scene import Scene


def paint_beard(scene: Scene, layer: Canvas) -> None:
    """Paints the beard, if any, on the unlit face."""
    t, rng, unit = scene.traits, scene.rng, scene.unit
    if t.beard == "none":
        return
    dyed = t.hair_color in ("pink", "blue")
    tone = np.array(palette.HAIR["dark brown"] if dyed else t.hair_rgb, np.float32) * 0.92
    polygons = [scene.head.pixels_of(p) for p in _outlines(scene)]
    stubble = t.beard == "stubble"
    stamp = layer.stamp(polygons, soft=(0.09 if stubble else 0.035) * unit)
    if not stamp.alpha.size:
        return
    layer.paint(stamp * (0.42 if stubble else 0.93), mix(tone, t.skin_rgb, 0.25) if stubble else tone)

    strokes = Drawer(layer.size, polygons, background=128)
    corners = np.concatenate(polygons)
    low, high = corners.min(0), corners.max(0)
    count = int(3.2 * float(np.prod(high - low)) / (0.09 * unit) ** 2 * 0.3)
    start = rng.uniform(0, 1, (min(count, 260), 2)) * (high - low) + low
    way = start - scene.head.pixels_of([(0, t.shape.nose_y)])
    way = way / (np.sqrt((way * way).sum(1, keepdims=True)) + 1e-3) + (0, 0.8)
    lines = np.concatenate([start, start + way * 0.09 * unit], 1).reshape(-1, 2, 2)
    for line, value in zip(lines, rng.integers(60, 210, len(lines)).tolist(), strict=True):
        strokes.line(line, value, 0.02 * unit)
    drawn = strokes.stamp()
    texture = (drawn.alpha - 0.5) * drawn.window(stamp.full(layer.size)) * (1.0 if stubble else 2.0)
    window = drawn.window(layer.image)
    window += texture[..., None] * (0.10 + 0.22 * tone)
    np.clip(window, 0, 1, out=window)


def _outlines(scene: Scene) -> list[Array]:
    """Frontal outlines."""
    t, head, shape = scene.traits, scene.head, scene.traits.shape
    mouth, chin, mirror = shape.mouth_y - 0.02, head.chin, np.array([-1, 1], np.float32)
    if t.beard in ("mustache", "goatee"):
        reach = shape.mouth_half + (0.06 if t.beard == "mustache" else 0.02)
        top = shape.nose_y + 0.13
        lip = [(0, top), (0.16, top + 0.02), (reach * 0.75, mouth - 0.06), (reach, mouth + 0.05)]
        half = spline([*lip, (reach * 0.7, mouth + 0.01), (0.1, mouth - 0.035), (0, mouth - 0.04)], 26)
        outlines = [np.concatenate([half, half[::-1] * mirror])]
        if t.beard == "goatee":
            low = mouth + 0.24 + shape.open_mouth
            outer = [
                (reach, mouth - 0.02),
                (reach + 0.03, mouth + 0.16),
                (0.33, low + 0.1),
                (0.24, chin),
                (0, chin + 0.1),
            ]
            inner = [(0, low), (0.14, low), (reach - 0.08, mouth + 0.2), (reach - 0.09, mouth)]
            half = np.concatenate([spline(outer, 16), spline(inner, 10)])
            outlines += [half, half * mirror]
        return outlines
    y = np.linspace(0.15, 1, 12) ** 0.9 * (chin + 0.1)
    rim = np.stack([head.half_width(np.minimum(y, chin)) * 1.1 + 0.05, y], 1)
    cheek = [(0.80, 0.45), (0.66, 0.66), (0.46, 0.70), (0.25, shape.nose_y + 0.16), (0, shape.nose_y + 0.15)]
    right = np.concatenate([rim[::-1], [(0.97, 0.22)], spline(cheek, 14)])
    return [np.concatenate([right, right[::-1] * mirror])]
