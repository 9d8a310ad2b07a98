"""Glasses and earrings."""

from __future__ import annotations

import numpy as np

from farl.faces import palette
from farl.faces.canvas import Array, circle, mix, ribbon, shift
from farl.faces.features import SIDES
from farl.faces.scene import BACKGROUND, Scene


def paint_earrings(scene: Scene) -> None:
    """Paints the earrings, if any, that are on a visible side."""
    t = scene.traits
    if not t.earrings:
        return
    gold = np.array((0.93, 0.75, 0.33) if t.shape.brow_y > -0.33 else (0.86, 0.88, 0.92), np.float32)
    width = float(scene.head.half_width(np.array([0.4]))[0])
    for side in SIDES:
        if scene.pose.yaw * side > 0.30:
            continue
        lobe = scene.at(scene.pose.view([[side * (width + 0.10), 0.42, -0.10]]))[0]
        hoop = lobe + np.array([0, 0.16 * scene.unit], np.float32)
        ring, hole = circle(hoop, 0.15 * scene.unit), circle(hoop, 0.095 * scene.unit)
        stamp = scene.canvas.stamp([ring], cut=[hole])
        shade = scene.light.ball(stamp, hoop - 0.05 * scene.unit, (0.2 * scene.unit, 0.2 * scene.unit))
        scene.canvas.paint(stamp, np.clip(gold * shade, 0, 1), label=BACKGROUND)
        scene.canvas.paint(
            scene.canvas.stamp([circle(lobe, 0.055 * scene.unit)]), np.clip(gold * 1.1, 0, 1), label=BACKGROUND
        )


def _lens(style: str, side: int, eye_x: float, grow: float) -> Array:
    """Frame outline on the frontal plane [n, 2]."""
    angle = np.linspace(0, 2 * np.pi, 36, endpoint=False)
    power = {"round": 2.0, "square": 4.5, "sunglasses": 2.9}[style]
    rx, ry = {"round": (0.30, 0.275), "square": (0.325, 0.235), "sunglasses": (0.345, 0.27)}[style]
    c, s = np.cos(angle), np.sin(angle)
    radius = (np.abs(c) ** power + np.abs(s) ** power) ** (-1 / power)
    x, y = radius * c * (rx + grow), radius * s * (ry + grow)
    if style == "sunglasses":
        x = x * (1 - 0.16 * np.clip(y / ry, 0, 1))
    return np.stack([side * (eye_x + 0.03 + x), 0.03 + y], 1)


def paint_glasses(scene: Scene) -> None:
    """Paints the glasses, if any, and their shadow; call after the face."""
    t = scene.traits
    if t.glasses == "none":
        return
    canvas, unit, size = scene.canvas, scene.unit, scene.canvas.size
    frame = np.array(palette.FRAME[t.frame_color], np.float32)

    def place(points: Array) -> Array:
        depth = 1.06 - 0.10 * points[:, 0] ** 2
        return scene.at(scene.pose.view(np.stack([points[:, 0], points[:, 1], depth], 1)))

    face = scene.face_stamp.full(size)
    thick = 0.035 if t.glasses == "round" else 0.05
    outer = [place(_lens(t.glasses, side, t.shape.eye_x, thick)) for side in SIDES]
    inner = [place(_lens(t.glasses, side, t.shape.eye_x, -0.005)) for side in SIDES]
    width = float(scene.head.half_width(np.array([-0.05]))[0])
    temples = []
    for side in SIDES:
        hinge = _lens(t.glasses, side, t.shape.eye_x, thick)[3]
        front = [side * abs(hinge[0]), -0.06, 1.06 - 0.10 * hinge[0] ** 2]
        path = scene.at(
            scene.pose.view([front, [side * (width + 0.03), -0.05, 0.55], [side * (width + 0.05), 0.0, -0.05]])
        )
        if scene.pose.yaw * side < 0.12:
            temples.append(ribbon(path, 0.06 * unit))
    bridge = np.stack([np.linspace(-0.16, 0.16, 9), -0.02 - 0.05 * np.cos(np.linspace(-1.5, 1.5, 9))], 1)
    shapes = [*outer, ribbon(place(bridge), 0.05 * unit), *temples]
    offset = np.array([-0.06 * scene.light.direction[0], 0.09], np.float32) * unit
    cast = canvas.stamp(
        [p + offset for p in shapes],
        cut=[] if t.glasses == "sunglasses" else [p + offset for p in inner],
        soft=0.03 * unit,
    )
    canvas.shade(cast.times(face), (0.66, 0.55, 0.53))
    for lens in inner:
        stamp = canvas.stamp([lens])
        if not stamp.alpha.size:
            continue
        low, high = lens.min(0), lens.max(0)
        y, x = np.mgrid[stamp.rows, stamp.cols].astype(np.float32)
        down = ((y - low[1]) / max(high[1] - low[1], 1))[..., None].clip(0, 1)
        across = (x - low[0]) / max(high[0] - low[0], 1) + 0.6 * (y - low[1]) / max(high[1] - low[1], 1)
        glare = np.exp(-(((across - 0.55) / 0.10) ** 2)) + 0.6 * np.exp(-(((across - 0.83) / 0.045) ** 2))
        if t.glasses == "sunglasses":
            tint = mix((0.05, 0.05, 0.07), mix(frame * 0.4, (0.30, 0.24, 0.22), 0.5), down**1.5)
            canvas.paint(stamp, np.clip(tint + 0.30 * glare[..., None], 0, 1), label=BACKGROUND)
        else:
            canvas.paint(stamp * 0.07, (0.86, 0.93, 1.0))
            canvas.paint(stamp * (0.20 * glare), (1, 1, 1))
    rims = canvas.stamp(shapes, cut=inner)
    canvas.paint(rims, np.clip(frame * scene.light.shade(np.array([0, -0.2, 0.98], np.float32)), 0, 1))
    top = canvas.stamp([p - (0, 0.012 * unit) for p in outer], cut=[shift(p, 0, 0.02 * unit) for p in outer])
    canvas.paint(top.times(rims.full(size)) * 0.45, np.clip(frame + 0.45, 0, 1))
    if t.glasses == "sunglasses":
        canvas.labels[(rims.full(size) >= 0.5) & (face > 0.5)] = BACKGROUND
