"""LAION-Face's `sample2detect_N.pth`: what a face detector found in each image.

Each file is a pickled dict, SAMPLE_ID -> list of (box, five points, score), in pixels. It is read once, safely, and its
main faces are kept beside it as plain arrays, `sample2detect_N.faces`, that are mapped into memory afterwards.
"""

from __future__ import annotations

import re
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from farl.data.laion import torch_files
from farl.data.laion.ids import positions
from farl.progress import Progress
from farl_engine.data import array_file

KIND = "laion-face detections"
VERSION = 1
WIDTH = 15  # box, points, score
# Reading a part takes about 3 GB and minutes; small files are not worth a process.
_SMALL_BYTES = 64 << 20
_MAX_FACES = 10_000


class Detections:
    """The main face of each sample that has one: the box whose area times score is largest.

    Attributes:
        damaged: entries that were no faces. ambiguous: ids that came twice with different faces, and are left out.
    """

    def __init__(self, parts: list[tuple[NDArray[np.int64], NDArray[np.float32]]], damaged: int = 0) -> None:
        """`parts`: ids [n] and faces [n, 15] of each part; the faces may be mapped files, and stay so."""
        self.damaged = damaged
        self._faces = [faces for _, faces in parts]
        self._starts = np.cumsum([0] + [len(faces) for faces in self._faces])
        ids = np.concatenate([ids for ids, _ in parts])
        self._rows = np.argsort(ids, kind="stable")
        self._ids = ids[self._rows]
        self.ambiguous = self._drop_repeats()

    def __len__(self) -> int:
        return len(self._ids)

    def find(self, sample_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Faces of these samples, float32 [n, 15], NaN for none: box (x0, y0, x1, y1), five points (x, y) and score,
        in pixels of the image as the detector saw it."""
        places = positions(self._ids, sample_ids)
        found = np.full((len(sample_ids), WIDTH), np.nan, np.float32)
        found[places >= 0] = self._gather(self._rows[places[places >= 0]])
        return found

    def _gather(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        parts = np.searchsorted(self._starts, rows, side="right") - 1
        found = np.empty((len(rows), WIDTH), np.float32)
        for part in np.unique(parts):
            mine = parts == part
            found[mine] = self._faces[part][rows[mine] - self._starts[part]]
        return found

    def _drop_repeats(self) -> int:
        """Leaves each id once, and none that comes with different faces, whichever it means."""
        again = np.flatnonzero(self._ids[1:] == self._ids[:-1]) + 1
        if not len(again):
            return 0
        differs = (self._gather(self._rows[again]) != self._gather(self._rows[again - 1])).any(1)
        bad = np.unique(self._ids[again[differs]])
        keep = ~np.isin(self._ids, bad)
        keep[again] = False
        self._ids, self._rows = self._ids[keep], self._rows[keep]
        return len(bad)


def load_detections(folder: Path, workers: int = 1) -> Detections:
    """All parts in a folder; those not read before are converted first.

    Args:
        folder: holds sample2detect_N.pth, or the .faces files made of them.
        workers: parts converted at once, about 3 GB each.

    Raises:
        ValueError: no such files, or damaged ones. OSError: the folder cannot be written.
    """
    sources = detection_files(folder)
    _convert_all([source for source in sources if not _is_current(source)], workers)
    parts, damaged = [], 0
    for source in sources:
        meta, arrays = array_file.read(_converted(source))
        parts.append((arrays["ids"], arrays["faces"].reshape(-1, WIDTH)))
        damaged += meta["damaged"]
    return Detections(parts, damaged)


def detection_files(folder: Path) -> list[Path]:
    """The .pth files of a folder, also those of which the .faces file alone is left, by part."""
    names: dict[int, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if match := re.fullmatch(r"sample2detect_(\d{1,5})\.(pth|faces)", path.name):
            names[int(match[1])] = path.with_suffix(".pth")
    if not names:
        raise ValueError(f"{folder} holds no sample2detect_N.pth of LAION-Face's detections")
    return [names[number] for number in sorted(names)]


def main_faces(entries: Any, path: Path) -> tuple[NDArray[np.int64], NDArray[np.float32], int]:
    """Ids (ascending), main faces [n, 15] of a loaded part, and the number of entries that were no faces.

    Raises:
        ValueError: the part is no dict.
    """
    if not isinstance(entries, dict):
        raise ValueError(f"{path} holds a {type(entries).__name__}, wanted SAMPLE_ID -> faces")
    ids: list[int] = []
    faces: list[NDArray[np.float32]] = []
    damaged = 0
    for sample_id, found in entries.items():
        try:
            number = _whole(sample_id)
            rows = [_row(face) for face in _faces(found)]
        except (ValueError, TypeError, OverflowError):
            damaged += 1
            continue
        if rows:
            ids.append(number)
            # Captions are about the large faces; a large box of little confidence is often none.
            faces.append(max(rows, key=lambda row: (row[2] - row[0]) * (row[3] - row[1]) * row[14]))
    order = np.argsort(np.array(ids, np.int64), kind="stable")
    stacked = np.array(faces, np.float32).reshape(-1, WIDTH)
    return np.array(ids, np.int64)[order], stacked[order], damaged


def _whole(sample_id: Any) -> int:
    number = int(sample_id)
    if isinstance(sample_id, bool) or number != float(sample_id) or abs(number) >= 2**62:
        raise ValueError("no sample id")
    return number


def _faces(found: Any) -> list[Any]:
    if not isinstance(found, (list, tuple)) or len(found) > _MAX_FACES:
        raise ValueError("no list of faces")
    return list(found)


def _row(face: Any) -> NDArray[np.float32]:
    box, points, score = face
    row = np.concatenate([torch_files.numbers(box)[:4], torch_files.numbers(points), torch_files.numbers(score)])
    if row.shape != (WIDTH,) or not np.isfinite(row).all() or np.abs(row).max() > 1e6:
        raise ValueError("no face")
    if not (row[0] < row[2] and row[1] < row[3]):
        raise ValueError("an empty box")
    return row.astype(np.float32)


def _convert_all(sources: list[Path], workers: int) -> None:
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(len(sources), "reading detections", unit="parts"))
        pool: Executor | None = None
        if workers > 1 and len(sources) > 1 and sum(source.stat().st_size for source in sources) > _SMALL_BYTES:
            context = get_context("spawn")
            pool = stack.enter_context(ProcessPoolExecutor(min(workers, len(sources)), mp_context=context))
        for _ in pool.map(_convert, sources) if pool else map(_convert, sources):
            progress.update()


def _convert(source: Path) -> None:
    stat = source.stat()
    ids, faces, damaged = main_faces(torch_files.load(source, "face detections"), source)
    meta = {"kind": KIND, "version": VERSION, "source": [stat.st_size, stat.st_mtime_ns], "damaged": damaged}
    array_file.write(_converted(source), meta, {"ids": ids, "faces": faces.reshape(-1)})


def _converted(source: Path) -> Path:
    return source.with_suffix(".faces")


def _is_current(source: Path) -> bool:
    """Whether the plain arrays are there and say what the source says, if that is still there."""
    try:
        meta, _ = array_file.read(_converted(source))
        stat = source.stat() if source.exists() else None
        return (meta["kind"], meta["version"]) == (KIND, VERSION) and (
            stat is None or meta["source"] == [stat.st_size, stat.st_mtime_ns]
        )
    except (OSError, ValueError, LookupError, TypeError):
        return False
