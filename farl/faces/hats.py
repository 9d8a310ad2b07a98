"""Beanies, caps and wide-brimmed hats. A hat is background for the label map."""

from __future__ import annotations

import numpy as np

from farl.faces import palette
from farl.faces.canvas import Array, Drawer, Stamp, circle, mix, ribbon, shift, spline
from farl.faces.scene import BACKGROUND, Scene


def _ring(
    scene: Scene, radius: float, y: float, z0: float, tilt: float, start: float, stop: float, n: int = 40
) -> Array:
    """Part of a horizontal circle around the head, in view coordinates; degrees from the front."""
    a = np.radians(np.linspace(start, stop, n))
    z = z0 + radius * np.cos(a)
    return scene.pose.view(np.stack([radius * np.sin(a), y + tilt * (z - z0), z], 1))


def paint_hat_back(scene: Scene) -> None:
    """The far half of a wide brim; call before the head."""
    if scene.traits.hat != "brim":
        return
    points = scene.at(_ring(scene, 1.85, -0.80, -0.15, 0.10, 0, 360, 60))
    tone = np.array(palette.CLOTH[scene.traits.hat_color], np.float32)
    scene.canvas.paint(scene.canvas.stamp([points]), tone * scene.light.fill**0.47 * 0.75, label=BACKGROUND)


def _dome(scene: Scene, volume: float, height: float, y: float, tilt: float) -> Array:
    """Outline in pixels of a cap from its front edge over the skull."""
    rx, ry = scene.skull_radius
    angle = np.radians(np.linspace(-94, 94, 40))
    arc = scene.skull + np.stack(
        [(rx + volume) * np.sin(angle), -(ry + height) * np.abs(np.cos(angle)) ** 0.85 * np.sign(np.cos(angle))], 1
    )
    edge = _ring(scene, 1.06, y, -0.06, tilt, 82, -82, 30)
    return scene.at(np.concatenate([arc, edge]).astype(np.float32))


def _cloth(scene: Scene, stamp: Stamp, rgb: Array, texture: Array | None = None) -> None:
    rx, ry = scene.skull_radius
    shade = scene.light.ball(
        stamp, scene.at(shift(scene.skull, 0, 0.15)), (1.3 * rx * scene.unit, 1.5 * ry * scene.unit), flat=0.15
    )
    color = rgb * shade
    if texture is not None:
        color = color * (1 + texture[..., None])
    scene.canvas.paint(stamp, np.clip(color, 0, 1), label=BACKGROUND)


def _ribs(scene: Scene, top: Array, bottom: Array, count: int, shape: Array) -> Array:
    """Knitted ribs between two curves [n, 2] (pixels): a texture around 0 for the window of `shape`."""
    drawer = Drawer(scene.canvas.size, [shape], background=128)
    index = np.linspace(0, len(top) - 1, 2 * count).astype(int)
    for k in range(0, 2 * count - 1, 2):
        quad = np.stack([top[index[k]], top[index[k + 1]], bottom[index[k + 1]], bottom[index[k]]])
        drawer.polygon(quad, 78)
    return (drawer.stamp(soft=0.02 * scene.unit).alpha - 0.5) * 1.2


def paint_hat(scene: Scene) -> None:
    """Paints the hat, if any, and its shadow; call after the hair."""
    t, canvas, unit = scene.traits, scene.canvas, scene.unit
    if t.hat == "none":
        return
    rgb = np.array(palette.CLOTH[t.hat_color], np.float32)
    puff = 0.12 if t.hair_style in ("bald", "buzz") else 0.2
    face = scene.face_stamp.full(canvas.size)
    brow = {"beanie": -0.66, "cap": -0.66, "brim": -0.74}[t.hat]
    drop = {"beanie": 0.08, "cap": 0.30, "brim": 0.38}[t.hat]
    edge = scene.head.pixels_of([(x, brow - 0.10) for x in np.linspace(-0.95, 0.95, 24)], above=0.05)
    low = scene.head.pixels_of([(x, brow + drop * (1 - 0.3 * x * x)) for x in np.linspace(0.95, -0.95, 24)])
    canvas.shade(canvas.stamp([np.concatenate([edge, low])], soft=0.05 * unit).times(face), (0.58, 0.47, 0.46))
    if t.hat == "beanie":
        dome = _dome(scene, puff, 0.30, -0.72, 0.16)
        stamp = canvas.stamp([dome])
        peak = np.repeat(scene.at(scene.skull[None] - (0, scene.skull_radius[1] + 0.25)), 40, 0)
        _cloth(scene, stamp, rgb, _ribs(scene, mix(peak, dome[:40], 0.22), _near_edge(dome), 17, dome))
        upper = scene.at(_ring(scene, 1.10, -1.00, -0.06, 0.12, -86, 86, 40))
        lower = scene.at(_ring(scene, 1.13, -0.66, -0.06, 0.16, -86, 86, 40))
        cuff = np.concatenate([upper, lower[::-1]])
        canvas.shade(
            canvas.stamp([cuff - (0, 0.03 * unit)], soft=0.03 * unit).times(stamp.full(canvas.size)), (0.7, 0.68, 0.68)
        )
        band = canvas.stamp([cuff])
        _cloth(scene, band, np.clip(rgb * 0.92 + 0.05, 0, 1), _ribs(scene, upper, lower, 22, cuff))
        if t.hair_volume > 1.0:
            top = scene.at(scene.skull[None] - (0, scene.skull_radius[1] + 0.42))[0]
            tuft = scene.rng.normal(0, 1, (26, 2))
            tuft = top + tuft / np.maximum(np.linalg.norm(tuft, axis=1, keepdims=True), 1) * 0.2 * unit
            stamp = canvas.stamp([circle(p, 0.12 * unit, 12) for p in tuft.astype(np.float32)])
            shade = scene.light.ball(stamp, top, (0.34 * unit, 0.34 * unit))
            canvas.paint(stamp, np.clip(mix(rgb, (1, 1, 1), 0.45) * shade, 0, 1), label=BACKGROUND)
    elif t.hat == "cap":
        dome = _dome(scene, puff * 0.8, 0.14, -0.72, 0.10)
        stamp = canvas.stamp([dome])
        _cloth(scene, stamp, rgb)
        seam = spline(
            [
                scene.at(scene.skull - (0, scene.skull_radius[1] + 0.12)),
                scene.head.pixels_of([(0, -0.95)], above=0.08)[0],
            ],
            8,
        )
        canvas.shade(canvas.stamp([ribbon(seam, 0.025 * unit)]).times(stamp.full(canvas.size)), (0.72, 0.72, 0.74))
        a = np.radians(np.linspace(-62, 62, 36))
        near = np.stack([1.08 * np.sin(a), -0.74 + 0.06 * np.sin(a) ** 2, -0.06 + 1.08 * np.cos(a)], 1)
        reach = 0.62 * np.cos(a * 90 / 62) ** 0.6
        far = near + np.stack([0.12 * np.sin(a), 0.16 * reach + 0.10 * np.sin(a) ** 2, reach], 1)
        inner, outer = scene.at(scene.pose.view(near)), scene.at(scene.pose.view(far))
        peak = np.concatenate([inner - (0, 0.05 * unit), outer[::-1]])
        brim = canvas.stamp([peak, shift(np.concatenate([inner, outer[::-1]]), 0, 0.03 * unit)])
        canvas.paint(
            brim,
            np.clip(rgb * 0.62 * scene.light.shade(np.array([0, -0.75, 0.65], np.float32)), 0, 1),
            label=BACKGROUND,
        )
        canvas.paint(
            canvas.stamp([peak]),
            np.clip(rgb * 0.98 * scene.light.shade(np.array([0, -0.8, 0.6], np.float32)), 0, 1),
            label=BACKGROUND,
        )
        canvas.shade(canvas.stamp([ribbon(inner, 0.05 * unit)], soft=0.02 * unit), (0.6, 0.6, 0.62))
        badge = scene.head.pixels_of(circle((0, -1.02), 0.13, 20), above=0.10)
        canvas.paint(canvas.stamp([badge]) * 0.92, mix(rgb, (1, 1, 1), 0.8) * scene.light.fill**0.3, label=BACKGROUND)
    else:
        dome = _dome(scene, puff * 0.35, 0.30, -0.86, 0.10)
        _cloth(scene, canvas.stamp([dome]), rgb)
        band = np.concatenate(
            [
                scene.at(_ring(scene, 1.12, -1.06, -0.1, 0.1, -88, 88)),
                scene.at(_ring(scene, 1.12, -0.84, -0.1, 0.1, 88, -88)),
            ]
        )
        _cloth(
            scene,
            canvas.stamp([band]),
            mix(rgb * 0.3, (0.15, 0.1, 0.1), 0.3) if rgb.mean() > 0.3 else mix(rgb, (0.9, 0.85, 0.75), 0.6),
        )
        front = np.concatenate(
            [
                _ring(scene, 1.85, -0.80, -0.15, 0.10, -100, 100, 50),
                _ring(scene, 1.10, -0.80, -0.12, 0.10, 100, -100, 50),
            ]
        )
        under = shift(scene.at(front), 0, 0.045 * unit)
        canvas.paint(canvas.stamp([under]), rgb * 0.45 * scene.light.fill**0.3, label=BACKGROUND)
        stamp = canvas.stamp([scene.at(front)])
        tone = scene.light.shade(np.array([0.0, -0.85, 0.5], np.float32))
        canvas.paint(stamp, np.clip(rgb * tone, 0, 1), label=BACKGROUND)


def _near_edge(dome: Array) -> Array:
    """40 points of the dome's lower edge from left to right."""
    edge = dome[40:][::-1]
    return edge[np.linspace(0, len(edge) - 1, 40).astype(int)]
