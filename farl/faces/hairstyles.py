"""Hairstyles, made of the locks and curls of `hair`."""

from __future__ import annotations

import numpy as np

from farl.faces.canvas import Array, mix, ribbon, shift
from farl.faces.hair import STEPS, HairPainter, Look, smooth
from farl.faces.scene import HAIR, Scene


def _hairline(painter: HairPainter, side: int, part: float, low: float) -> Array:
    """From the parting down one temple to the height `low` beside the ear."""
    width = painter.scene.head.shape.width
    corner = [
        (part, -0.97),
        (mix(part, side * 0.62, 0.5).item(), -0.93),
        (side * 0.62, -0.78),
        (side * 0.80 * width, -0.48),
    ]
    return painter.on_face([*corner, (side * 0.86 * width, -0.15), (side * 0.965 * width, low)])


def _cap(painter: HairPainter, volume: float, *, low: float, look: Look) -> None:
    """Two locks from the parting over the skull to the ears."""
    part = painter.scene.traits.part
    for side in sorted((-1, 1), key=lambda s: -abs(part * 2 - s)):
        inner = _hairline(painter, side, part, low)
        outer = painter.crown(volume, part * 38, side * 104)
        painter.lock(inner, outer, look)


def paint_back_hair(scene: Scene, painter: HairPainter) -> None:
    """Hair behind the neck and shoulders; call before the body."""
    t = scene.traits
    style, volume = t.hair_style, 0.17 * t.hair_volume
    if style in ("long", "bob"):
        length = 1.15 if style == "bob" else 2.15 + 0.4 * t.hair_volume
        flare = 0.22 if style == "bob" else 0.12
        rx = scene.skull_radius[0] + volume
        x, y = scene.skull
        sides = [
            smooth(
                [
                    (x + s * 0.2, y - 0.9),
                    (x + s * rx, y + 0.1),
                    (x + s * (rx + flare), y + 0.9),
                    (x + s * (rx + flare * 0.6), y + length * 0.8),
                    (x + s * (rx * 0.92), y + length + 0.3),
                ]
            )
            for s in (-1, 1)
        ]
        painter.lock(sides[0], sides[1], Look(34, 0.03, 0.05 * t.wavy, 0.55, 0.3, 0.62))
    elif style == "ponytail":
        x, y = scene.skull
        side = 1 if scene.pose.yaw < 0 else -1
        a = smooth(
            [
                (x + side * 0.3, y - 0.7),
                (x + side * 1.25, y - 0.55),
                (x + side * 1.5, y + 0.7),
                (x + side * 1.15, y + 2.0),
            ]
        )
        b = smooth(
            [
                (x + side * 0.5, y - 0.1),
                (x + side * 0.85, y + 0.2),
                (x + side * 1.0, y + 1.0),
                (x + side * 1.02, y + 2.1),
            ]
        )
        painter.lock(a, b, Look(20, 0.05, 0.05 * t.wavy, 0.35, 0.5, 0.85))
    elif style == "curly" and t.hair_volume > 0.85:
        _afro(painter, back=True)


def _afro(painter: HairPainter, *, back: bool) -> None:
    scene, rng, t = painter.scene, painter.scene.rng, painter.scene.traits
    rx, ry = scene.skull_radius
    volume = 0.30 * t.hair_volume * (1.0 if t.hat == "none" else 0.45)  # a hat presses it down
    low = 112 if t.hair_volume < 1.05 else 140
    if back:
        angle = np.radians(np.linspace(-low, low, 34))
        depth = np.repeat([0.75, 0.95], 17)[rng.permutation(34)]
    else:
        angle = np.radians(np.concatenate([np.linspace(-104, 104, 30), rng.uniform(-98, 98, 80)]))
        depth = np.concatenate([np.full(30, 1.0), rng.uniform(0.0, 1.0, 80)])
    if not back:
        dome = np.radians(np.linspace(-100, 100, 30))
        out = np.stack([(rx + volume * 0.75) * np.sin(dome), -(ry + volume * 0.8) * np.cos(dome)], 1)
        line = np.concatenate([_hairline(painter, -1, 0.0, 0.1)[::-1], _hairline(painter, 1, 0.0, 0.1)])
        base = scene.at(np.concatenate([scene.skull + out, line[::-1]]).astype(np.float32))
        scene.canvas.paint(scene.canvas.stamp([base]), painter.shadow, label=HAIR)
    inner_y = np.where(np.abs(angle) < 1.2, 0.60, 0.78)
    inner = np.stack([rx * 0.93 * np.sin(angle), -(ry * inner_y) * np.cos(angle)], 1)
    outer = np.stack([(rx + volume) * np.sin(angle), -(ry + volume * 1.1) * np.cos(angle)], 1)
    centers = scene.skull + mix(inner, outer, depth[:, None])
    order = np.argsort(-depth, kind="stable")
    centers = (centers + rng.normal(0, 0.02, centers.shape))[order]
    painter.curls(centers.astype(np.float32), rng.uniform(0.12, 0.185, len(centers)).astype(np.float32))


def _fringe(painter: HairPainter) -> None:
    t, rng = painter.scene.traits, painter.scene.rng
    bottom = t.shape.brow_y - 0.08 + rng.uniform(-0.08, 0.05)
    lean = 0.12 * np.sign(t.part)
    edges = [(-0.86, -0.62), (-0.45, -1.06), (0.0, -1.10), (0.45, -1.06), (0.86, -0.62)]
    tips = [
        (-0.88, bottom + 0.18),
        (-0.45 + lean, bottom + 0.02),
        (lean, bottom - 0.03),
        (0.45 + lean, bottom + 0.02),
        (0.88, bottom + 0.18),
    ]
    for i in range(4):
        a = painter.on_face([edges[i], (mix(edges[i], tips[i], 0.5) - (0, 0.06)).tolist(), tips[i]], 0.07)
        b = painter.on_face(
            [edges[i + 1], (mix(edges[i + 1], tips[i + 1], 0.5) - (0, 0.06)).tolist(), tips[i + 1]], 0.07
        )
        painter.lock(a, b, Look(10, 0.12, 0.0, 0.40, 0.6))


def _side_locks(painter: HairPainter, length: float) -> None:
    """Hair that falls in front of the ears beside the face."""
    scene, t = painter.scene, painter.scene.traits
    volume = 0.17 * t.hair_volume
    width = scene.head.shape.width
    rx = scene.skull_radius[0] + volume * 0.8
    x, y = scene.skull
    for side in (-1, 1):
        start = scene.head.view_of([(side * 0.74 * width, -0.62)], above=0.03)[0]
        temple = scene.head.view_of([(side * 0.90 * width, -0.10)], above=0.03)[0]
        cheek = scene.head.view_of([(side * 0.955 * width, 0.45)], above=0.03)[0]
        limit = x + side * rx
        tip = np.array([mix(cheek[0], limit, 0.15).item(), y + length], np.float32)
        inner = smooth([start, temple, cheek, shift(mix(cheek, tip, 0.5), side * 0.06, 0), tip])
        far = max(side * limit, side * cheek[0] + 0.18) * side
        outer = smooth(
            [
                (x + side * rx * 0.9, y - 0.35),
                (far, y + 0.15),
                (far + side * 0.10, y + 0.75),
                (far + side * 0.12, y + length * 0.75),
                (mix(far, tip[0], 0.3).item(), y + length + 0.1),
            ]
        )
        painter.lock(inner, outer, Look(18, 0.05, 0.045 * t.wavy, 0.30, 0.5))


def paint_front_hair(scene: Scene, painter: HairPainter) -> None:
    """Hair over the head, with its shadow on the face; call after the face."""
    t = scene.traits
    style, volume = t.hair_style, 0.16 * t.hair_volume
    if style == "bald":
        return
    _shadow_on_face(scene, painter)
    if style == "curly":
        _afro(painter, back=False)
        return
    if style == "buzz":
        _buzz(painter)
        return
    if style == "bun":
        _bun(scene, painter)
    low = {"short": 0.12, "side part": 0.20, "bun": 0.02, "ponytail": 0.02}.get(style, 0.3)
    thick = {"short": 0.9, "side part": 1.35, "bun": 0.55, "ponytail": 0.55}.get(style, 1.0)
    if style in ("long", "bob"):
        _side_locks(painter, 1.05 if style == "bob" else 1.9 + 0.4 * t.hair_volume)
    _cap(painter, volume * thick, low=low, look=Look(30, 0.02, 0.0, 0.32, 0.6))
    if style == "side part":
        _quiff(painter, volume)
    if t.fringe:
        _fringe(painter)


def _buzz(painter: HairPainter) -> None:
    scene = painter.scene
    halves = []
    for side in (-1, 1):
        inner = _hairline(painter, side, 0.0, 0.18)
        outer = painter.crown(0.02, 0, side * 104)
        halves.append(scene.at(np.concatenate([inner, outer[::-1]])))
    stamp = scene.canvas.stamp(halves, soft=0.04 * scene.unit) * 0.84
    grain = scene.rng.normal(0, 0.07, stamp.alpha.shape)[..., None]
    color = mix(painter.base, np.asarray(scene.traits.skin_rgb) * 0.6, 0.18) * painter.roundness(stamp) * (1 + grain)
    scene.canvas.paint(stamp, np.clip(color, 0, 1).astype(np.float32), label=HAIR)


def _quiff(painter: HairPainter, volume: float) -> None:
    """Hair combed up from the forehead towards the parting's far side."""
    t = painter.scene.traits
    side = 1 if t.part <= 0 else -1
    a = painter.on_face(
        [(t.part - side * 0.05, -0.93), (side * 0.25, -1.02), (side * 0.60, -0.86), (side * 0.84, -0.55)], 0.05
    )
    b = painter.crown(volume * (1.3 + 0.6 * np.sin(np.linspace(0, np.pi, STEPS))), t.part * 38 - side * 8, side * 80)
    painter.lock(a, b, Look(26, 0.03, 0.0, 0.38, 0.7))


def _bun(scene: Scene, painter: HairPainter) -> None:
    x, y = scene.skull
    center = np.array([x - 0.35 * np.sin(scene.pose.yaw), y - 1.13 - 0.22 + 0.25 * scene.pose.pitch], np.float32)
    size = 0.36 + 0.08 * scene.traits.hair_volume
    angle = np.linspace(0, np.pi, STEPS)
    upper = center + np.stack([-size * np.cos(angle), -size * np.sin(angle) * 0.95], 1)
    lower = center + np.stack([-size * np.cos(angle), size * np.sin(angle) * 0.75], 1)
    painter.lock(upper.astype(np.float32), lower.astype(np.float32), Look(16, 0.0, 0.0, 0.35, 0.7))
    tie = scene.at(center + np.stack([np.linspace(-0.3, 0.3, 8), 0.30 + 0.05 * np.cos(np.linspace(-1.5, 1.5, 8))], 1))
    scene.canvas.shade(scene.canvas.stamp([ribbon(tie, 0.10 * scene.unit)], soft=0.03 * scene.unit), (0.5, 0.45, 0.45))


def _shadow_on_face(scene: Scene, painter: HairPainter) -> None:
    t, light = scene.traits, scene.light
    offset = np.array([-0.10 * light.direction[0], 0.10], np.float32) * scene.unit
    shapes = []
    if t.fringe:
        bottom = t.shape.brow_y - 0.05
        box = [(-0.9, -0.7), (0, -1.1), (0.9, -0.7), (0.85, bottom + 0.12), (0, bottom), (-0.85, bottom + 0.12)]
        shapes.append(scene.head.pixels_of(box) + offset)
    part = t.part if t.hair_style != "curly" else 0.0
    for side in (-1, 1):
        inner = _hairline(painter, side, part, 0.3)
        shapes.append(scene.at(np.concatenate([inner, painter.crown(0.1, part * 38, side * 104)[::-1]])) + offset)
    stamp = scene.canvas.stamp(shapes, soft=0.06 * scene.unit).times(scene.face_stamp.full(scene.canvas.size))
    scene.canvas.shade(stamp, (0.66, 0.54, 0.50), 0.3 if t.hair_style == "buzz" else 0.9)
