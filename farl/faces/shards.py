"""Writes faces as ordinary image-text shards, drawn by several processes, in the order of their index."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from farl.faces.face import draw

VALIDATION_START = 500_000_000  # held-out faces have indices from here on, whatever the number of training faces
MANIFEST = "faces.json"
FORMAT = 1  # raise it when the drawing changes: shards of another format are not taken for these


@dataclass(frozen=True)
class FaceSet:
    """What a set of shards holds."""

    train: int = 4000
    val: int = 500
    size: int = 96
    seed: int = 0
    samples_per_shard: int = 1000

    def __post_init__(self) -> None:
        for name in ("train", "val", "seed"):
            if not 0 <= getattr(self, name) < VALIDATION_START:
                raise ValueError(f"{name} must be 0 to {VALIDATION_START - 1}, got {getattr(self, name)}")
        if self.train + self.val == 0:
            raise ValueError("train and val are both 0: nothing to draw")
        if not 32 <= self.size <= 1024:
            raise ValueError(f"size must be 32 to 1024 pixels, got {self.size}")
        if self.samples_per_shard < 1:
            raise ValueError(f"samples_per_shard must be at least 1, got {self.samples_per_shard}")


Sample = tuple[str, dict[str, bytes], dict[str, bool]]


def encode(index: int, *, seed: int, size: int) -> Sample:
    """Key, members by extension, and attributes of one face."""
    face = draw(index, seed=seed, size=size)
    points = [[round(x, 2), round(y, 2)] for x, y in face.landmarks.tolist()]
    members = {
        "jpg": face.jpeg(),
        "txt": face.caption.encode(),
        "json": json.dumps({name: int(value) for name, value in face.attributes.items()}).encode(),
        # Not plain .png: that would be a second image of the same key.
        "mask.png": face.mask_png(),
        "landmarks.json": json.dumps(points).encode(),
    }
    return f"{index:09d}", members, face.attributes


def write_faces(
    out: str | Path,
    faces: FaceSet | None = None,
    *,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> bool:
    """Writes `train-000000.tar`..., `val-000000.tar`... and the attribute tables into the folder `out`.

    Args:
        out: folder, made if absent.
        workers: drawing processes; 0 draws in this one, None takes one a core (at most 16).
        overwrite: replace the shards of another run; without it they are left and an error is raised.
        progress: called with the number of faces that came since the last call.

    Returns:
        False if the folder already holds exactly this set, which is then left alone.

    Raises:
        ValueError: bad numbers, or shards of another set in `out`. OSError: `out` cannot be written.
    """
    from farl_engine.data.shards import ShardWriter

    faces, folder = faces or FaceSet(), Path(out)
    if workers is not None and workers < 0:
        raise ValueError(f"workers must be 0 or more, got {workers}")
    workers = min(os.cpu_count() or 1, 16) if workers is None else workers
    manifest = json.dumps({"format": FORMAT, **asdict(faces)}, indent=1) + "\n"
    if not _prepare(folder, manifest, overwrite):
        return False
    tables: list[list[list[str | int]]] = []
    names: list[str] = []
    for split, start, count in (("train", 0, faces.train), ("val", VALIDATION_START, faces.val)):
        rows: list[list[str | int]] = []
        with ShardWriter(folder / f"{split}-%06d.tar", faces.samples_per_shard) as writer:
            for key, members, attributes in _encoded(range(start, start + count), faces, workers):
                writer.write(key, members)
                names = list(attributes)
                rows.append([key, *map(int, attributes.values())])
                if progress:
                    progress(1)
        tables.append(rows)
    for name, rows in (("train", tables[0]), ("val", tables[1]), ("", tables[0] + tables[1])):
        if rows:
            _write_table(folder / f"attributes{'-' * bool(name)}{name}.csv", names, rows)
    # Last, so that a folder with a manifest is a whole one.
    _replace(folder / MANIFEST, manifest)
    return True


def _prepare(folder: Path, manifest: str, overwrite: bool) -> bool:
    """Makes the folder ready; False if the set is there already."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(13, "no permission to write", str(folder))
    old = sorted([*folder.glob("train-*.tar"), *folder.glob("val-*.tar")])
    done = folder / MANIFEST
    if done.exists() and done.read_text() == manifest and not overwrite:
        return False
    if old and not overwrite and done.exists():
        raise ValueError(f"{folder} holds other shards ({old[0].name}, ...): choose another --out or add --overwrite")
    if old and not overwrite and not _ours(old[0]):
        raise ValueError(f"{folder} holds shards of something else ({old[0].name}): choose another --out")
    for path in [done, *old]:
        path.unlink(missing_ok=True)
    return True


def _ours(path: Path) -> bool:
    """Whether a shard without a manifest is what an interrupted run of ours left."""
    with path.open("rb") as file:
        return file.read(9) in (b"000000000", str(VALIDATION_START).encode())


def _encoded(indices: range, faces: FaceSet, workers: int) -> Iterator[Sample]:
    task = partial(encode, seed=faces.seed, size=faces.size)
    if workers == 0 or len(indices) < 2 * workers:
        yield from map(task, indices)
        return
    # Spawn: the parent may hold threads, which a fork would copy in any state.
    with multiprocessing.get_context("spawn").Pool(min(workers, len(indices))) as pool:
        yield from pool.imap(task, indices, chunksize=8)


def _write_table(path: Path, names: list[str], rows: list[list[str | int]]) -> None:
    lines = [",".join(["key", *names]), *(",".join(map(str, row)) for row in rows)]
    _replace(path, "\n".join(lines) + "\n")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    temporary.replace(path)
