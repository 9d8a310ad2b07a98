"""Where the faces of an image are: said by a file, or found by a detector that the user names.

A face is a dict with "box", [4] (left, top, right, bottom), and/or "points", [5, 2] (eyes, tip of the nose, corners of
the mouth; the left of the picture first): pixels of the upright image, pixel centres at whole numbers.
"""

from __future__ import annotations

import csv
import importlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from farl.downstream.face_points import FIVE_OF, five_points
from farl.downstream.warp import align_to_points

Face = dict[str, NDArray[np.float64]]
Detector = Callable[[NDArray[np.uint8]], Iterable[Mapping[str, Any]]]
# The square around 68 landmarks in a crop that is aligned to 5 of them: its centre from -1 to 1, its side as a share
# of the crop's; medians over photographs with landmarks set by hand.
LANDMARKS_CENTER, LANDMARKS_SIDE = (0.0, 0.2), 0.52
# Numbers of a CSV row after the image: a box, landmarks, or a box and landmarks.
COUNTS = {4: (4, 0)} | {2 * n: (0, n) for n in FIVE_OF} | {4 + 2 * n: (4, n) for n in FIVE_OF}


def make_face(box: Any = None, points: Any = None) -> Face:
    """A face from a box, from 5, 68, 98 or 106 landmarks [N, 2], or from both.

    Raises:
        ValueError: neither, another shape, something that is no finite number, a box without area or points at one
            place.
    """
    face: Face = {}
    if box is not None:
        face["box"] = _numbers(box, "a box")
        if face["box"].shape != (4,):
            raise ValueError(f"a box has 4 numbers (left, top, right, bottom), not {list(face['box'].shape)}")
        if not (face["box"][2:] > face["box"][:2]).all():
            raise ValueError(f"a box has no area: {face['box'].tolist()} (left, top, right, bottom)")
    if points is not None:
        face["points"] = five_points(_numbers(points, "a face"), "a face").astype(np.float64)
        align_to_points(torch.from_numpy(face["points"])[None], 2)
    if not face:
        raise ValueError("a face needs a box or points")
    return face


def landmarks_box(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """The box [4] in which the landmarks of a face with these five points [5, 2] lie, roughly; upright."""
    size = 512
    matrix = align_to_points(torch.from_numpy(points)[None], size)[0].numpy()
    center = (np.array(LANDMARKS_CENTER) + 1) * (size / 2) - 0.5
    center = np.linalg.solve(matrix, [*center, 1])[:2]
    half = LANDMARKS_SIDE * size / np.sqrt(np.linalg.det(matrix[:2, :2])) / 2
    return np.concatenate([center - half, center + half])


class FaceList:
    """Faces by image, from a file.

    CSV: a row a face, the image and 4 numbers (box), 10 (five points as x y by turns; or 68, 98, 106 points), or the
    box and the points; a first line of names is skipped. JSON: {image: [{"box": [...], "points": [[x, y], ...]}, ...]},
    such as the predictions.json of `farl.predict`; an empty list says that there is no face.

    An image is meant by its name or by as much of its path as the file gives.

    Raises:
        ValueError: another content; the message names the place. OSError: the file cannot be read.
    """

    def __init__(self, file: str | Path) -> None:
        file = Path(file)
        self._faces: dict[tuple[str, ...], list[Face]] = defaultdict(list)
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError(f"{file} is not text: faces are given as CSV or JSON") from None
        (self._read_json if file.suffix.lower() == ".json" else self._read_csv)(file, text)

    def of(self, image: Path) -> list[Face] | None:
        """The faces of an image; None where the file does not name it."""
        parts = Path(os.path.abspath(image)).parts  # noqa: PTH100 - resolve() would follow links to other names
        for first in range(len(parts)):
            if parts[first:] in self._faces:
                return self._faces[parts[first:]]
        return None

    def _read_csv(self, file: Path, text: str) -> None:
        for line, row in enumerate(csv.reader(text.splitlines()), 1):
            fields = [field.strip() for field in row]
            while fields and not fields[-1]:
                fields.pop()
            if not fields or (line == 1 and not any(map(_is_number, fields[1:]))):
                continue
            if len(fields) - 1 not in COUNTS:
                raise ValueError(
                    f"{file}, line {line}: {len(fields) - 1} numbers after the image; wanted 4 (left, top, right, "
                    "bottom), 10 (five points), or both"
                )
            box, points = COUNTS[len(fields) - 1]
            try:
                numbers = np.array(fields[1:], np.float64)
                face = make_face(numbers[:4] if box else None, numbers[box:].reshape(-1, 2) if points else None)
            except ValueError as error:
                raise ValueError(f"{file}, line {line}: {error}") from None
            self._faces[_parts(fields[0])].append(face)

    def _read_json(self, file: Path, text: str) -> None:
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is not JSON: {error}") from None
        images = content.get("images", content) if isinstance(content, dict) else None
        if not isinstance(images, dict) or not all(isinstance(faces, list) for faces in images.values()):
            raise ValueError(f'{file} holds no faces: wanted {{"image.jpg": [{{"box": [4 numbers]}}, ...], ...}}')
        for image, faces in images.items():
            try:
                self._faces[_parts(image)] = [_from_mapping(face) for face in faces]
            except ValueError as error:
                raise ValueError(f"{file}, {image}: {error}") from None


def load_detector(name: str) -> Callable[[NDArray[np.uint8]], list[Face]]:
    """A detector from "module:function", for which any library can serve.

    The function takes a uint8 [H, W, 3] RGB image and gives a mapping with "box" and/or "points" for each face.

    Raises:
        ValueError: no such function. What it gives is checked at each call (ValueError).
    """
    module, _, function = name.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--detector {name}: {error}; wanted MODULE:FUNCTION that can be imported") from None
    if not callable(found):
        raise ValueError(f"--detector {name} is not a function")
    return lambda image: [_from_mapping(face) for face in found(image)]


def _parts(name: str) -> tuple[str, ...]:
    """Of a path as a file gives it, without what leads up from a folder that is not known here."""
    return tuple(part for part in Path(os.path.normpath(name)).parts if part != "..")


def _from_mapping(face: Any) -> Face:
    if not isinstance(face, Mapping):
        raise ValueError('a face is a mapping with "box" and/or "points"')
    return make_face(face.get("box"), face.get("points"))


def _numbers(values: Any, what: str) -> NDArray[np.float64]:
    try:
        numbers = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{what} holds something that is not a number") from None
    if not np.isfinite(numbers).all():
        raise ValueError(f"{what} holds something that is not a finite number")
    return numbers


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
