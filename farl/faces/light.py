"""Light: one key light, a sky-like fill, and the shading of the head's surface."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from farl.faces.canvas import Array, Stamp
from farl.faces.geometry import Head

# Display value = albedo * linear light ** GAMMA. The low exponent of red keeps shadows on skin warm, as light that
# scatters below the surface does.
GAMMA = np.array([0.40, 0.47, 0.50], np.float32)


@dataclass(frozen=True)
class Light:
    """`direction` points to the light in picture axes (x right, y down, z to the camera)."""

    direction: Array
    key: Array
    fill: Array

    def shade(self, normal: Array, *, wrap: float = 0.25) -> Array:
        """Factors [..., 3] for unit normals [..., 3] in picture axes."""
        facing = np.clip((normal @ self.direction + wrap) / (1 + wrap), 0, None)[..., None]
        sky = (0.75 - 0.25 * normal[..., 1])[..., None]
        return (self.fill * sky + self.key * facing) ** GAMMA

    def ball(self, stamp: Stamp, center: Array, radius: tuple[float, float], *, flat: float = 0.0) -> Array:
        """Factors [h, w, 3] under a stamp as if it were an ellipsoid about `center` (pixels)."""
        y, x = np.mgrid[stamp.rows, stamp.cols].astype(np.float32) + 0.5
        nx, ny = (x - center[0]) / radius[0], (y - center[1]) / radius[1]
        nz = np.sqrt(np.clip(1 - nx * nx - ny * ny, 0.03, 1)) + flat
        normal = np.stack([nx, ny, nz], -1)
        normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
        return self.shade(normal)


SPLAT_SCALE = np.array([120, 120, 120, 255], np.float32)  # factors up to 2 in a byte
LIGHTS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float], tuple[float, float, float]]] = {
    "soft": ((-0.35, -0.55, 0.9), (0.78, 0.77, 0.75), (0.46, 0.47, 0.50)),
    "left": ((-0.95, -0.35, 0.45), (1.22, 1.16, 1.08), (0.22, 0.24, 0.29)),
    "right": ((0.95, -0.35, 0.45), (1.22, 1.16, 1.08), (0.22, 0.24, 0.29)),
    "warm": ((-0.6, -0.35, 0.75), (1.18, 0.86, 0.52), (0.40, 0.34, 0.34)),
    "cool": ((0.45, -0.6, 0.75), (0.66, 0.82, 1.06), (0.34, 0.40, 0.52)),
    "dim": ((-0.5, -0.7, 0.6), (0.40, 0.37, 0.34), (0.12, 0.13, 0.17)),
}


def make_light(name: str, rng: np.random.Generator) -> Light:
    """The light of that name in `LIGHTS`, a little varied; it may come from the other side."""
    direction, key, fill = LIGHTS[name]
    turned = np.array(direction) + rng.normal(0, 0.12, 3) * (1, 1, 0.3)
    if name in ("soft", "warm", "cool", "dim") and rng.random() < 0.5:
        turned[0] = -turned[0]
    strength = rng.uniform(0.97, 1.10)
    return Light(
        (turned / np.linalg.norm(turned)).astype(np.float32),
        (np.array(key) * strength).astype(np.float32),
        (np.array(fill) * strength).astype(np.float32),
    )


def roll_normals(normal: Array, roll: float) -> Array:
    """Normals [..., 3] in head axes to picture axes, or back with a negative `roll` (radians)."""
    c, s = np.cos(roll), np.sin(roll)
    return normal @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]], np.float32)


def _normals(points: Array) -> Array:
    """Unit normals [r, c, 3] of a grid of points."""
    padded = np.pad(points, ((1, 1), (1, 1), (0, 0)), mode="edge")
    a, b = padded[1:-1, 2:] - padded[1:-1, :-2], padded[2:, 1:-1] - padded[:-2, 1:-1]
    (ax, ay, az), (bx, by, bz) = np.moveaxis(a, -1, 0), np.moveaxis(b, -1, 0)
    normal = np.stack([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx], -1)
    return normal / np.sqrt((normal * normal).sum(-1, keepdims=True) + 1e-16)


def _finer(grid: Array) -> Array:
    """[r, c, k] -> [2r-1, 2c-1, k] by midpoints."""
    r, c, k = grid.shape
    wide = np.empty((r, 2 * c - 1, k), np.float32)
    wide[:, ::2], wide[:, 1::2] = grid, (grid[:, 1:] + grid[:, :-1]) / 2
    out = np.empty((2 * r - 1, 2 * c - 1, k), np.float32)
    out[::2], out[1::2] = wide, (wide[1:] + wide[:-1]) / 2
    return out


def _soft(grid: Array, cells: int) -> Array:
    """A cheap low-pass of a [r, c] map: down and up again."""
    r, c = grid.shape
    small = Image.fromarray(grid).resize((max(c // cells, 2), max(r // cells, 2)), Image.Resampling.BILINEAR)
    return np.asarray(small.resize((c, r), Image.Resampling.BICUBIC), np.float32)


def head_light(head: Head, light: Light, size: int, rows: slice, cols: slice, *, gloss: float) -> tuple[Array, Array]:
    """Shades the head's mesh and splats it: factors [h, w, 3] and added highlight [h, w] in the window rows x cols."""
    points, x, y = head.mesh_points()
    normal = _normals(points)
    turned = normal @ head.pose.rotation.T
    visible = turned[..., 2]
    picture = roll_normals(turned, head.pose.roll)

    toward = roll_normals(light.direction, -head.pose.roll) @ head.pose.rotation  # in head axes
    nose = head.nose(x, y)
    shadow = np.zeros_like(nose)
    flat = max(float(np.hypot(toward[0], toward[1])), 1e-3)
    for reach in (0.10, 0.20):
        cast = head.nose(x + reach * toward[0] / flat, y + reach * toward[1] / flat)
        shadow = np.maximum(shadow, np.clip((cast - nose - reach * toward[2] / flat) / 0.10, 0, 1))
    bumps = nose + head.relief(x, y)
    hollow = np.clip((_soft(bumps, 7) - bumps) / 0.05, -0.4, 1)

    factor = light.shade(picture) * (1 - 0.13 * hollow[..., None])
    factor *= 1 - shadow[..., None] * np.array([0.18, 0.25, 0.27], np.float32)
    half = light.direction + np.array([0, 0, 1], np.float32)
    half /= np.linalg.norm(half)
    aligned = np.clip(picture @ half, 0, 1)
    shine = gloss * (0.20 * aligned**38 + 0.10 * aligned**10) * (1 - shadow)
    edge = np.clip(1 - visible, 0, 1) ** 3
    factor *= 1 + (0.10 * edge * np.clip(picture @ light.direction + 0.3, 0, 1) - 0.10 * edge)[..., None]

    pixels = head.pose.pixels(head.pose.view(points))
    dense = _finer(np.concatenate([pixels, factor, shine[..., None], visible[..., None]], -1))
    # Painter's order: the cells that the camera sees from the side are written first.
    dense = dense[:: -1 if head.pose.pitch > 0 else 1, :: -1 if head.pose.yaw > 0 else 1].reshape(-1, 7)
    dense = dense[dense[:, 6] > 0.0]
    column, row = dense[:, 0].astype(int), dense[:, 1].astype(int)
    keep = (column >= 0) & (column < size) & (row >= 0) & (row < size)
    flat_index = row[keep] * size + column[keep]
    values = np.zeros((size * size, 4), np.uint8)
    hit = np.zeros(size * size, np.uint8)
    values[flat_index] = np.minimum(dense[keep, 2:6] * SPLAT_SCALE + 0.5, 255)
    hit[flat_index] = 255
    values, hit = values.reshape(size, size, 4)[rows, cols], hit.reshape(size, size)[rows, cols]
    near, far = (_filled(values, hit, radius) for radius in (0.55 * size / 128, 2.5 * size / 128))
    smooth = np.where(hit[..., None] > 0, near, far) / SPLAT_SCALE
    return smooth[..., :3], smooth[..., 3]


def _filled(values: np.ndarray, hit: np.ndarray, radius: float) -> Array:
    """Normalised blur: holes and the surroundings take the colour of their neighbours."""
    blur = ImageFilter.GaussianBlur(radius)
    total = np.asarray(Image.fromarray(values).filter(blur), np.float32)
    weight = np.asarray(Image.fromarray(hit).filter(blur), np.float32) / 255
    return np.where(weight[..., None] > 0.02, total / np.maximum(weight, 0.02)[..., None], 110).astype(np.float32)
