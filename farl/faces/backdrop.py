"""Backgrounds, neck, shoulders and clothes."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from farl.faces import palette
from farl.faces.canvas import Array, circle, mix, ribbon, shift, spline
from farl.faces.scene import BACKGROUND, Scene


def _byte(rgb: Array | tuple[float, float, float]) -> tuple[int, int, int]:
    r, g, b = (int(np.clip(c, 0, 1) * 255 + 0.5) for c in rgb)
    return r, g, b


def paint_background(scene: Scene) -> None:
    """Fills the canvas; call first."""
    t, size, rng = scene.traits, scene.canvas.size, scene.rng
    first = np.array(palette.BACKDROP[t.background_color], np.float32)
    second = np.array(palette.BACKDROP[t.background_color2], np.float32)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    if t.background in ("plain", "gradient"):
        glow = np.exp(-(((x - 0.5 - 0.25 * scene.light.direction[0]) / 0.55) ** 2) - ((y - 0.42) / 0.6) ** 2)[..., None]
        if t.background == "plain":
            image = first * (0.80 + 0.25 * glow)
        else:
            angle = rng.uniform(-0.9, 0.9)
            ramp = (x - 0.5) * np.sin(angle) + (y - 0.5) * np.cos(angle) + 0.5
            image = mix(first, second, np.clip(ramp, 0, 1)[..., None]) * (0.88 + 0.16 * glow)
    else:
        picture = Image.new("RGB", (size, size), _byte(first))
        draw = ImageDraw.Draw(picture)
        painter = {"stripes": _stripes, "bokeh": _bokeh, "room": _room, "outdoor": _outdoor}[t.background]
        blur = painter(scene, draw, first, second)
        picture = picture.filter(ImageFilter.GaussianBlur(blur * size / 128))
        image = np.asarray(picture, np.float32) / 255
        if t.background == "bokeh":
            image = _bokeh_lights(scene, image)
    vignette = 1 - 0.28 * np.clip(((x - 0.5) ** 2 + (y - 0.5) ** 2) * 2 - 0.25, 0, 1)[..., None]
    tone = (scene.light.fill + 0.55 * scene.light.key) ** 0.45
    scene.canvas.image[:] = np.clip(image * vignette * mix(1.0, tone, 0.75), 0, 1)


def _stripes(scene: Scene, draw: ImageDraw.ImageDraw, first: Array, second: Array) -> float:
    size, rng = scene.canvas.size, scene.rng
    width, slope = size * rng.uniform(0.09, 0.16), rng.choice([0.0, 0.0, 0.5, -0.5, 1.0])
    sideways = slope == 0 and rng.random() < 0.4
    for i in range(-14, 28, 2):
        a, b, shift = i * width, (i + 1) * width, slope * size
        box = [(a, 0), (b, 0), (b + shift, size), (a + shift, size)]
        draw.polygon([(q, p) for p, q in box] if sideways else box, fill=_byte(second))
    return 0.5


def _bokeh(scene: Scene, draw: ImageDraw.ImageDraw, first: Array, second: Array) -> float:
    size, rng = scene.canvas.size, scene.rng
    draw.rectangle((0, 0, size, size), fill=_byte(first * 0.45))
    for _ in range(9):
        cx, cy, r = rng.uniform(0, size), rng.uniform(0, size), size * rng.uniform(0.1, 0.3)
        tone = mix(first * 0.35, second * 0.6, rng.random())
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=_byte(tone))
    return 9


def _bokeh_lights(scene: Scene, image: Array) -> Array:
    t, size, rng = scene.traits, scene.canvas.size, scene.rng
    image = image.copy()
    for _ in range(int(rng.integers(13, 22))):
        stamp = scene.canvas.stamp([circle(rng.uniform(0, size, 2), size * rng.uniform(0.025, 0.085))], soft=size / 190)
        name = t.background_color if rng.random() < 0.6 else t.background_color2
        tone = mix(palette.BACKDROP[name], (1, 0.95, 0.85), rng.uniform(0.1, 0.5))
        view = image[stamp.rows, stamp.cols]
        view += stamp.alpha[..., None] * rng.uniform(0.25, 0.75) * (tone - view * 0.4)
    return np.clip(image, 0, 1)


def _room(scene: Scene, draw: ImageDraw.ImageDraw, first: Array, second: Array) -> float:
    size, rng = scene.canvas.size, scene.rng
    draw.rectangle((0, 0, size, size), fill=_byte(mix(first, (0.9, 0.87, 0.82), 0.35)))
    left = rng.random() < 0.5
    x0, x1 = (size * 0.03, size * 0.30) if left else (size * 0.70, size * 0.97)
    draw.rectangle((x0, size * 0.08, x1, size * 0.52), fill=_byte((0.97, 0.96, 0.93)))  # window
    pad, mid = size * 0.015, (x0 + x1) / 2
    draw.rectangle((x0 + pad, size * 0.1, x1 - pad, size * 0.5), fill=_byte((0.74, 0.87, 0.97)))
    draw.rectangle((mid - pad / 2, size * 0.1, mid + pad / 2, size * 0.5), fill=_byte((0.97, 0.96, 0.93)))
    draw.rectangle((x0, size * 0.29, x1, size * 0.305), fill=_byte((0.97, 0.96, 0.93)))
    s0, s1 = (size * 0.66, size * 1.0) if left else (0, size * 0.34)
    for shelf in (0.3, 0.52):
        draw.rectangle((s0, size * shelf, s1, size * (shelf + 0.022)), fill=_byte((0.47, 0.31, 0.2)))
        x = s0
        while x < s1:
            width, tall = size * rng.uniform(0.025, 0.05), size * rng.uniform(0.10, 0.16)
            tone = mix(second, rng.uniform(0.15, 0.95, 3), 0.65) * 0.85
            draw.rectangle((x, size * shelf - tall, x + width, size * shelf), fill=_byte(tone))
            x += width + size * 0.006
    draw.rectangle((0, size * 0.8, size, size), fill=_byte(first * 0.55))
    return 1.7


def _outdoor(scene: Scene, draw: ImageDraw.ImageDraw, first: Array, second: Array) -> float:
    size, rng = scene.canvas.size, scene.rng
    dusk = rng.random() < 0.3
    top, low = ((0.33, 0.37, 0.62), (0.98, 0.72, 0.5)) if dusk else ((0.36, 0.61, 0.9), (0.86, 0.93, 0.98))
    for row in range(size):
        draw.line((0, row, size, row), fill=_byte(mix(top, low, min(row / (0.7 * size), 1))))
    if rng.random() < 0.6:
        cx, cy, r = size * rng.uniform(0.1, 0.9), size * rng.uniform(0.08, 0.25), size * rng.uniform(0.04, 0.07)
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=_byte((1, 0.95, 0.75)))
    for _ in range(int(rng.integers(0, 4))):
        cx, cy = size * rng.uniform(0, 1), size * rng.uniform(0.08, 0.35)
        for k in range(4):
            px, r = cx + (k - 1.5) * size * 0.05, size * rng.uniform(0.025, 0.05)
            draw.ellipse((px - r * 1.3, cy - r, px + r * 1.3, cy + r), fill=_byte(mix((1, 1, 1), low, 0.25)))
    xs = np.linspace(0, 1, 24)
    for level, tone in ((0.55, (0.45, 0.58, 0.55)), (0.68, (0.33, 0.52, 0.3)), (0.8, (0.25, 0.42, 0.2))):
        hill = (
            level
            + 0.05 * np.sin(xs * rng.uniform(4, 9) + rng.uniform(0, 6))
            + 0.02 * np.sin(xs * 17 + rng.uniform(0, 6))
        )
        points = [(x * size, y * size) for x, y in zip(xs, hill, strict=True)]
        shade = mix(tone, (0.5, 0.35, 0.35), 0.35) if dusk else tone
        draw.polygon([*points, (size, size), (0, size)], fill=_byte(shade))
    for _ in range(int(rng.integers(0, 5))):
        cx, cy, r = (
            size * rng.choice([rng.uniform(0, 0.25), rng.uniform(0.75, 1)]),
            size * 0.58,
            size * rng.uniform(0.06, 0.11),
        )
        draw.rectangle((cx - r * 0.15, cy, cx + r * 0.15, cy + 3 * r), fill=_byte((0.33, 0.23, 0.16)))
        draw.ellipse(
            (cx - r, cy - 1.2 * r, cx + r, cy + r), fill=_byte(mix((0.2, 0.42, 0.22), (0.45, 0.6, 0.25), rng.random()))
        )
    return 1.5


def _body_points(scene: Scene, points: list[tuple[float, float]]) -> Array:
    """Body coordinates (head units below the eyes, no roll) -> pixels."""
    offset = np.array([scene.pose.center[0] - 0.25 * scene.unit * scene.pose.roll, scene.pose.center[1]])
    return (np.asarray(points, np.float32) * scene.unit + offset).astype(np.float32)


def paint_body(scene: Scene) -> None:
    """Neck and clothes. Both are background for the label map, as in LaPa."""
    t, canvas, light = scene.traits, scene.canvas, scene.light
    unit = scene.unit
    size = canvas.size
    chin = scene.at(scene.pose.view([[0, 0.75, -0.25]]))[0]
    base = _body_points(scene, [(0, 1.75)])[0]
    bulk = 0.58 if t.soft else 0.68
    neck = ribbon(
        spline([chin, mix(chin, base, 0.6), shift(base, 0, 0.5 * unit)], 12),
        np.linspace(1.1, 1.25, 12) * 2 * bulk * unit * 0.8,
    )
    stamp = canvas.stamp([neck])
    middle = mix(chin, base, 0.5)
    shade = light.ball(stamp, middle, (bulk * unit * 1.1, 40 * unit), flat=0.1)
    canvas.paint(stamp, np.asarray(t.skin_rgb, np.float32) * 0.93 * shade, label=BACKGROUND)
    drop = scene.outline + np.array([-0.12 * light.direction[0], 0.30], np.float32) * unit
    shadow = canvas.stamp([drop], soft=0.10 * unit)
    canvas.shade(shadow.times(stamp.full(size)), (0.60, 0.47, 0.43))

    half = 1.75 if t.soft else 2.05
    right = [(0.50, 1.60), (0.80, 1.80), (1.25, 1.93), (half, 2.13), (half + 0.28, 2.7), (half + 0.35, 4.2)]
    if t.collar == "turtleneck":
        right = [(0.56, 1.36), (0.62, 1.62), *right[1:]]
    # The neckline dips between the two sides.
    dip = {"crew": 1.93, "v": 2.45, "turtleneck": 1.48, "shirt": 2.12, "striped": 1.95}[t.collar]
    edge = spline([(-x, y) for x, y in reversed(right)], 30), spline(right, 30)
    sag = [
        (-right[0][0], right[0][1]),
        (-0.28, mix(right[0][1], dip, 0.8).item()),
        (0, dip),
        (0.28, mix(right[0][1], dip, 0.8).item()),
        right[0],
    ]
    neckline = np.array([sag[0], sag[2], sag[4]]) if t.collar == "v" else spline(sag, 15)
    points = _body_points(scene, np.concatenate([edge[0], neckline, edge[1]]).tolist())
    stamp = canvas.stamp([points])
    y, x = np.mgrid[stamp.rows, stamp.cols].astype(np.float32)
    across = (x - base[0]) / unit
    normal = np.stack([0.33 * across, np.full_like(x, -0.25), np.full_like(x, 0.9)], -1)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    cloth = np.array(palette.CLOTH[t.cloth_color], np.float32) * np.ones((*x.shape, 1), np.float32)
    if t.collar == "striped":
        arc = (y - base[1]) / unit - 0.10 * across**2
        band = np.clip(np.sin(arc * 18) * 3 + 0.5, 0, 1)[..., None]
        cloth = mix(cloth, palette.CLOTH[t.cloth_color2], band)
    canvas.shade(
        canvas.stamp([points - (0, 0.07 * unit)], soft=0.06 * unit).times(canvas.stamp([neck]).full(size)),
        (0.7, 0.62, 0.6),
    )
    canvas.paint(stamp, cloth * light.shade(normal), label=BACKGROUND)
    folds = []
    for side in (-1, 1):
        for k in range(3):
            x0 = side * (0.55 + 0.45 * k + 0.1 * scene.rng.normal())
            fold = spline([(x0, 1.95 + 0.1 * k), (x0 + side * 0.10, 2.3), (x0 + side * 0.02, 2.9)], 10)
            folds.append(ribbon(_body_points(scene, fold.tolist()), np.linspace(0.02, 0.14, 10) * unit))
    clip = stamp.full(size)
    canvas.shade(canvas.stamp(folds, soft=0.05 * unit).times(clip), (0.72, 0.72, 0.76))
    if t.collar in ("crew", "striped", "v", "turtleneck"):
        rim = ribbon(shift(_body_points(scene, neckline.tolist()), 0, 0.035 * unit), 0.075 * unit)
        canvas.shade(canvas.stamp([rim], soft=0.3).times(clip), (0.78, 0.78, 0.8))
    else:
        for side in (-1, 1):
            flap = _body_points(
                scene,
                [
                    (side * 0.52, 1.52),
                    (side * 0.78, 1.86),
                    (side * 0.42, 2.30),
                    (side * 0.02, 2.10),
                    (side * 0.30, 1.85),
                ],
            )
            canvas.shade(canvas.stamp([shift(flap, 0, 0.06 * unit)], soft=0.05 * unit), (0.7, 0.7, 0.72))
            tone = mix(palette.CLOTH[t.cloth_color], (1, 1, 1), 0.12) * light.shade(
                np.array([0.25 * side, -0.3, 0.9], np.float32)
            )
            canvas.paint(canvas.stamp([flap]), tone, label=BACKGROUND)
        for k in range(3):
            button = _body_points(scene, [(0.03, 2.30 + 0.32 * k)])[0]
            canvas.paint(
                canvas.stamp([circle(button, 0.045 * unit)]), mix(palette.CLOTH[t.cloth_color], (1, 1, 1), 0.7)
            )
