"""Augmentation as a pure function of (seed, sample, view): crop box, flip and colour jitter.

A batch draws its uniform numbers at once (`CropPlan.parameters`); a decoder turns one sample's row of them into a box
when it has read the size in the image header (`CropPlan.box`). Any decoder that follows box, flip and jitter gives
the same picture, and nothing of them needs saving.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from farl_engine.data.counter_rng import combine, unit_floats

# Streams keep the draws of different purposes apart, so that adding one never moves another.
STREAM_CROP = 1
STREAM_JITTER = 2

# As in torchvision's RandomResizedCrop.get_params.
_TRIES = 10
_FLIP, _TOP, _LEFT, _FIRST_TRY = 0, 1, 2, 3
_CROP_NUMBERS = _FIRST_TRY + 2 * _TRIES
_JITTER_NUMBERS = 3

# A box may move by at most 1/128 of its shorter side to land on a grid on which JPEGs decode at reduced size.
_GRID_SIDE = 128
_GRIDS = (8, 4, 2)

_GRAY = np.array([0.299, 0.587, 0.114], np.float32)


def uniforms(seed: int, ids: ArrayLike, views: ArrayLike, count: int, stream: int) -> NDArray[np.float64]:
    """Uniform numbers of the counters (seed, stream, id, view, column).

    Args:
        seed: any integer.
        ids, views: int64 [n].
        count: numbers a sample.
        stream: purpose of the numbers; streams are independent of each other.

    Returns:
        float64 [n, count] in [0, 1). A larger `count` only adds columns.
    """
    rows = combine(seed, stream, ids, views)
    return unit_floats(combine(rows.view(np.int64)[:, None], np.arange(count)))


class Plan(Protocol):
    """What decoders and the loader need of a `CropPlan`."""

    def parameters(self, seed: int, ids: ArrayLike, views: ArrayLike) -> NDArray[np.float64]: ...
    def box(self, parameters: ArrayLike | None, width: int, height: int) -> tuple[int, int, int, int]: ...
    def flips(self, parameters: ArrayLike | None) -> bool: ...
    def jitter(self, parameters: ArrayLike | None) -> tuple[float, float, float] | None: ...


@dataclass(frozen=True)
class CropPlan:
    """RandomResizedCrop with a horizontal flip and colour jitter.

    Attributes:
        scale: range of the box's share of the image's area.
        ratio: range of the box's width / height, drawn log-uniformly.
        flip: probability of a horizontal flip.
        color_jitter: strength j; brightness, contrast and saturation are each scaled by U(1 - j, 1 + j), in this
            order.
        jpeg_grid: boxes whose shorter side is at least 256, 512 or 1024 pixels are moved to multiples of 2, 4 or 8,
            so that the decoder may take JPEGs at reduced size. Off, boxes are exactly torchvision's.

    Raises:
        ValueError: a range that is empty or out of bounds.
    """

    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    color_jitter: float = 0.0
    jpeg_grid: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be 0 < low <= high <= 1, got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise ValueError(f"ratio must be 0 < low <= high, got {self.ratio}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip must be a probability, got {self.flip}")
        if not 0 <= self.color_jitter <= 1:
            raise ValueError(f"color_jitter must be in 0..1, got {self.color_jitter}")

    def parameters(self, seed: int, ids: ArrayLike, views: ArrayLike) -> NDArray[np.float64]:
        """Raw numbers of each sample, float64 [n, K] in [0, 1); a row goes to `box`, `flips` and `jitter`."""
        crop = uniforms(seed, ids, views, _CROP_NUMBERS, STREAM_CROP)
        if not self.color_jitter:
            return crop
        return np.concatenate([crop, uniforms(seed, ids, views, _JITTER_NUMBERS, STREAM_JITTER)], axis=1)

    def box(self, parameters: ArrayLike | None, width: int, height: int) -> tuple[int, int, int, int]:
        """Crop box (x0, y0, x1, y1) in whole pixels of the upright image (EXIF orientation applied).

        As torchvision's RandomResizedCrop.get_params: ten tries, then the central crop nearest to the wanted ratio.

        Args:
            parameters: one row of `parameters`, or None for the central crop.
            width, height: of the upright image, at least 1.
        """
        if parameters is not None:
            numbers = np.asarray(parameters).tolist()
            for w, h in self._sizes(numbers, width, height):
                return self._on_grid(int(numbers[_LEFT] * (width - w + 1)), int(numbers[_TOP] * (height - h + 1)), w, h)
        w, h = self._largest_size(width, height)
        return self._on_grid((width - w) // 2, (height - h) // 2, w, h)

    def flips(self, parameters: ArrayLike | None) -> bool:
        """Whether the crop is mirrored left to right."""
        return parameters is not None and float(np.asarray(parameters)[_FLIP]) < self.flip

    def jitter(self, parameters: ArrayLike | None) -> tuple[float, float, float] | None:
        """Factors of brightness, contrast and saturation, or None for none."""
        if parameters is None or not self.color_jitter:
            return None
        spread = 2 * np.asarray(parameters)[_CROP_NUMBERS : _CROP_NUMBERS + _JITTER_NUMBERS] - 1
        brightness, contrast, saturation = (1 + self.color_jitter * spread).tolist()
        return brightness, contrast, saturation

    def _sizes(self, numbers: list[float], width: int, height: int) -> Iterator[tuple[int, int]]:
        """Width and height of each try that fits into the image."""
        area = width * height
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for i in range(_FIRST_TRY, _FIRST_TRY + 2 * _TRIES, 2):
            target = area * (self.scale[0] + numbers[i] * (self.scale[1] - self.scale[0]))
            ratio = math.exp(low + numbers[i + 1] * (high - low))
            w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
            if 0 < w <= width and 0 < h <= height:
                yield w, h

    def _largest_size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of the largest box with a permitted ratio."""
        if width / height < self.ratio[0]:
            return width, min(height, max(1, round(width / self.ratio[0])))
        if width / height > self.ratio[1]:
            return min(width, max(1, round(height * self.ratio[1]))), height
        return width, height

    def _on_grid(self, x0: int, y0: int, w: int, h: int) -> tuple[int, int, int, int]:
        """The box (x0, y0, x1, y1) with its edges on the grid of its size."""
        grid = 1
        if self.jpeg_grid:
            grid = next((grid for grid in _GRIDS if min(w, h) >= _GRID_SIDE * grid), 1)
        x0, y0, x1, y1 = (edge // grid * grid for edge in (x0, y0, x0 + w, y0 + h))
        return x0, y0, x1, y1


# For evaluation: the central square, which is "resize the shorter side, then crop the centre" in one resampling.
CENTER = CropPlan(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, jpeg_grid=False)


def color_jitter(image: NDArray[np.uint8], factors: tuple[float, float, float]) -> NDArray[np.uint8]:
    """Scales brightness, contrast and saturation, in this order, by the formulas of torchvision's ColorJitter.

    Args:
        image: uint8 [H, W, 3].
        factors: of brightness, contrast, saturation; 1 changes nothing.

    Returns:
        uint8 [H, W, 3].
    """
    brightness, contrast, saturation = factors
    x = np.minimum(image.astype(np.float32) * np.float32(brightness), 255)
    # The mean of gray as one number a picture (contrast), then gray itself (saturation); ITU-R 601 weights.
    x = _blend(x, np.float32(_gray(x).mean(dtype=np.float64)), contrast)
    x = _blend(x, _gray(x)[..., None], saturation)
    return np.rint(x).astype(np.uint8)


def _gray(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return x @ _GRAY


def _blend(x: NDArray[np.float32], other: NDArray[np.float32] | np.float32, share: float) -> NDArray[np.float32]:
    return np.clip(np.float32(share) * x + np.float32(1 - share) * other, np.float32(0), np.float32(255))
