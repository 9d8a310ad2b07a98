"""From an image to the square crop of a face and back: similarity, box, and the RoI tanh-warp (Lin et al. 2019).

Pixel centres lie at whole numbers everywhere: the first pixel of a row covers -0.5..0.5, an image of width W covers
-0.5..W-0.5, and the normalised coordinate of x is u = (x + 0.5) * 2 / W - 1, so that u = -1 and 1 are the outer edges.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from farl.downstream.draws import Draws

# Eyes (left, right of the picture), tip of the nose, corners of the mouth in FaRL's aligned crop of 512 pixels, from
# -1 to 1 between the centres of the outer pixels.
STANDARD_POINTS = (
    (-0.234375, -0.1171875),
    (0.234375, -0.1171875),
    (0.0, 0.1171875),
    (-0.140625, 0.4078125),
    (0.140625, 0.4078125),
)
RIM = 1e-3  # arctanh is taken up to 1 - RIM, so that the edge of a crop stays at a finite distance


def similarity(points: Tensor, target: Tensor) -> Tensor:
    """Rotation, scale and shift that bring `points` nearest to `target` in the sense of least squares; no mirroring.

    Args:
        points, target: float [B, K, 2] (or [K, 2] for the target), (x, y).

    Returns:
        [B, 3, 3], for column vectors (x, y, 1).
    """
    target = target.to(points).expand_as(points)
    center, target_center = points.mean(1, keepdim=True), target.mean(1, keepdim=True)
    p, q = points - center, target - target_center
    spread = p.square().sum((1, 2))
    cosine = (p * q).sum((1, 2)) / spread
    sine = (p[..., 0] * q[..., 1] - p[..., 1] * q[..., 0]).sum(1) / spread
    linear = torch.stack([cosine, -sine, sine, cosine], 1).unflatten(1, (2, 2))
    return _affine(linear, target_center[:, 0] - (linear @ center[:, 0, :, None])[..., 0])


def align_to_points(points: Tensor, size: int, *, scale: float = 1.0) -> Tensor:
    """Similarity [B, 3, 3] from an image to FaRL's aligned crop of `size` pixels.

    Args:
        points: float [B, 5, 2] pixels: eyes, tip of the nose, corners of the mouth; the left of the picture first.
        scale: of the face in the crop; 1 is FaRL's.

    Raises:
        ValueError: points of another shape, or all at one place.
    """
    if points.ndim != 3 or points.shape[1:] != (5, 2):
        raise ValueError(f"points must be [B, 5, 2], not {list(points.shape)}")
    if not bool((points.var(1).sum(1) > 0).all()):
        raise ValueError("the 5 points of a face lie at one place (or are not numbers): no crop can be made from them")
    standard = torch.tensor(STANDARD_POINTS, dtype=points.dtype, device=points.device)
    return similarity(points, (standard * scale + 1) * (size - 1) / 2)


def crop_box(boxes: Tensor, size: int, *, scale: float = 1.0, square: bool = False) -> Tensor:
    """Matrix [B, 3, 3] that stretches boxes over a crop of `size` pixels.

    Args:
        boxes: float [B, 4] (left, top, right, bottom) edges in pixels; a whole image is (-0.5, -0.5, W-0.5, H-0.5).
        scale: of the box in the crop: 0.8 leaves a border around it.
        square: widen the shorter side first, so that the face is not stretched.

    Raises:
        ValueError: boxes of another shape, or without area.
    """
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must be [B, 4], not {list(boxes.shape)}")
    sides = boxes[:, 2:] - boxes[:, :2]
    if not bool((sides > 0).all()):
        raise ValueError(f"a box has no area: {boxes[~(sides > 0).all(1)][0].tolist()} (left, top, right, bottom)")
    center = (boxes[:, 2:] + boxes[:, :2]) / 2
    if square:
        sides = sides.amax(1, keepdim=True).expand_as(sides)
    stretch = size * scale / sides
    return _affine(torch.diag_embed(stretch), (size - 1) / 2 - stretch * center)


def crop_whole(sizes: Sequence[tuple[int, int]], size: int) -> Tensor:
    """Matrix float64 [B, 3, 3] that puts whole images of (height, width) into the middle of a square crop."""
    boxes = [(-0.5, -0.5, width - 0.5, height - 0.5) for height, width in sizes]
    return crop_box(torch.tensor(boxes, dtype=torch.float64), size, square=True)


def crop_face(
    sizes: Sequence[tuple[int, int]],
    size: int,
    *,
    points: Tensor | None = None,
    boxes: Tensor | None = None,
    box_scale: float = 1.0,
) -> Tensor:
    """Matrix float64 [B, 3, 3] of the crops of faces: from their points, else their boxes, else of whole images.

    Args:
        sizes: (height, width) of the images. size: of the crops.
        points: float [B, 5, 2], see `align_to_points`. boxes: float [B, 4], see `crop_box`; they are made square.

    Raises:
        ValueError: points or boxes that cannot be used.
    """
    if points is not None:
        return align_to_points(points.double(), size)
    if boxes is not None:
        return crop_box(boxes.double(), size, scale=box_scale, square=True)
    return crop_whole(sizes, size)


def random_similarity(
    draws: Draws,
    size: int,
    *,
    shift: float,
    rotation: float,
    scale: float,
    mean_scale: float = 1.0,
    normal: bool,
) -> Tensor:
    """Random moves of a crop about its centre, float64 [B, 3, 3]; to be multiplied onto a matrix from the left.

    Args:
        draws: of B samples.
        shift: uniform within +- this share of the side. rotation: radians. scale: around `mean_scale`.
        normal: rotation and scale are normal with these deviations (FaRL's parsing), else uniform within +- them.
    """
    moves = draws.uniform(-shift, shift, (2,)).double() * size
    if normal:
        angle, factor = draws.normal(0, rotation), draws.normal(mean_scale, scale)
    else:
        angle, factor = draws.uniform(-rotation, rotation), draws.uniform(mean_scale - scale, mean_scale + scale)
    angle, factor = angle.double(), factor.double().clamp(min=0.1)
    cosine, sine = factor * angle.cos(), factor * angle.sin()
    linear = torch.stack([cosine, -sine, sine, cosine], 1).unflatten(1, (2, 2))
    middle = torch.full((2,), (size - 1) / 2, dtype=torch.float64)
    return _affine(linear, middle + moves - linear @ middle)


class RoiWarp:
    """A batch of crops: pixels of image b to pixels of its crop and back, both differentiable.

    After the matrix, coordinates of the crop run from -1 to 1. The part |u| <= 1 - w stays; beyond it, on each axis,
    u becomes sign(u) * (1 - w + w * tanh((|u| - 1 + w) / w)), so that the crop holds the whole plane. w = 1 is the
    tanh-warp of "Face Parsing with RoI Tanh-Warping" (Lin et al. 2019), w = 0.8 what FaRL uses on LaPa, 0 a crop.

    FaRL's training code normalises with x / W instead of (x + 0.5) / W: half a pixel in the rim alone.

    Args:
        matrices: float [B, 3, 3], affine, from pixels of an image to pixels of the crop.
        size: side of the crop in pixels.
        factor: w, from 0 to 1.
    """

    def __init__(self, matrices: Tensor, size: int, factor: float = 0.0) -> None:
        if matrices.ndim != 3 or matrices.shape[1:] != (3, 3):
            raise ValueError(f"matrices must be [B, 3, 3], not {list(matrices.shape)}")
        if size < 1 or not 0 <= factor <= 1:
            raise ValueError(f"size must be positive and factor 0 to 1, not {size} and {factor}")
        self.matrices, self.size, self.factor = matrices, size, factor
        self._known_source: Tensor | None = None

    def __len__(self) -> int:
        return len(self.matrices)

    def __getitem__(self, which: slice | list[int]) -> RoiWarp:
        """Some of the crops."""
        return RoiWarp(self.matrices[which], self.size, self.factor)

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> RoiWarp:
        return RoiWarp(self.matrices.to(device, dtype, non_blocking=True), self.size, self.factor)

    def points(self, points: Tensor) -> Tensor:
        """Pixels of the images [B, N, 2] to pixels of the crops [B, N, 2]."""
        crop = _apply(self.matrices, points)
        if not self.factor:
            return crop
        u = (crop + 0.5) * (2 / self.size) - 1
        return (_squash(u, self.factor) + 1) * (self.size / 2) - 0.5

    def points_back(self, points: Tensor) -> Tensor:
        """Pixels of the crops [B, N, 2] to pixels of the images; exact but within RIM * w of the crop's edges."""
        if self.factor:
            points = self._stretched(points)
        return _apply(torch.linalg.inv_ex(self.matrices)[0], points)

    def images(self, images: Sequence[Tensor] | Tensor, *, shrink: Sequence[int] | None = None) -> Tensor:
        """Crops [B, C, S, S] of float images [C, H, W] of any sizes, bilinear; 0 outside.

        Args:
            shrink: for each image, average blocks of so many pixels a side first, against aliasing (see `shrink`).
        """
        points, crops = self._source(), {}
        for (height, width, k), members in _groups(
            (*image.shape[-2:], k) for image, k in zip(images, shrink or [1] * len(self), strict=True)
        ).items():
            batch = torch.stack([images[i] for i in members])
            edges = batch.new_tensor([width, height])
            if k > 1:
                # Blocks of the last row and column may be cut short; then they are means of fewer pixels.
                batch = F.avg_pool2d(batch, k, ceil_mode=True)
                edges = k * edges.new_tensor([batch.shape[-1], batch.shape[-2]])
            grid = ((points[members] + 0.5) * (2 / edges) - 1).to(batch.dtype)
            crop = F.grid_sample(batch, grid.unflatten(1, (self.size, self.size)), align_corners=False)
            crops |= dict(zip(members, crop, strict=True))
        return torch.stack([crops[i] for i in range(len(self))])

    def shrink(self) -> list[int]:
        """For each crop, the whole number of image pixels under the side of one pixel of the crop, at least 1.

        Reads the matrices, so call it while they are on the CPU, or it waits for the device. FaRL does without.
        """
        scale = torch.linalg.det(self.matrices[:, :2, :2].double()).abs().sqrt().tolist()
        return [max(1, math.floor(1 / value)) for value in scale]

    def labels(self, labels: Sequence[Tensor] | Tensor, *, outside: int = 0) -> Tensor:
        """Crops [B, S, S] of label maps [H, W] of any sizes, nearest pixel; `outside` beyond the image."""
        nearest = self._source().add(0.5).floor().long()
        crops = []
        for (x, y), label in zip(nearest.movedim(-1, 1), labels, strict=True):
            height, width = label.shape
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            found = label[y.clamp(0, height - 1), x.clamp(0, width - 1)]
            crops.append(found.masked_fill(~inside, outside).view(self.size, self.size))
        return torch.stack(crops)

    def back(self, maps: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Maps of the crops [B, C, s, s] (any s) as [C, H, W] of the images of (height, width), bilinear.

        0 where the crop does not reach; with logits, argmax is class 0 there.
        """
        found: dict[int, Tensor] = {}
        for (height, width), members in _groups(sizes).items():
            rows, columns = (
                torch.arange(n, dtype=self.matrices.dtype, device=self.matrices.device) for n in (height, width)
            )
            pixels = _pixels(rows, columns).expand(len(members), -1, -1)
            grid = (self[members].points(pixels) + 0.5) * (2 / self.size) - 1
            images = F.grid_sample(
                maps[members], grid.unflatten(1, (height, width)).to(maps.dtype), align_corners=False
            )
            found |= dict(zip(members, images, strict=True))
        return [found[i] for i in range(len(self))]

    def _source(self) -> Tensor:
        """Where in the images the pixels of the crops lie: [B, S * S, 2]."""
        if self._known_source is not None:
            return self._known_source
        axis = torch.arange(self.size, dtype=self.matrices.dtype, device=self.matrices.device)
        if self.factor:
            # Both axes are the same and independent, so one row is enough for the expensive part.
            axis = self._stretched(axis)
        source = _apply(torch.linalg.inv_ex(self.matrices)[0], _pixels(axis, axis).expand(len(self), -1, -1))
        if not self.matrices.requires_grad:
            self._known_source = source  # images and labels ask for the same
        return source

    def _stretched(self, crop: Tensor) -> Tensor:
        """Coordinates of the crop before the rim was compressed."""
        u = (crop + 0.5) * (2 / self.size) - 1
        return (_stretch(u, self.factor) + 1) * (self.size / 2) - 0.5


def _squash(u: Tensor, w: float) -> Tensor:
    rim = 1 - w + w * torch.tanh((u.abs() - 1 + w) / w)
    return torch.where(u.abs() <= 1 - w, u, rim * u.sign())


def _stretch(u: Tensor, w: float) -> Tensor:
    # The lower bound keeps the gradient of the branch that is not taken finite.
    rim = 1 - w + w * torch.atanh(((u.abs() - 1 + w) / w).clamp(0, 1 - RIM))
    return torch.where(u.abs() <= 1 - w, u, rim * u.sign())


def _affine(linear: Tensor, shift: Tensor) -> Tensor:
    last = shift.new_tensor([0.0, 0.0, 1.0]).expand(len(shift), 1, 3)
    return torch.cat([torch.cat([linear, shift[..., None]], 2), last], 1)


def _apply(matrices: Tensor, points: Tensor) -> Tensor:
    return points @ matrices[:, :2, :2].mT + matrices[:, None, :2, 2]


def _pixels(y: Tensor, x: Tensor) -> Tensor:
    """All points of a grid [len(y) * len(x), 2], row by row."""
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([columns, rows], -1).flatten(0, 1)


def _groups(keys: Iterable[tuple[int, ...]]) -> dict[tuple[int, ...], list[int]]:
    """Positions by key, so that what is alike goes through the device in one call."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, key in enumerate(keys):
        groups[tuple(map(int, key))].append(i)
    return groups


def to_device(array: NDArray[np.uint8], device: torch.device) -> Tensor:
    """The same values as a tensor on `device`."""
    # A copy where needed: torch warns of arrays that cannot be written.
    return torch.from_numpy(np.require(array, requirements=["C", "W"])).to(device, non_blocking=True)


def image_to_device(image: NDArray[np.uint8], device: torch.device) -> Tensor:
    """uint8 [H, W, 3] to float [3, H, W] in 0..1 on `device`, as `RoiWarp.images` takes it."""
    return to_device(image, device).movedim(-1, 0).float() / 255
