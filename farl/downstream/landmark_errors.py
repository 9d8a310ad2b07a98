"""Normalised mean error of landmarks, its cumulative curve (failure rate and area), over a set and its subsets.

All figures are fractions: an NME of 0.03 is what papers print as 3 %. Distances are in pixels of the original images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

# Number of points -> which (or whose means) are the outer corners of the eyes, and the pupils. 68: iBUG; 98: WFLW.
EYE_CORNERS = {68: ([36], [45]), 98: ([60], [72])}
PUPILS = {68: (range(36, 42), range(42, 48)), 98: ([96], [97])}
STEP = 1e-4  # of the cumulative curve
FULL = "full"


def unit_lengths(kind: str, points: Array, boxes: Array) -> Array:
    """What distances are divided by: float64 [B], pixels; 0 where an image gives none.

    Args:
        kind: "diagonal" or "box" (root of the area) of the face's box; "inter_ocular" (outer corners of the eyes) or
            "inter_pupil", which 68 and 98 points have.
        points: true ones [B, N, 2]. boxes: [B, 4] (left, top, right, bottom).
    """
    if kind in ("diagonal", "box"):
        width, height = (boxes[:, 2:] - boxes[:, :2]).T
        return np.hypot(width, height) if kind == "diagonal" else np.sqrt(width * height)
    left, right = {"inter_ocular": EYE_CORNERS, "inter_pupil": PUPILS}[kind][points.shape[1]]
    return np.linalg.norm(points[:, list(left)].mean(1) - points[:, list(right)].mean(1), axis=-1)


class LandmarkErrors:
    """Errors of one pass over a set, held as sums and counts alone, so that those of several processes can be added.

    Figures are "nme_KIND" of each kind, and of the curve "fr_KIND_P" (share of images with an error above P %) and
    "auc_KIND_P" (area under the share of images by error, from 0 to P %, divided by P %); those of a subset end in
    "/SUBSET". An image without a unit length of some kind (a normaliser of 0) is not counted in that kind.

    FaRL's grid for 7 % has a step too many by rounding, which gives its AUC about 0.14 points more than the definition.

    Args:
        kinds: see `unit_lengths`.
        curve: kind and threshold (a multiple of two steps of 1e-4) of the cumulative curve.
        subsets: names of subsets besides the whole set.
    """

    def __init__(self, kinds: Sequence[str], curve: tuple[str, float], subsets: Sequence[str] = ()) -> None:
        self.kinds, self.subsets = tuple(kinds), (FULL, *subsets)
        self.curve_kind, threshold = curve
        self.percent = f"{100 * threshold:g}"
        self.steps = round(threshold / STEP)
        self._grid = np.arange(self.steps + 1) * STEP
        self._sums = np.zeros((len(self.subsets), len(self.kinds)))
        self._counts = np.zeros((len(self.subsets), len(self.kinds)))
        # Images by the first step of the grid that is not below their error; the last bin is beyond the grid.
        self._bins = np.zeros((len(self.subsets), self.steps + 2))

    def update(self, found: Array, points: Array, boxes: Array, subsets: Iterable[Sequence[str]]) -> None:
        """Count images.

        Args:
            found, points: predicted and true ones, float64 [B, N, 2] in pixels of the originals.
            boxes: [B, 4]. subsets: for each image the names of its subsets; others than this object's are left out.
        """
        distances = np.linalg.norm(found - points, axis=-1).mean(-1)
        names = list(subsets)
        member = np.array([[subset == FULL or subset in own for own in names] for subset in self.subsets], np.float64)
        for column, kind in enumerate(self.kinds):
            units = unit_lengths(kind, points, boxes)
            counted = units > 0
            errors = np.divide(distances, units, out=np.zeros_like(distances), where=counted)
            self._sums[:, column] += member @ errors
            self._counts[:, column] += member @ counted
            if kind == self.curve_kind:
                bins = np.searchsorted(self._grid, errors, side="left")
                for row, inside in enumerate(member.astype(bool)):
                    self._bins[row] += np.bincount(bins[inside & counted], minlength=self.steps + 2)

    def state(self) -> Tensor:
        """All sums and counts, float64 [subsets * (2 * kinds + bins)]."""
        return torch.from_numpy(np.concatenate([part.ravel() for part in (self._sums, self._counts, self._bins)]))

    def load_state(self, state: Tensor) -> None:
        """Put back what `state` gave, or a sum of several."""
        values = state.double().cpu().numpy()
        first, second = self._sums.size, self._sums.size + self._counts.size
        self._sums = values[:first].reshape(self._sums.shape).copy()
        self._counts = values[first:second].reshape(self._counts.shape).copy()
        self._bins = values[second:].reshape(self._bins.shape).copy()

    def compute(self) -> dict[str, float]:
        """All figures; NaN where no image was counted."""
        figures = {}
        for row, subset in enumerate(self.subsets):
            suffix = "" if subset == FULL else f"/{subset}"
            for column, kind in enumerate(self.kinds):
                count = self._counts[row, column]
                figures[f"nme_{kind}{suffix}"] = float(self._sums[row, column] / count) if count else math.nan
            failed, area = self._curve(self._bins[row])
            figures[f"fr_{self.curve_kind}_{self.percent}{suffix}"] = failed
            figures[f"auc_{self.curve_kind}_{self.percent}{suffix}"] = area
        return figures

    def _curve(self, bins: Array) -> tuple[float, float]:
        """Failure rate, and area by Simpson's rule over the grid."""
        count = bins.sum()
        if not count:
            return math.nan, math.nan
        shares = np.cumsum(bins)[: self.steps + 1] / count
        weights = np.full(self.steps + 1, 2.0)
        weights[1::2], weights[0], weights[-1] = 4, 1, 1
        return float(1 - shares[-1]), float(weights @ shares / 3 / self.steps)
