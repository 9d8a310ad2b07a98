"""Lips, teeth and tongue."""

from __future__ import annotations

import numpy as np

from farl.faces import palette
from farl.faces.canvas import Array, Canvas, circle, mix, ribbon, shift
from farl.faces.features import Mouth, mouth
from farl.faces.scene import INNER_MOUTH, LOWER_LIP, UPPER_LIP, Scene


def paint_mouth(scene: Scene, layer: Canvas, skin: Array) -> None:
    """Paints lips, teeth and tongue on the unlit face."""
    t, head, shape, unit = scene.traits, scene.head, scene.traits.shape, scene.unit
    m = mouth(shape)
    natural = skin * np.array([0.90, 0.62, 0.60], np.float32) + np.array([0.03, 0.0, 0.01], np.float32)
    tone = mix(natural, palette.LIPSTICK[t.lipstick], 0.88) if t.lipstick != "none" else natural
    dip = shape.mouth_y + 0.25 + shape.open_mouth
    layer.shade(scene.strokes([[(-0.2, dip), (0, dip + 0.03), (0.2, dip)]], 0.07, 0.05), (0.80, 0.68, 0.64), 0.8)
    if shape.open_mouth > 0.02:
        _inside(scene, layer, m)
    upper, lower = layer.stamp([head.pixels_of(m.upper_lip)]), layer.stamp([head.pixels_of(m.lower_lip)])
    layer.paint(upper, tone * 0.87, label=UPPER_LIP)
    layer.paint(lower, tone, label=LOWER_LIP)
    gleam = (0.55 * m.lower_inner + 0.45 * m.lower)[10:23:3].tolist()
    shine = scene.strokes([gleam], 0.05, 0.02).times(lower.full(layer.size))
    layer.paint(shine * (0.5 if t.lipstick != "none" else 0.3), mix(tone, (1, 0.95, 0.95), 0.75))
    under = shift(m.lower, 0, 0.012)[9:24:3].tolist()
    layer.shade(scene.strokes([under], 0.03, 0.02), (0.72, 0.58, 0.55), 0.7)
    seam = ribbon(head.pixels_of(m.upper_inner), (0.012 + 0.022 * np.sin(np.linspace(0, np.pi, 33))) * unit)
    layer.paint(layer.stamp([seam], soft=0.006 * unit) * 0.8, tone * (0.36, 0.25, 0.25))
    corners = [head.pixels_of(circle(m.upper_inner[end], 0.03, 10)) for end in (0, -1)]
    layer.shade(layer.stamp(corners, soft=0.02 * unit), (0.62, 0.48, 0.45), 0.8)


def _inside(scene: Scene, layer: Canvas, m: Mouth) -> None:
    head, shape, unit = scene.head, scene.traits.shape, scene.unit
    inside = layer.stamp([head.pixels_of(m.inside)])
    layer.paint(inside, (0.22, 0.05, 0.06), label=INNER_MOUTH)
    full = inside.full(layer.size)
    tongue = scene.spots([(0, shape.mouth_y + 0.9 * shape.open_mouth)], (0.17, 0.075), 0.02).times(full)
    layer.paint(tongue * 0.9, (0.72, 0.30, 0.31))
    if shape.smile <= 0.3:
        top = scene.spots([(0, shape.mouth_y - 0.20 * shape.open_mouth)], (0.15, 0.03), 0.01).times(full)
        layer.paint(top * 0.9, (0.90, 0.87, 0.83))
        return
    drop = (0.75 * shape.open_mouth + 0.02) * (1 - 0.75 * np.linspace(-1, 1, 33)[:, None] ** 2)
    edge = m.upper_inner + drop * np.array([0, 1])
    teeth = np.concatenate([m.upper_inner - (0, 0.02), edge[::-1]])
    layer.paint(layer.stamp([head.pixels_of(teeth)], soft=0.008 * unit).times(full), (0.95, 0.93, 0.89))
    gaps = [ribbon(head.pixels_of(np.stack([m.upper_inner[k], edge[k]])), 0.010 * unit) for k in range(4, 30, 4)]
    layer.shade(layer.stamp(gaps).times(full), (0.82, 0.78, 0.76))
    layer.shade(scene.strokes([m.upper_inner[2:-2:4].tolist()], 0.05, 0.02).times(full), (0.6, 0.5, 0.5))
