"""The five points that crops are aligned to, out of the common sets of landmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# Number of points -> which of them (or whose means) are the eyes, the tip of the nose and the corners of the mouth; the
# left of the picture first. 68: iBUG. 98: WFLW. 106: LaPa (FaRL's choice, `farl/datasets/prepare.py`).
FIVE_OF: dict[int, Sequence[Sequence[int]]] = {
    5: ([0], [1], [2], [3], [4]),
    68: (range(36, 42), range(42, 48), [30], [48], [54]),
    98: ([96], [97], [54], [76], [82]),
    106: ([104], [105], [54], [84], [90]),
}


def five_points(points: NDArray[np.floating], name: str = "") -> NDArray[np.float32]:
    """float32 [5, 2] from 5, 68, 98 or 106 landmarks [N, 2].

    Raises:
        ValueError: another number of points, or one that is not a finite number; `name` says whose.
    """
    if points.ndim != 2 or points.shape[1] != 2 or len(points) not in FIVE_OF:
        known = ", ".join(map(str, FIVE_OF))
        raise ValueError(f"{name}: landmarks of shape {list(points.shape)}; a crop can be made from {known} points")
    five = np.stack([points[list(which)].mean(0) for which in FIVE_OF[len(points)]]).astype(np.float32)
    if not np.isfinite(five).all():
        raise ValueError(f"{name}: a landmark is not a finite number")
    return five


def read_points(path: Path) -> NDArray[np.float32]:
    """Landmarks [N, 2] of a text file: x and y by turns; a first line with their number is allowed (LaPa has one).

    Raises:
        ValueError: something else in it. OSError: it cannot be read.
    """
    try:
        numbers = np.array(path.read_text().split(), np.float32)
    except (ValueError, UnicodeDecodeError):
        raise ValueError(f"{path} is not a list of points: wanted x and y of one point a line") from None
    if len(numbers) % 2:
        count, numbers = numbers[0], numbers[1:]
        if count * 2 != len(numbers):
            raise ValueError(f"{path} announces {count:g} points and has {len(numbers) / 2:g}")
    return numbers.reshape(-1, 2)
