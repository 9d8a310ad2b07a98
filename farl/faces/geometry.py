"""The head: a parametric surface in head coordinates, and the pose that carries it to pixels.

Head coordinates: x to the picture's right, y down, z to the camera; the origin lies between the ears at eye level and
one unit is about half the width of a face. `view` coordinates are those after yaw, pitch and perspective, before roll,
scale and shift. Pixel coordinates are pixel edges: pixel i spans i..i+1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from farl.faces.canvas import Array

CAMERA_DISTANCE = 8.0
CHART_LOW = np.array([-1.2, -1.5], np.float32)
CHART_STEP = np.float32(0.04)
CHART_SHAPE = (84, 61)  # rows, columns: y to 1.82, x to 1.2
CHART_LAST = np.array([59.999, 82.999], np.float32)
RIM = np.radians(78.0)  # the jaw contour of the 68 landmarks runs here, in front of the ears


@dataclass(frozen=True)
class Pose:
    """Angles in radians, `scale` in pixels a unit, `center` in pixels. Positive yaw looks to the picture's right,
    positive pitch down, positive roll turns clockwise."""

    yaw: float
    pitch: float
    roll: float
    scale: float
    center: tuple[float, float]
    rotation: Array = field(init=False, repr=False)

    def __post_init__(self) -> None:
        cy, sy, cx, sx = np.cos(self.yaw), np.sin(self.yaw), np.cos(self.pitch), np.sin(self.pitch)
        turn = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
        nod = np.array([[1, 0, 0], [0, cx, sx], [0, -sx, cx]])
        object.__setattr__(self, "rotation", (nod @ turn).astype(np.float32))

    def view(self, points: ArrayLike) -> Array:
        """Head coordinates [..., 3] -> view coordinates [..., 2]."""
        turned = np.asarray(points, np.float32) @ self.rotation.T
        return turned[..., :2] * (CAMERA_DISTANCE / (CAMERA_DISTANCE - turned[..., 2:]))

    def pixels(self, view: Array) -> Array:
        """View coordinates [..., 2] -> pixels [..., 2]."""
        c, s = np.cos(self.roll) * self.scale, np.sin(self.roll) * self.scale
        turn = np.array([[c, s], [-s, c]], np.float32)
        return np.asarray(view, np.float32) @ turn + np.asarray(self.center, np.float32)


@dataclass(frozen=True)
class HeadShape:
    """Numbers of one person's head and of the expression; lengths in head units."""

    width: float = 1.0
    top: float = 1.42
    chin: float = 1.36
    taper: float = 2.2  # jaw: lower narrows earlier
    square: float = 1.6  # jaw: higher is squarer
    eye_x: float = 0.43
    eye_half: float = 0.22
    eye_tilt: float = 0.02
    brow_y: float = -0.31
    nose_y: float = 0.52
    nose_width: float = 0.19
    nose_height: float = 0.32
    mouth_y: float = 0.85
    mouth_half: float = 0.33
    lip: float = 0.085
    cheek: float = 0.06
    open_mouth: float = 0.0
    smile: float = 0.0
    eye_open: float = 0.14
    brow_raise: float = 0.0
    brow_arch: float = 0.06
    brow_thick: float = 0.09


def _bump(x: Array, y: Array, cx: float, cy: float, sx: float, sy: float) -> Array:
    return np.exp(-0.5 * (((x - cx) / sx) ** 2 + ((y - cy) / sy) ** 2))


class Head:
    """A posed head. Curves on the face are given as frontal (x, y); `view_of` lifts and poses them."""

    def __init__(self, shape: HeadShape, pose: Pose) -> None:
        self.shape, self.pose = shape, pose
        self.chin = shape.chin + 0.70 * shape.open_mouth
        self._chart = self._make_chart()
        self._view_chart = pose.view(self._chart)
        self._mesh: tuple[Array, Array, Array] | None = None

    def half_width(self, y: Array) -> Array:
        """Half the width of the face at heights y."""
        s = self.shape
        upper = np.clip(1 - (np.abs(np.minimum(y, 0)) / s.top) ** 2.4, 0, 1) ** 0.45
        lower = np.clip(1 - (np.maximum(y, 0) / self.chin) ** s.taper, 0, 1) ** (1 / s.square)
        return s.width * upper * lower

    def depth(self, y: Array) -> Array:
        """z of the smooth head's middle line at heights y."""
        upper = np.clip(1 - (np.abs(np.minimum(y, 0)) / self.shape.top) ** 3.0, 0, 1) ** 0.5
        lower = np.clip(1 - (np.maximum(y, 0) / self.chin) ** 6.0, 0, 1) ** 0.5
        return 0.97 * upper * lower

    def nose(self, x: Array, y: Array) -> Array:
        """Height of the nose over the smooth head at frontal (x, y)."""
        s = self.shape
        along = np.clip((y + 0.22) / (s.nose_y - 0.08 + 0.22), 0, 1)
        fall = 1 / (1 + np.exp((y - (s.nose_y + 0.015)) / 0.028))
        width = 0.075 + 0.06 * along**2
        ridge = s.nose_height * along**1.35 * np.exp(-0.5 * (x / width) ** 2)
        wings = 0.13 * _bump(np.abs(x), y, s.nose_width * 0.78, s.nose_y - 0.035, 0.06, 0.07)
        return (ridge + wings) * fall

    def relief(self, x: Array, y: Array) -> Array:
        """Height of everything but the nose over the smooth head."""
        s, a = self.shape, np.abs(x)
        mouth = s.mouth_y
        return (
            -0.13 * _bump(a, y, s.eye_x - 0.03, -0.04, 0.21, 0.15)
            + 0.055 * _bump(a, y, s.eye_x, 0.03, 0.13, 0.10)
            + 0.05 * _bump(a, y, 0.38, s.brow_y + 0.03, 0.26, 0.09)
            + (s.cheek + 0.07 * s.smile) * _bump(a, y, 0.56, 0.40 - 0.05 * s.smile, 0.22, 0.20)
            + 0.05 * _bump(x, y, 0, mouth - 0.07, 0.17, 0.06)
            + 0.06 * _bump(x, y, 0, mouth + 0.09 + s.open_mouth, 0.18, 0.055)
            - 0.06 * _bump(x, y, 0, mouth + 0.23 + s.open_mouth, 0.20, 0.05)
            - 0.05 * _bump(a, y, s.mouth_half + 0.07, mouth - 0.06 * s.smile, 0.06, 0.10)
            + 0.10 * _bump(x, y, 0, self.chin - 0.19, 0.19, 0.12)
        )

    def height(self, x: Array, y: Array) -> Array:
        """z of the face over frontal (x, y)."""
        ratio = np.abs(x) / np.maximum(self.half_width(y), 1e-3)
        round_ = np.clip(1 - ratio**2.4, 0, 1) ** (1 / 2.2)
        return self.depth(y) * round_ + (self.nose(x, y) + self.relief(x, y)) * np.clip(4 * (1 - ratio), 0, 1)

    def limb(self, y: Array, side: int) -> Array:
        """The largest |x| of the face still seen on that side (-1 left, +1 right): beyond it the head turns away."""
        width = self.half_width(y)
        turn = self.pose.yaw * side
        if turn <= 0:
            return width
        angle = np.arctan2(width * np.cos(turn), self.depth(y) * np.sin(turn))
        return width * np.sin(angle)

    def clamp(self, x: Array, y: Array) -> Array:
        """x moved to what is still seen of the face at heights y."""
        return np.clip(x, -self.limb(y, -1), self.limb(y, 1))

    def view_of(self, points: ArrayLike, *, above: float = 0.0) -> Array:
        """Frontal points [n, 2] lifted onto the face (`above` it by that much) -> view coordinates [n, 2].

        Points on the side that the head turns away slide to the visible limb."""
        low, step = CHART_LOW, CHART_STEP
        cell = (np.asarray(points, np.float32) - low) / step
        np.minimum(np.maximum(cell, 0, out=cell), CHART_LAST, out=cell)
        corner = cell.astype(np.int64)
        t = cell - corner
        first = corner[:, 1] * CHART_SHAPE[1] + corner[:, 0]
        tx, ty = t[:, :1], t[:, 1:]
        chart = self._chart if above else self._view_chart
        above_row = chart[first] * (1 - tx) + chart[first + 1] * tx
        first += CHART_SHAPE[1]
        below_row = chart[first] * (1 - tx) + chart[first + 1] * tx
        lifted = above_row * (1 - ty) + below_row * ty
        if above:
            lifted[:, 2] += above
            return self.pose.view(lifted)
        return lifted

    def _make_chart(self) -> Array:
        """Head coordinates of the face on a regular frontal grid: `view_of` interpolates it (error < 0.002 units)."""
        rows, cols = CHART_SHAPE
        y = np.repeat(CHART_LOW[1] + CHART_STEP * np.arange(rows, dtype=np.float32)[:, None], cols, 1)
        x = self.clamp(np.broadcast_to(CHART_LOW[0] + CHART_STEP * np.arange(cols, dtype=np.float32), y.shape), y)
        return np.stack([x, y, self.height(x, y)], -1).astype(np.float32).reshape(-1, 3)

    def pixels_of(self, points: ArrayLike, *, above: float = 0.0) -> Array:
        """Frontal points [n, 2] -> pixels [n, 2]."""
        return self.pose.pixels(self.view_of(points, above=above))

    def mesh_points(self) -> tuple[Array, Array, Array]:
        """The mesh at the density that the picture needs (kept)."""
        if self._mesh is None:
            cells = int(2.1 * self.pose.scale) + 8
            self._mesh = self.mesh(cells, cells)
        return self._mesh

    def mesh(self, rows: int, cols: int) -> tuple[Array, Array, Array]:
        """The closed front and sides of the head: points [rows, cols, 3], and the frontal (x, y) grids."""
        t = np.linspace(0, np.pi, rows, dtype=np.float32)
        y = (-self.shape.top + (self.chin + self.shape.top) * (0.5 - 0.5 * np.cos(t)))[:, None]
        phi = np.linspace(-0.80 * np.pi, 0.80 * np.pi, cols, dtype=np.float32)[None]
        x = self.half_width(y) * np.sin(phi)
        y = np.broadcast_to(y, x.shape)
        front = self.height(x, y)
        jaw = np.clip((y + 0.1) / 0.8, 0, 1)
        back = (1.2 - 0.95 * jaw * jaw * (3 - 2 * jaw)) * (self.depth(y) / 0.97) * np.cos(phi)
        z = np.where(np.cos(phi) > 0, front, back)
        return np.stack([x, y, z], -1).astype(np.float32), x, y

    def outline(self) -> Array:
        """The silhouette of the whole head in view coordinates, [2n, 2]."""
        view = self.pose.view(self.mesh_points()[0])
        rows = np.arange(len(view))
        left, right = view[rows, view[..., 0].argmin(1)], view[rows, view[..., 0].argmax(1)]
        return np.concatenate([left, right[::-1]])
