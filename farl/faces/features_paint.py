"""Skin, nose and ears; lays the lit face on the canvas."""

from __future__ import annotations

import numpy as np

from farl.faces import palette
from farl.faces.beard import paint_beard
from farl.faces.canvas import Array, Canvas, mix
from farl.faces.eyes import paint_brows, paint_catchlights, paint_eyes
from farl.faces.features import SIDES, nose_ridge, nose_side
from farl.faces.light import head_light
from farl.faces.mouth import paint_mouth
from farl.faces.scene import NOSE, SKIN, Scene

FRECKLE = np.array([(1, 0), (0.5, 0.9), (-0.5, 0.9), (-1, 0), (-0.5, -0.9), (0.5, -0.9)], np.float32)


def paint_face(scene: Scene) -> None:
    """Paints the face as unlit colour, lights it as a surface, and lays it on the canvas."""
    t, canvas = scene.traits, scene.canvas
    skin = np.array(t.skin_rgb, np.float32)
    for side in SIDES:
        if scene.pose.yaw * side > 0.10:
            _ear(scene, side)
    layer = Canvas(canvas.size)
    layer.image[:] = skin
    layer.labels[:] = SKIN
    _complexion(scene, layer, skin)
    paint_beard(scene, layer)
    _nose(scene, layer, skin)
    paint_mouth(scene, layer, skin)
    paint_brows(scene, layer)
    paint_eyes(scene, layer, skin)
    stamp = scene.face_stamp
    shine = 0.8 if t.age < 0.5 else 0.6
    factor, gloss = head_light(scene.head, scene.light, canvas.size, stamp.rows, stamp.cols, gloss=shine)
    lit = stamp.window(layer.image) * factor + gloss[..., None] * scene.light.key
    # A soft shoulder instead of a clipped highlight keeps pale faces modelled.
    lit = np.where(lit > 0.80, 0.80 + 0.19 * np.tanh((lit - 0.80) / 0.26), lit)
    canvas.paint(stamp, lit)
    inside = stamp.alpha >= 0.5
    stamp.window(canvas.labels)[inside] = stamp.window(layer.labels)[inside]
    for side in SIDES:
        if scene.pose.yaw * side <= 0.10:
            _ear(scene, side)
    paint_catchlights(scene)


def _complexion(scene: Scene, layer: Canvas, skin: Array) -> None:
    t, shape, rng = scene.traits, scene.traits.shape, scene.rng
    blush = skin * np.array([1.06, 0.80, 0.77], np.float32)
    rosy = 0.42 + 0.25 * t.makeup + (0.12 if t.skin in ("pale", "fair") else 0)
    cheeks = [(side * 0.56, 0.42) for side in SIDES]
    layer.paint(scene.spots(cheeks, (0.22, 0.15), 0.12) * rosy, blush)
    layer.paint(
        scene.spots([(s * shape.eye_x, 0.02) for s in SIDES], (0.27, 0.15), 0.08) * 0.35, skin * (0.90, 0.80, 0.80)
    )
    if t.makeup:
        tone = np.array(palette.LIPSTICK.get(t.lipstick, (0.6, 0.3, 0.4)), np.float32)
        lids = [(side * (shape.eye_x + 0.02), -0.10) for side in SIDES]
        layer.paint(scene.spots(lids, (0.24, 0.08), 0.04) * 0.6, mix(skin * 0.7, tone * 0.7, 0.5))
    layer.paint(scene.spots([(0, shape.nose_y - 0.06), (0, scene.head.chin - 0.16)], (0.14, 0.09), 0.07) * 0.4, blush)
    if t.freckles:
        count = int(rng.integers(45, 75))
        place = np.stack([np.clip(rng.normal(0, 0.46, count), -0.85, 0.85), rng.normal(0.33, 0.12, count)], 1)
        rings = place[:, None] + FRECKLE * rng.uniform(0.011, 0.021, (count, 1, 1))
        spots = scene.head.pixels_of(rings.reshape(-1, 2)).reshape(count, 6, 2)
        layer.paint(layer.stamp(list(spots)) * 0.50, skin * (0.72, 0.55, 0.46))
    if t.age > 0.45:
        depth = min((t.age - 0.45) * 2.0, 0.9)
        rows = (-0.60, -0.71, -0.82)[: 2 + (t.age > 0.65)]
        lines = [[(-0.45, y - 0.02), (0, y + 0.03), (0.45, y - 0.02)] for y in rows]
        for side in SIDES:
            x, outer = shape.eye_x, shape.eye_x + shape.eye_half
            for dy in (-0.04, 0.02, 0.07):
                lines.append([(side * (outer + d), dy * k) for d, k in ((0.05, 1), (0.12, 1.8), (0.19, 3))])
            lines.append([(side * (x - 0.2), 0.15), (side * x, 0.215), (side * (x + 0.2), 0.16)])
        layer.shade(scene.strokes(lines, 0.045, 0.014), (0.70, 0.58, 0.54), depth)
    corner = shape.mouth_half + 0.07
    fold = float(np.clip(0.30 + 0.5 * max(shape.smile, 0) + 0.6 * max(t.age - 0.4, 0), 0, 0.95))
    lift = 0.10 * max(shape.smile, 0)
    w, y = shape.nose_width, shape.nose_y
    path = [(w + 0.05, y - 0.05), (w + 0.14 + lift * 0.5, y + 0.11), (corner + 0.02, shape.mouth_y - 0.06 - lift * 0.4)]
    layer.shade(scene.strokes([[(s * a, b) for a, b in path] for s in SIDES], 0.06, 0.03), (0.74, 0.60, 0.56), fold)


def _nose(scene: Scene, layer: Canvas, skin: Array) -> None:
    shape, head = scene.traits.shape, scene.head
    ridge = nose_ridge(shape)
    # Each half reaches to the ridge: posed, their union is the nose's silhouette.
    halves = [head.pixels_of(np.concatenate([nose_side(shape, side), ridge[::-1]])) for side in SIDES]
    stamp = layer.stamp(halves)
    layer.label(stamp, NOSE)
    w, y = shape.nose_width, shape.nose_y
    wing = [(w * 0.78, y - 0.13), (w * 1.06, y - 0.06), (w, y + 0.02), (w * 0.72, y + 0.055)]
    layer.shade(scene.strokes([[(s * a, b) for a, b in wing] for s in SIDES], 0.045, 0.02), (0.66, 0.50, 0.46), 0.75)
    holes = scene.spots([(side * w * 0.48, y + 0.038) for side in SIDES], (0.058, 0.026), 0.012)
    layer.paint(holes * 0.85, skin * (0.34, 0.20, 0.18))
    base = scene.strokes([[(-0.15, y + 0.075), (0, y + 0.10), (0.15, y + 0.075)]], 0.05, 0.025)
    layer.shade(base, (0.75, 0.62, 0.58), 0.7)


def _ear(scene: Scene, side: int) -> None:
    if scene.pose.yaw * side > 0.42 or (scene.traits.hair_style in ("long", "bob") and not scene.traits.earrings):
        return
    skin = np.array(scene.traits.skin_rgb, np.float32)
    width = scene.head.half_width(np.array([0.15], np.float32))[0]
    angle = np.linspace(0, 2 * np.pi, 20, endpoint=False)
    grow = 1 + 0.18 * np.maximum(-np.sin(angle), 0)

    def shell(k: float, dx: float = 0.0, dy: float = 0.0) -> Array:
        out = width - 0.03 + dx + k * 0.13 * (1 + np.cos(angle)) * grow
        points = np.stack([side * out, 0.18 + dy + k * 0.25 * np.sin(angle), -0.12 - 0.35 * (out - width)], 1)
        return scene.at(scene.pose.view(points))

    stamp = scene.canvas.stamp([shell(1.0)])
    tone = scene.lit(skin * (1.0, 0.92, 0.90), (side * 0.75, -0.1, 0.65))
    scene.canvas.paint(stamp, np.clip(tone, 0, 1), label=SKIN)
    clip = stamp.full(scene.canvas.size)
    concha = scene.canvas.stamp([shell(0.62, 0.04, -0.01)], soft=0.03 * scene.unit).times(clip)
    scene.canvas.shade(concha, (0.68, 0.50, 0.46))
