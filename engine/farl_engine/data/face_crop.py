"""Crops that keep a known face: the random crop of `CropPlan`, placed so that the sample's main face stays inside.

Faces come from one array file, a row a sample in the order of the index. Coordinates are shares of the upright
image's width and height (EXIF orientation applied), so they hold for a copy of any size.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from farl_engine.data import array_file
from farl_engine.data.augment import _LEFT, _TOP, CropPlan

KIND = "farl face boxes"
VERSION = 1
_COLUMNS = {"box": 4, "points": 10, "score": 1}


@dataclass(frozen=True)
class FaceBoxes:
    """The main face of each of N samples; of a sample without one all numbers are NaN.

    Attributes:
        box: float32 [N, 4], (x0, y0, x1, y1) as shares of width and height, 0 <= x0 < x1 <= 1.
        points: float32 [N, 10], (x, y) of left eye, right eye, nose, left and right corner of the mouth, as seen in the
            picture; they may lie outside it.
        score: float32 [N], the detector's confidence.
        meta: what the file says of itself: "fingerprint" and "samples" of the index, counts.
    """

    box: NDArray[np.float32]
    points: NDArray[np.float32]
    score: NDArray[np.float32]
    meta: dict[str, Any]

    def __len__(self) -> int:
        return len(self.score)

    def check(self, fingerprint: str, num_samples: int) -> None:
        """Raises ValueError if the faces are those of other data than the index with this fingerprint."""
        if (self.meta["fingerprint"], len(self)) != (fingerprint, num_samples):
            raise ValueError(
                f"the face boxes are of {len(self):,} samples with fingerprint {str(self.meta['fingerprint'])[:12]}, "
                f"but the data has {num_samples:,} with {fingerprint[:12]}: "
                "run `python -m farl.data laion faces` on this data"
            )


def read_face_boxes(path: str | os.PathLike[str]) -> FaceBoxes:
    """Face boxes mapped from a file that `write_face_boxes` made; nothing in it is executed.

    Raises:
        ValueError: another kind of file, or a damaged one. OSError: it cannot be read.
    """
    try:
        meta, arrays = array_file.read(Path(path))
        num_samples = int(meta["samples"])
        if meta["kind"] != KIND or meta["version"] != VERSION:
            raise ValueError(f"it is {meta['kind']!r}, version {meta['version']}")
        columns = {name: arrays[name].reshape(num_samples, width) for name, width in _COLUMNS.items()}
        if any(column.dtype != np.float32 for column in columns.values()):
            raise ValueError("its numbers are not float32")
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{os.fspath(path)} is not a file of face boxes: {error}") from None
    return FaceBoxes(columns["box"], columns["points"], columns["score"][:, 0], meta)


def write_face_boxes(
    path: str | os.PathLike[str],
    box: NDArray[np.float32],
    points: NDArray[np.float32],
    score: NDArray[np.float32],
    meta: Mapping[str, Any],
) -> None:
    """Writes arrays as in `FaceBoxes`; `meta` needs "fingerprint", the rest is free (plain JSON values)."""
    arrays = {"box": box.reshape(-1), "points": points.reshape(-1), "score": score}
    array_file.write(Path(path), {**meta, "kind": KIND, "version": VERSION, "samples": len(score)}, arrays)


@dataclass(frozen=True)
class FaceCropPlan(CropPlan):
    """`CropPlan` that keeps the main face of a sample wholly inside the crop.

    The draws are CropPlan's own: the first of its ten sizes into which the face fits, placed by its two numbers among
    the places that hold the face. Where no size fits, it is the largest box of a permitted ratio; where not even that
    is as wide or as high as the face, as much of the face is inside as can be. A sample without a face gets exactly
    CropPlan's box.

    Attributes:
        faces: float32 [N, 4] boxes of all samples, as in `FaceBoxes.box`; NaN for none.
        keep: share of the face's area that must stay inside, the middle of the box; 1 keeps all.

    Raises:
        ValueError: `keep` outside (0, 1], or faces of another shape.
    """

    faces: NDArray[np.float32] = field(kw_only=True, repr=False, compare=False)
    keep: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must be more than 0 and at most 1, got {self.keep}")
        if self.faces.ndim != 2 or self.faces.shape[1] != 4:
            raise ValueError(f"faces must be [N, 4], got {list(self.faces.shape)}")

    def parameters(self, seed: int, ids: ArrayLike, views: ArrayLike) -> NDArray[np.float64]:
        """CropPlan's numbers and, in the last four columns, the face's box (NaN for none)."""
        faces = self.faces[np.asarray(ids, np.int64)].astype(np.float64)
        return np.concatenate([super().parameters(seed, ids, views), faces], axis=1)

    def box(self, parameters: ArrayLike | None, width: int, height: int) -> tuple[int, int, int, int]:
        """Crop box (x0, y0, x1, y1) in whole pixels of the upright image."""
        if parameters is None:
            return super().box(None, width, height)
        numbers = np.asarray(parameters).tolist()
        face = self._face(numbers[-4:], width, height)
        if face is None:
            return super().box(numbers, width, height)
        x0, y0, x1, y1 = face
        w, h = self._largest_size(width, height)
        for try_w, try_h in self._sizes(numbers, width, height):
            if try_w >= x1 - x0 and try_h >= y1 - y0:
                w, h = try_w, try_h
                break
        left = _place(numbers[_LEFT], x0, x1, w, width)
        top = _place(numbers[_TOP], y0, y1, h, height)
        box = self._on_grid(left, top, w, h)
        # The grid may shave off the last pixels of a face at the edge; such a crop is taken as it is.
        if _holds(box, face) or not _holds((left, top, left + w, top + h), face):
            return box
        return left, top, left + w, top + h

    def _face(self, shares: list[float], width: int, height: int) -> tuple[int, int, int, int] | None:
        """The pixels that must stay inside, or None without a face."""
        x0, y0, x1, y1 = shares
        if not (x0 < x1 and y0 < y1):  # NaN compares false
            return None
        shrink = (1 - math.sqrt(self.keep)) / 2
        dx, dy = shrink * (x1 - x0), shrink * (y1 - y0)
        left, top = math.floor((x0 + dx) * width), math.floor((y0 + dy) * height)
        right, bottom = math.ceil((x1 - dx) * width), math.ceil((y1 - dy) * height)
        left, top, right, bottom = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
        return (left, top, right, bottom) if left < right and top < bottom else None


def _place(number: float, first: int, last: int, size: int, whole: int) -> int:
    """Start of a span of `size` in 0..`whole`, chosen by `number` in [0, 1): it holds first..last, or is held by it."""
    ends = last - size, first
    low, high = max(min(ends), 0), min(max(ends), whole - size)
    return low + int(number * (high - low + 1))


def _holds(box: tuple[int, int, int, int], face: tuple[int, int, int, int]) -> bool:
    return box[0] <= face[0] and box[1] <= face[1] and box[2] >= face[2] and box[3] >= face[3]
