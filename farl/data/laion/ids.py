"""LAION-Face's id list and LAION-400M's sample ids, as sorted arrays."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from farl.data.laion import torch_files

# The parts of LAION-Face that make its 20 M subset (README of FacePerceiver/LAION-Face).
PARTS_20M = (0, 2, 5, 8, 13, 15, 17, 18, 21, 22, 24, 25, 28)
_RANGE = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?")


def load_ids(path: Path) -> list[NDArray[np.int64]]:
    """The sample ids of each part, sorted, each once.

    The file holds a list of parts, each a list of whole numbers (also stored as floats) or a tensor. 50 million ids
    take about 3 GB while they are read, and 0.4 GB after.

    Raises:
        ValueError: it holds something else.
    """
    parts = torch_files.load(path, "lists of sample ids")
    if not isinstance(parts, (list, tuple)) or not parts:
        raise ValueError(f"{path} is no list of parts, each a list of sample ids")
    parts = list(parts)
    found = []
    for number in range(len(parts)):
        try:
            found.append(_sorted_ids(parts[number]))
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"{path}, part {number} is no list of sample ids: {error}") from None
        parts[number] = None  # to free two gigabytes of Python numbers
    return found


def _sorted_ids(part: Any) -> NDArray[np.int64]:
    import torch

    if isinstance(part, torch.Tensor):
        values = part.reshape(-1).numpy()
    elif isinstance(part, torch_files.Array):
        values = part.numbers()
    elif isinstance(part, (list, tuple)):
        if not all(type(value) in (int, float) for value in part):
            raise ValueError("not all are numbers")
        # float64 holds whole numbers up to 2^53; LAION-400M's ids have 13 digits.
        kind = np.float64 if any(type(value) is float for value in part) else np.int64
        values = np.fromiter(part, kind, len(part))
    else:
        raise ValueError(f"it is a {type(part).__name__}")
    with np.errstate(invalid="ignore"):  # NaN, which the comparison finds
        whole = values.astype(np.int64)
    if not np.array_equal(whole, values):
        raise ValueError("not all are whole numbers")
    return np.unique(whole)


def positions(sorted_ids: NDArray[np.int64], values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each of `values` stands in `sorted_ids`, int64 [n]; -1 where it does not."""
    if not len(sorted_ids):
        return np.full(len(values), -1, np.int64)
    places = np.minimum(np.searchsorted(sorted_ids, values), len(sorted_ids) - 1)
    return np.where(sorted_ids[places] == values, places, -1)


def parse_parts(text: str, available: int) -> list[int]:
    """Part numbers of "all", "20m", or a list such as "0,2,5-7"; ValueError if it is none, or past `available`."""
    if text == "all":
        return list(range(available))
    if text == "20m":
        chosen = set(PARTS_20M)
    else:
        chosen = set()
        for word in text.split(","):
            match = _RANGE.fullmatch(word.strip())
            if match is None:
                raise ValueError(f'--parts is {text!r}: wanted "all", "20m" or numbers such as 0,2,5-7')
            first, last = int(match[1]), int(match[2] or match[1])
            chosen.update(range(first, last + 1))
    if beyond := [part for part in sorted(chosen) if part >= available]:
        raise ValueError(f"--parts names part {beyond[0]}, but the id list has {available} (0 to {available - 1})")
    return sorted(chosen)
