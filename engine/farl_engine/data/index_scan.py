"""Builds the arrays of an index: scans shards in threads, keeps what is done, takes what other indexes know.

A scan of thousands of shards may take an hour, so what was scanned is kept every few seconds in part files beside the
index, and a shard that is in any index or part file of the folder, unchanged, is not scanned again: neither after an
interruption nor when a set grows.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from farl_engine.data import array_file
from farl_engine.data.shards import scan_shard
from farl_engine.data.tar_members import BLOCK

VERSION = 2
# dtype of each column that has a row a sample. Tars place members at multiples of 512 bytes, so 32 bits reach 2 TiB;
# `key_ends` counts from the first key of the sample's own shard.
COLUMNS = {
    "image_block": "<u4",
    "image_size": "<u4",
    "caption_block": "<u4",
    "caption_size": "<u4",
    "flags": "|u1",
    "key_ends": "<u4",
}
# Reading headers is Python, one core's worth at best; the threads hide the latency of networked file systems.
_THREADS = 16
_KEEP_SECONDS = 15.0

Arrays = dict[str, NDArray[Any]]
# [path relative to the index's folder, size, modification time, ...]; equal states mean an unchanged shard.
State = list[Any]

logger = logging.getLogger("farl_engine.data")


class Bar(Protocol):
    """What shows the progress of a long job."""

    def update(self, count: int = 1) -> object: ...
    def close(self) -> object: ...


# Called with the total, a description and the unit's name.
BarMaker = Callable[..., Bar]


@dataclass
class ShardRows:
    """One shard's rows of the columns, its keys one after the other, and its problems by cause."""

    columns: Arrays
    key_bytes: NDArray[np.uint8]
    problems: dict[str, int]

    @property
    def lasting(self) -> bool:
        """A shard that could not be read may be readable next time, with neither size nor time changed."""
        return "unreadable_shard" not in self.problems


@contextlib.contextmanager
def show_progress(progress: bool | BarMaker, total: int, description: str, unit: str) -> Iterator[Bar | None]:
    """A bar from `progress` itself, from tqdm (True), or none (False), closed at the end."""
    if progress is False or total == 0:
        yield None
        return
    if progress is True:
        from tqdm import tqdm

        # No bar where stderr is not a terminal, nor for what is done in a moment.
        bar: Any = tqdm(total=total, desc=description, unit=unit, disable=None, delay=1)
    else:
        bar = progress(total, description, unit=unit)
    try:
        yield bar
    finally:
        bar.close()


def scan(path: Path) -> ShardRows:
    """Rows of a shard, from its headers.

    Raises:
        ValueError: its exclusion list is damaged, or it is larger than 2 TiB.
    """
    found = scan_shard(path)
    offsets = {"image_block": found.image_offset, "caption_block": found.caption_offset}
    columns: Arrays = {}
    for name, dtype in COLUMNS.items():
        if name in offsets:
            if len(offsets[name]) and int(offsets[name].max()) // BLOCK >> 32:
                raise ValueError(f"{path} is larger than 2 TiB: split it into smaller shards")
            columns[name] = (offsets[name] // BLOCK).astype(dtype)
        elif name == "key_ends":
            columns[name] = np.cumsum([len(key) for key in found.keys], dtype=dtype)
        else:
            columns[name] = getattr(found, name).astype(dtype)
    return ShardRows(columns, np.frombuffer(b"".join(found.keys), np.uint8), dict(found.problems))


def gather(
    paths: Sequence[Path], states: Sequence[State], index_path: Path, *, keep: bool, progress: bool | BarMaker
) -> list[ShardRows]:
    """Rows of all shards, in order; only those that nothing in the folder of `index_path` knows are scanned.

    Args:
        keep: read and write part files.
    """
    known = _known_rows(index_path.parent, states) if keep else {}
    rows: dict[int, ShardRows] = {i: known[key] for i, state in enumerate(states) if (key := _key(state)) in known}
    missing = [i for i in range(len(paths)) if i not in rows]
    fresh: list[int] = []
    last_kept = time.monotonic()

    def keep_fresh() -> None:
        nonlocal last_kept
        lasting = [i for i in fresh if rows[i].lasting]
        if keep and lasting:
            part = _write_part(index_path, [states[i] for i in lasting], [rows[i] for i in lasting])
            # From the file, so that a long scan does not gather everything in memory.
            rows.update({i: part[key] for i in lasting if (key := _key(states[i])) in part})
        fresh.clear()
        last_kept = time.monotonic()

    with show_progress(progress, len(paths), "index", "shards") as bar:
        if bar is not None and rows:
            bar.update(len(rows))
        try:
            for i, scanned in _scan_all(paths, missing):
                rows[i] = scanned
                fresh.append(i)
                if bar is not None:
                    bar.update(1)
                if time.monotonic() - last_kept > _KEEP_SECONDS:
                    keep_fresh()
        except BaseException:
            keep_fresh()
            raise
    if not all(one.lasting for one in rows.values()):
        # No index will be written, so the next start goes by the parts.
        keep_fresh()
    return [rows[i] for i in range(len(paths))]


def assemble(rows: Sequence[ShardRows]) -> tuple[dict[str, Any], dict[str, list[NDArray[Any]]]]:
    """Meta of an index and the pieces of its arrays."""
    digest = hashlib.blake2b(digest_size=16)
    for one in rows:
        lengths = np.diff(one.columns["key_ends"].astype("<i8"), prepend=0)
        for part in (lengths, one.key_bytes, one.columns["image_size"], one.columns["caption_size"]):
            digest.update(part.tobytes())
    counts = [len(one.columns["flags"]) for one in rows]
    meta = {
        "fingerprint": digest.hexdigest(),
        "shard_starts": np.cumsum([0, *counts])[:-1].tolist(),
        "key_starts": np.cumsum([0, *(len(one.key_bytes) for one in rows)])[:-1].tolist(),
        "problems": {str(i): one.problems for i, one in enumerate(rows) if one.problems},
    }
    pieces = {name: [one.columns[name] for one in rows] for name in COLUMNS}
    return meta, {**pieces, "key_bytes": [one.key_bytes for one in rows]}


def remove_parts(index_path: Path) -> None:
    """Removes the part files of an index, which has been written."""
    for part in index_path.parent.glob(f".{glob.escape(index_path.name)}.part-*"):
        part.unlink(missing_ok=True)


def _scan_all(paths: Sequence[Path], numbers: Sequence[int]) -> Iterator[tuple[int, ShardRows]]:
    """(number, rows) of shards as they are done."""
    if not numbers:
        return
    pool = ThreadPoolExecutor(min(_THREADS, len(numbers)), thread_name_prefix="farl-index")
    waiting = iter(numbers)
    # Few at a time, so that an interruption does not wait for all.
    running: dict[Future[ShardRows], int] = {
        pool.submit(scan, paths[number]): number for number in islice(waiting, 2 * _THREADS)
    }
    try:
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            # A failure ends this; what is done beside it is kept.
            for future in sorted(done, key=lambda future: future.exception() is not None):
                yield running.pop(future), future.result()
                running.update({pool.submit(scan, paths[number]): number for number in islice(waiting, 1)})
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _write_part(index_path: Path, states: Sequence[State], rows: Sequence[ShardRows]) -> dict[str, ShardRows]:
    """Writes scanned shards into a part file and returns their rows mapped from it; {} where it cannot be written."""
    digest = hashlib.blake2b(json.dumps(states).encode(), digest_size=8).hexdigest()
    path = index_path.with_name(f".{index_path.name}.part-{digest}")
    meta, pieces = assemble(rows)
    try:
        array_file.write(path, {**meta, "state": list(states), "version": VERSION}, pieces)
        return dict(_rows_in(path))
    except (OSError, ValueError, LookupError, TypeError) as error:
        logger.warning("what was scanned is not kept: %s", error)
        return {}


def _known_rows(folder: Path, states: Sequence[State]) -> dict[str, ShardRows]:
    """Rows of those shards, by state, that index and part files of the folder hold."""
    wanted = {_key(state) for state in states}
    known: dict[str, ShardRows] = {}
    for path in (*folder.glob("*.farl-index"), *folder.glob(".*.farl-index.part-*")):
        # Damaged, of another version, or removed meanwhile: then its shards are scanned.
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            known.update((key, rows) for key, rows in _rows_in(path) if key in wanted)
    return known


def _rows_in(path: Path) -> Iterator[tuple[str, ShardRows]]:
    meta, arrays = array_file.read(path)
    if meta["version"] != VERSION:
        return
    starts = [*meta["shard_starts"], len(arrays["flags"])]
    key_starts = [*meta["key_starts"], len(arrays["key_bytes"])]
    for i, state in enumerate(meta["state"]):
        columns = {name: arrays[name][starts[i] : starts[i + 1]] for name in COLUMNS}
        key_bytes = arrays["key_bytes"][key_starts[i] : key_starts[i + 1]]
        yield _key(state), ShardRows(columns, key_bytes, meta["problems"].get(str(i), {}))


def _key(state: State) -> str:
    return json.dumps(state)
