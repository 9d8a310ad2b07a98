"""Index of all samples of a set of shards: built once from tar headers, kept beside the shards, read by position.

The cache is `<common stem>-<8 hex digits of the shards' names>.farl-index` in the first shard's folder: flat arrays
mapped into memory (see array_file.py), so 50 million samples open in milliseconds and ranks on a node share the
pages. It is rebuilt when a shard's size or modification time changed, or when it is damaged; a folder that cannot be
written means no cache and a log line. While a shard cannot be read at all, no cache is written either.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from farl_engine.data import array_file
from farl_engine.data.shard_files import ShardFiles
from farl_engine.data.shards import FLAG_JSON_CAPTION, SAMPLE_CAUSES, ShardScan, expand_paths, scan_shard

VERSION = 1
_SCAN_THREADS = 8
# Image and caption come with one read where at most this many bytes lie between them.
_JOIN_GAP = 16384
_COLUMNS = {
    "image_offset": "<i8",
    "image_size": "<u4",
    "caption_offset": "<i8",
    "caption_size": "<u4",
    "flags": "|u1",
}

logger = logging.getLogger("farl_engine.data")


class ShardIndex:
    """All samples of a list of shards; sample id = position in the shards sorted by path. Make one with `build`.

    Attributes:
        fingerprint: 32 hex digits of what the data is: a hash of every sample's key, image size and caption size, in
            order. Paths and times do not enter, so a copy elsewhere has the same; other contents of equal sizes are
            not noticed.
        shard_paths: the shards. shard_names: the same, relative to their common folder.
        problems: cause -> count over all shards, of shards (truncated_shard, ...) and of samples left out.
        problems_by_shard: shard name -> cause -> count, shards without problems left out.
        excluded: number of samples left out. excluded_by_shard: shard name -> such samples.
        image_offset, image_size, caption_offset, caption_size, flags: arrays of length N.
    """

    def __init__(self, meta: dict[str, Any], arrays: dict[str, np.ndarray[Any, Any]], paths: Sequence[Path]) -> None:
        self._meta = meta
        self._arrays = arrays
        self.shard_paths = list(paths)
        self.shard_names = _relative_names(self.shard_paths)
        self.fingerprint: str = meta["fingerprint"]
        self.image_offset = arrays["image_offset"]
        self.image_size = arrays["image_size"]
        self.caption_offset = arrays["caption_offset"]
        self.caption_size = arrays["caption_size"]
        self.flags = arrays["flags"]
        self._shard_starts: list[int] = meta["shard_starts"]
        self._files = ShardFiles(self.shard_paths)
        self.problems_by_shard: dict[str, dict[str, int]] = {
            self.shard_names[int(shard)]: causes for shard, causes in meta["problems"].items()
        }
        totals: Counter[str] = Counter()
        for causes in self.problems_by_shard.values():
            totals.update(causes)
        self.problems: dict[str, int] = dict(totals)
        self.excluded_by_shard: dict[str, int] = {
            name: count
            for name, causes in self.problems_by_shard.items()
            if (count := sum(causes[cause] for cause in SAMPLE_CAUSES & causes.keys()))
        }
        self.excluded = sum(self.excluded_by_shard.values())

    @classmethod
    def build(
        cls,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        progress: bool = False,
        cache: bool = True,
    ) -> ShardIndex:
        """Reads the index beside the shards, or scans the shards and writes it.

        Args:
            paths: patterns of shards, see `shards.expand_paths`.
            progress: show a bar while scanning.
            cache: read and write the cached index.

        Raises:
            ValueError: a pattern that names nothing, or shards without a single sample.
        """
        shard_paths = expand_paths(paths)
        cache_path = _cache_path(shard_paths)
        state = _shard_state(shard_paths)
        if cache and (loaded := _load(cache_path, state)):
            return cls(*loaded, shard_paths)
        meta, arrays = _scan(shard_paths, progress)
        if not len(arrays["flags"]):
            found = (
                ", ".join(sorted(f"{cause} {n}" for cause, n in _total(meta["problems"].values()).items()))
                or "no files"
            )
            raise ValueError(
                f"no samples in {len(shard_paths)} shards such as {shard_paths[0]} ({found}): "
                "a sample is KEY.jpg (or png, webp, ...) and KEY.txt in a plain tar"
            )
        # A shard that could not be read may be readable next time, with neither size nor time changed.
        if cache and not any("unreadable_shard" in causes for causes in meta["problems"].values()):
            try:
                array_file.write(cache_path, {**meta, "state": state, "version": VERSION}, arrays)
            except OSError as error:
                logger.warning("the index is not kept, next start scans again: %s", error)
        return cls(meta, arrays, shard_paths)

    @classmethod
    def concatenate(cls, indexes: Sequence[ShardIndex]) -> ShardIndex:
        """Several indexes as one: ids of the k-th start at the sum of the lengths before it, as `MixedOrder` counts."""
        if not indexes:
            raise ValueError("indexes must hold at least one ShardIndex")
        if len(indexes) == 1:
            return indexes[0]
        paths = [path for index in indexes for path in index.shard_paths]
        shards = np.cumsum([0] + [len(index.shard_paths) for index in indexes])
        samples = np.cumsum([0] + [len(index) for index in indexes])
        meta = {
            "fingerprint": hashlib.blake2b(
                "".join(i.fingerprint for i in indexes).encode(), digest_size=16
            ).hexdigest(),
            "shard_starts": [
                int(s) + n for index, s in zip(indexes, samples, strict=False) for n in index._shard_starts
            ],
            "problems": {
                str(int(shard) + int(first)): causes
                for index, first in zip(indexes, shards, strict=False)
                for shard, causes in index._meta["problems"].items()
            },
        }
        keys = [index._arrays["key_ends"] for index in indexes]
        key_starts = np.cumsum([0] + [int(ends[-1]) for ends in keys])
        arrays = {name: np.concatenate([index._arrays[name] for index in indexes]) for name in (*_COLUMNS, "key_bytes")}
        arrays["key_ends"] = np.concatenate([ends + first for ends, first in zip(keys, key_starts, strict=False)])
        return cls(meta, arrays, paths)

    def __len__(self) -> int:
        return len(self.flags)

    def key(self, i: int) -> str:
        """Key of sample i; bytes that are not UTF-8 are shown as backslash escapes."""
        i = self._checked(i)
        ends = self._arrays["key_ends"]
        first = int(ends[i - 1]) if i else 0
        return self._arrays["key_bytes"][first : int(ends[i])].tobytes().decode(errors="backslashreplace")

    def shard_of(self, i: int) -> int:
        """Number of the shard that holds sample i; `shard_names[...]` names it."""
        return bisect_right(self._shard_starts, self._checked(i)) - 1

    def read(self, i: int) -> tuple[bytes, bytes]:
        """Encoded image and caption of sample i; safe to call from many threads.

        The caption is as stored in `.txt`; from `.json` it is the "caption" string in UTF-8, empty if there is none.

        Raises:
            OSError: the shard cannot be read, after retries.
            IndexError: no such sample.
        """
        shard = self.shard_of(i)
        image_start, image_size = int(self.image_offset[i]), int(self.image_size[i])
        caption_start, caption_size = int(self.caption_offset[i]), int(self.caption_size[i])
        start = min(image_start, caption_start)
        end = max(image_start + image_size, caption_start + caption_size)
        if end - start <= image_size + caption_size + _JOIN_GAP:
            both = self._files.pread(shard, end - start, start)
            image = both[image_start - start : image_start - start + image_size]
            caption = both[caption_start - start : caption_start - start + caption_size]
        else:
            image = self._files.pread(shard, image_size, image_start)
            caption = self._files.pread(shard, caption_size, caption_start)
        return image, _json_caption(caption) if self.flags[i] & FLAG_JSON_CAPTION else caption

    def close(self) -> None:
        """Closes the shards; a later read opens them again."""
        self._files.close()

    def _checked(self, i: int) -> int:
        if not 0 <= i < len(self.flags):
            raise IndexError(f"sample {i} of {len(self.flags)}")
        return int(i)


def _scan(paths: Sequence[Path], progress: bool) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """Meta and arrays of the shards, in order."""
    columns: dict[str, list[np.ndarray[Any, Any]]] = {name: [] for name in (*_COLUMNS, "key_bytes", "key_lengths")}
    digest = hashlib.blake2b(digest_size=16)
    starts, problems, count = [], {}, 0
    with ThreadPoolExecutor(min(_SCAN_THREADS, len(paths))) as pool:
        scans: Iterable[ShardScan] = pool.map(scan_shard, paths)
        if progress:
            from tqdm import tqdm

            # No bar where stderr is not a terminal, nor for what is done in a moment.
            scans = tqdm(scans, "index", len(paths), unit="shard", disable=None, delay=1)
        for number, scan in enumerate(scans):
            starts.append(count)
            count += len(scan.keys)
            if scan.problems:
                problems[str(number)] = dict(scan.problems)
            for name, dtype in _COLUMNS.items():
                columns[name].append(getattr(scan, name).astype(dtype))
            lengths = np.array([len(key) for key in scan.keys], "<i8")
            columns["key_lengths"].append(lengths)
            columns["key_bytes"].append(np.frombuffer(b"".join(scan.keys), np.uint8))
            for part in (lengths, *(columns[name][-1] for name in ("key_bytes", "image_size", "caption_size"))):
                digest.update(part.tobytes())
    arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
    arrays["key_ends"] = np.cumsum(arrays.pop("key_lengths"), dtype="<i8")
    return {"fingerprint": digest.hexdigest(), "shard_starts": starts, "problems": problems}, arrays


def _load(path: Path, state: list[list[int]]) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]] | None:
    try:
        meta, arrays = array_file.read(path)
        if meta["version"] != VERSION or meta["state"] != state:
            return None
        return meta, arrays
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        logger.warning("%s: the kept index cannot be used (%s); scanning again", path, error)
        return None


def _shard_state(paths: Sequence[Path]) -> list[list[int]]:
    """What must be unchanged for a kept index to hold."""
    return [[stat.st_size, stat.st_mtime_ns] for stat in (path.stat() for path in paths)]


def _cache_path(paths: Sequence[Path]) -> Path:
    names = _relative_names(paths)
    # Characters in common, not folders.
    stem = os.path.commonprefix([path.name.removesuffix(".tar") for path in paths])  # noqa: RUF071
    stem = stem.rstrip("0123456789-_.") or "shards"
    digest = hashlib.blake2b("\n".join(names).encode(errors="surrogateescape"), digest_size=4).hexdigest()
    return paths[0].parent / f"{stem}-{digest}.farl-index"


def _relative_names(paths: Sequence[Path]) -> list[str]:
    folder = Path(os.path.commonpath([path.parent.absolute() for path in paths]))
    return [path.absolute().relative_to(folder).as_posix() for path in paths]


def _total(parts: Iterable[dict[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return total


def _json_caption(content: bytes) -> bytes:
    try:
        caption = json.loads(content)["caption"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return b""
    return caption.encode(errors="replace") if isinstance(caption, str) else b""
