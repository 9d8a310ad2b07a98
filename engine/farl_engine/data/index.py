"""Index of all samples of a set of shards: built once from tar headers, kept beside the shards, read by position.

The file is `<common stem>-<8 hex digits of the shards' names>.farl-index` in the first shard's folder, or in the shard
cache where shards are remote: flat arrays mapped into memory (see array_file.py), 21 bytes and a key a sample, so 50
million samples open in a second and ranks on a node share the pages. Shards whose size or modification time changed are
scanned again, all of them if the file is damaged; a folder that cannot be written means no file and a log line. While a
shard cannot be read at all, no index is kept, only what is known of the others.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from farl_engine.data import array_file
from farl_engine.data.exclusions import exclusion_state
from farl_engine.data.index_scan import VERSION, Arrays, BarMaker, State, assemble, gather, remove_parts
from farl_engine.data.remote import expand_remote, is_remote, shown
from farl_engine.data.shard_files import ShardFiles
from farl_engine.data.shards import FLAG_JSON_CAPTION, SAMPLE_CAUSES, expand_paths
from farl_engine.data.tar_members import BLOCK

if TYPE_CHECKING:
    from farl_engine.data.shard_cache import ShardCache

# Image and caption come with one read where at most this many bytes lie between them.
_JOIN_GAP = 16384

logger = logging.getLogger("farl_engine.data")


class ShardIndex:
    """All samples of a list of shards; sample id = position in the shards sorted by path. Make one with `build`.

    Attributes:
        fingerprint: 32 hex digits of what the data is: a hash of every sample's key, image size and caption size, in
            order. Paths and times do not enter, so a copy elsewhere has the same; other contents of equal sizes are
            not noticed.
        shard_paths: the shards, remote ones as they lie in the cache. shard_names: the same, or the URLs, without the
            folders that all have in common.
        problems: cause -> count over all shards, of shards (truncated_shard, ...) and of samples left out.
        problems_by_shard: shard name -> cause -> count, shards without problems left out.
        excluded: number of samples left out. excluded_by_shard: shard name -> such samples.
    """

    def __init__(
        self, meta: dict[str, Any], arrays: Arrays, sources: Sequence[str], paths: Sequence[Path], lease: object = None
    ) -> None:
        """`sources`: absolute paths or URLs of the shards that lie at `paths`. `lease`: kept alive with the index."""
        self._start(meta["fingerprint"], sources, paths)
        self._arrays = arrays
        self._shard_starts: list[int] = meta["shard_starts"]
        self._key_starts: list[int] = meta["key_starts"]
        self._files = ShardFiles(self.shard_paths)
        self._lease = lease
        self._count_problems({int(shard): causes for shard, causes in meta["problems"].items()})

    def _start(self, fingerprint: str, sources: Sequence[str], paths: Sequence[Path]) -> None:
        self.fingerprint = fingerprint
        self.shard_paths = list(paths)
        self.shard_names = _short_names([shown(source) for source in sources])
        self._sources = list(sources)

    def _count_problems(self, problems: dict[int, dict[str, int]]) -> None:
        self._problems = problems
        self.problems: dict[str, int] = dict(_total(problems.values()))
        # A name may come twice, where a shard is in two sources of a mix.
        by_shard: dict[str, Counter[str]] = {}
        for shard, causes in problems.items():
            by_shard.setdefault(self.shard_names[shard], Counter()).update(causes)
        self.problems_by_shard: dict[str, dict[str, int]] = {name: dict(causes) for name, causes in by_shard.items()}
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
        progress: bool | BarMaker = False,
        cache: bool = True,
        shard_cache: ShardCache | None = None,
    ) -> ShardIndex:
        """Reads the index beside the shards, or scans the shards and writes it.

        Args:
            paths: patterns of shards, see `shards.expand_paths` and `remote.expand_remote`.
            progress: show a bar while fetching and scanning: tqdm's, or one made by a callable.
            cache: read and write the kept index.
            shard_cache: where remote shards are copied to first.

        Raises:
            ValueError: a pattern that names nothing, shards without a single sample, or remote ones that cannot be
                fetched or have no cache.
        """
        sources, shard_paths = _resolve(paths, shard_cache, progress)
        if shard_cache is not None and any(map(is_remote, sources)):
            # Beside those of other servers, so by their whole names.
            folder = shard_cache.folder
            index_path = _index_path(folder, shard_paths, sources)
        else:
            folder = shard_paths[0].parent
            index_path = _index_path(folder, shard_paths, _short_names(sources))
        states = _states(shard_paths, folder)
        if cache and (loaded := _load(index_path, states)):
            return cls(*loaded, sources, shard_paths, shard_cache)
        rows = gather(shard_paths, states, index_path, keep=cache, progress=progress)
        meta, pieces = assemble(rows)
        if not any(map(len, pieces["flags"])):
            causes = _total(meta["problems"].values())
            found = ", ".join(f"{cause} {count}" for cause, count in sorted(causes.items())) or "no files"
            raise ValueError(
                f"no samples in {len(shard_paths)} shards such as {shown(sources[0])} ({found}): "
                "a sample is KEY.jpg (or png, webp, ...) and KEY.txt in a plain tar"
            )
        if cache and all(one.lasting for one in rows):
            try:
                array_file.write(index_path, {**meta, "state": states, "version": VERSION}, pieces)
                remove_parts(index_path)
            except OSError as error:
                logger.warning("the index is not kept, next start scans again: %s", error)
            else:
                # Mapped, as later starts have it, rather than gathered in memory.
                if loaded := _load(index_path, states):
                    return cls(*loaded, sources, shard_paths, shard_cache)
        return cls(
            meta, {name: np.concatenate(parts) for name, parts in pieces.items()}, sources, shard_paths, shard_cache
        )

    @classmethod
    def concatenate(cls, indexes: Sequence[ShardIndex]) -> ShardIndex:
        """Several indexes as one: ids of the k-th start at the sum of the lengths before it, as `MixedOrder` counts."""
        if not indexes:
            raise ValueError("indexes must hold at least one ShardIndex")
        return indexes[0] if len(indexes) == 1 else _ConcatenatedIndex(indexes)

    @property
    def parts(self) -> list[ShardIndex]:
        """The indexes that this one was concatenated of, or itself."""
        return [self]

    def __len__(self) -> int:
        return len(self._arrays["flags"])

    def key(self, i: int) -> str:
        """Key of sample i; bytes that are not UTF-8 are shown as backslash escapes."""
        shard = self.shard_of(i)
        ends = self._arrays["key_ends"]
        first = int(ends[i - 1]) if i > self._shard_starts[shard] else 0
        start = self._key_starts[shard]
        return (
            self._arrays["key_bytes"][start + first : start + int(ends[i])].tobytes().decode(errors="backslashreplace")
        )

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
        shard, arrays = self.shard_of(i), self._arrays
        image_start, image_size = int(arrays["image_block"][i]) * BLOCK, int(arrays["image_size"][i])
        caption_start, caption_size = int(arrays["caption_block"][i]) * BLOCK, int(arrays["caption_size"][i])
        start = min(image_start, caption_start)
        end = max(image_start + image_size, caption_start + caption_size)
        if end - start <= image_size + caption_size + _JOIN_GAP:
            both = self._files.pread(shard, end - start, start)
            image = both[image_start - start : image_start - start + image_size]
            caption = both[caption_start - start : caption_start - start + caption_size]
        else:
            image = self._files.pread(shard, image_size, image_start)
            caption = self._files.pread(shard, caption_size, caption_start)
        return image, _json_caption(caption) if arrays["flags"][i] & FLAG_JSON_CAPTION else caption

    def close(self) -> None:
        """Closes the shards; a later read opens them again."""
        self._files.close()

    def _share_open_files(self, count: int) -> None:
        self._files.max_open = max(1, self._files.max_open // count)

    def _checked(self, i: int) -> int:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        return int(i)


class _ConcatenatedIndex(ShardIndex):
    """Several indexes one after the other, without a copy of their arrays."""

    def __init__(self, indexes: Sequence[ShardIndex]) -> None:
        fingerprint = hashlib.blake2b("".join(i.fingerprint for i in indexes).encode(), digest_size=16).hexdigest()
        self._start(
            fingerprint,
            [source for index in indexes for source in index._sources],
            [path for index in indexes for path in index.shard_paths],
        )
        self._parts = list(indexes)
        for index in indexes:
            index._share_open_files(len(indexes))
        self._sample_ends = np.cumsum([len(index) for index in indexes]).tolist()
        self._first_shards = np.cumsum([0] + [len(index.shard_paths) for index in indexes]).tolist()
        self._count_problems(
            {
                first + shard: causes
                for first, index in zip(self._first_shards, indexes, strict=False)
                for shard, causes in index._problems.items()
            }
        )

    @property
    def parts(self) -> list[ShardIndex]:
        return self._parts

    def __len__(self) -> int:
        return self._sample_ends[-1]

    def key(self, i: int) -> str:
        part, local = self._place(i)
        return self._parts[part].key(local)

    def shard_of(self, i: int) -> int:
        part, local = self._place(i)
        return self._first_shards[part] + self._parts[part].shard_of(local)

    def read(self, i: int) -> tuple[bytes, bytes]:
        part, local = self._place(i)
        return self._parts[part].read(local)

    def close(self) -> None:
        for part in self._parts:
            part.close()

    def _share_open_files(self, count: int) -> None:
        for part in self._parts:
            part._share_open_files(count)

    def _place(self, i: int) -> tuple[int, int]:
        part = bisect_right(self._sample_ends, self._checked(i))
        return part, int(i) - (self._sample_ends[part - 1] if part else 0)


def _resolve(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    shard_cache: ShardCache | None,
    progress: bool | BarMaker,
) -> tuple[list[str], list[Path]]:
    """Absolute path or URL of each shard, sorted, and where it lies on this machine."""
    patterns = [os.fspath(path) for path in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]
    remote = [pattern for pattern in patterns if is_remote(pattern)]
    if remote and shard_cache is None:
        raise ValueError(
            f"{shown(remote[0])} is not on this machine: name a folder on a local disk for copies, as --shard-cache "
            "of the trainer does, or copy the shards"
        )
    found: dict[str, Path] = {}
    local = [pattern for pattern in patterns if not is_remote(pattern)]
    if local or not remote:
        found = {os.path.abspath(path): path for path in expand_paths(local)}  # noqa: PTH100
    if shard_cache is not None and remote:
        found.update(shard_cache.fetch([url for pattern in remote for url in expand_remote(pattern)], progress))
    sources = sorted(found)
    return sources, [found[source] for source in sources]


def _load(path: Path, states: list[State]) -> tuple[dict[str, Any], Arrays] | None:
    try:
        meta, arrays = array_file.read(path)
        if meta["version"] != VERSION or meta["state"] != states:
            return None
        return meta, arrays
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        logger.warning("%s: the kept index cannot be used (%s); scanning again", path, error)
        return None


def _states(paths: Sequence[Path], folder: Path) -> list[State]:
    """What must be unchanged for a kept index to hold: name from the index's folder, size, times."""
    states = []
    for path in paths:
        name = path.name if path.parent == folder else os.path.relpath(path, folder)
        try:
            stat = path.stat()
            size, time = stat.st_size, stat.st_mtime_ns
        except OSError:
            # A link to nothing, or gone just now: the scan says so.
            size = time = -1
        states.append([name, size, time, *exclusion_state(path)])
    return states


def _index_path(folder: Path, paths: Sequence[Path], names: Sequence[str]) -> Path:
    # Characters in common, not folders.
    stem = os.path.commonprefix([path.name.removesuffix(".tar") for path in paths])  # noqa: RUF071
    stem = stem.rstrip("0123456789-_.") or "shards"
    digest = hashlib.blake2b("\n".join(names).encode(errors="surrogateescape"), digest_size=4).hexdigest()
    return folder / f"{stem}-{digest}.farl-index"


def _short_names(sources: Sequence[str]) -> list[str]:
    """Paths or URLs without the folders that all have in common."""
    parts = [source.split("/") for source in (min(sources), max(sources))]
    # What the first and the last in alphabetical order share, all share.
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*(p[:-1] for p in parts), strict=False)))
    skip = sum(len(part) + 1 for part in parts[0][:shared])
    return [source[skip:] for source in sources]


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
