"""Shards: plain tars in webdataset's layout. What makes a sample, which shards a pattern names, how to write them.

Key rule (webdataset's): a member's key is its path up to the first dot of the file name, its extension the rest,
lower case. So `a.b/c.jpg` has key `a.b/c`, and `photo.v2.jpg` has key `photo` and the unknown extension `v2.jpg`.
Members of one key belong together wherever they lie in a tar; a sample lies wholly in one tar, and halves in two tars
count as missing.
"""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from farl_engine.data import exclusions
from farl_engine.data.tar_members import TarWalkError, walk_members

IMAGE_EXTENSIONS = frozenset({b"jpg", b"jpeg", b"png", b"webp", b"bmp", b"gif", b"tif", b"tiff"})
FLAG_JSON_CAPTION = 1

# Members that no honest sample has are not read into memory: images of more than four bytes for each pixel that the
# decoder allows, metadata of more than a megabyte. Of a longer text, only its beginning is the caption.
MAX_IMAGE_BYTES = 1 << 27
MAX_JSON_BYTES = 1 << 20
MAX_TEXT_BYTES = 1 << 16

# Why a sample is left out of the index; the other causes in `ShardScan.problems` are of whole shards.
SAMPLE_CAUSES = frozenset(
    {"missing_image", "missing_caption", "empty_image", "oversized_image", "duplicate_key", "unknown_extension"}
)

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")

logger = logging.getLogger("farl_engine.data")


def split_key(name: bytes) -> tuple[bytes, bytes] | None:
    """Key and lower-case extension of a member, or None for hidden files and those without a dot."""
    dot = name.find(b".", name.rfind(b"/") + 1)
    if dot < 0 or dot == 0 or name[dot - 1 : dot] == b"/":
        return None
    return name[:dot], name[dot + 1 :].lower()


@dataclass
class ShardScan:
    """What one pass over a shard's headers found: a row a sample, in the order in which keys first appear."""

    keys: list[bytes]
    image_offset: NDArray[np.int64]
    image_size: NDArray[np.int64]
    caption_offset: NDArray[np.int64]
    caption_size: NDArray[np.int64]
    flags: NDArray[np.uint8]
    problems: Counter[str] = field(default_factory=Counter)


def scan_shard(path: Path) -> ShardScan:
    """Finds the samples of one shard; never raises for what is in the shard, see `problems`.

    A sample is an image and a caption: `.txt`, or where there is none the "caption" of `.json`. Left out and counted
    by cause: missing_image, missing_caption (also when its file is empty, or .json has more than MAX_JSON_BYTES),
    empty_image, oversized_image (more than MAX_IMAGE_BYTES), unknown_extension (neither image nor caption under that
    key), duplicate_key (the first image and caption of a key win). Of whole shards:
    empty_shard, truncated_shard and corrupt_shard (the readable part is used), not_a_tar, compressed_shard,
    unreadable_shard. Samples on the shard's exclusion list (see exclusions.py) count as filtered, not as bad.

    Raises:
        ValueError: the exclusion list is damaged.
    """
    # key -> [image offset, size, text offset, size, json offset, size]; -1 where absent.
    found: dict[bytes, list[int]] = {}
    extra_images: Counter[bytes] = Counter()
    extra_captions: Counter[bytes] = Counter()
    problems: Counter[str] = Counter()
    try:
        fd = os.open(path, os.O_RDONLY)
        try:
            for name, offset, size in walk_members(fd):
                parts = split_key(name)
                if parts is None:
                    continue
                key, extension = parts
                entry = found.get(key)
                if entry is None:
                    entry = found[key] = [-1] * 6
                if extension in IMAGE_EXTENSIONS:
                    slot, extra = 0, extra_images
                elif extension == b"txt":
                    slot, extra, size = 2, extra_captions, min(size, MAX_TEXT_BYTES)
                elif extension == b"json" and size <= MAX_JSON_BYTES:
                    slot, extra = 4, None
                else:
                    continue
                if entry[slot] < 0:
                    entry[slot], entry[slot + 1] = offset, size
                elif extra is not None:
                    extra[key] += 1
        finally:
            os.close(fd)
    except TarWalkError as fault:
        problems[fault.cause] += 1
        logger.warning("%s: %s: %s; using the %d keys before it", path, fault.cause, fault, len(found))
    except OSError as error:
        problems["unreadable_shard"] += 1
        logger.warning("%s: cannot be read: %s", path, error)

    for key in exclusions.read_exclusions(path):
        problems[exclusions.CAUSE] += found.pop(key, None) is not None
    problems = +problems
    keys: list[bytes] = []
    rows: list[tuple[int, int, int, int, int]] = []
    for key, (image, image_size, text, text_size, meta, meta_size) in found.items():
        use_json = text < 0 and meta >= 0
        caption, caption_size = (meta, meta_size) if use_json else (text, text_size)
        if image < 0 and caption < 0:
            problems["unknown_extension"] += 1
        elif image < 0:
            problems["missing_image"] += 1
        elif caption_size <= 0:
            problems["missing_caption"] += 1
        elif image_size == 0:
            problems["empty_image"] += 1
        elif image_size > MAX_IMAGE_BYTES:
            problems["oversized_image"] += 1
        else:
            keys.append(key)
            rows.append((image, image_size, caption, caption_size, FLAG_JSON_CAPTION * use_json))
    repeated = extra_images | extra_captions
    if repeated:
        problems["duplicate_key"] = repeated.total()
    columns = np.array(rows, np.int64).reshape(-1, 5).T
    return ShardScan(keys, columns[0], columns[1], columns[2], columns[3], columns[4].astype(np.uint8), problems)


def expand_paths(paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Shard files named by a pattern or a list of patterns, sorted by path, each once.

    A pattern is a file, a folder (its *.tar), a glob, or holds number ranges such as `train-{00000..00131}.tar`.

    Raises:
        ValueError: a pattern that names nothing, with the pattern.
    """
    patterns = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not patterns:
        raise ValueError("no shards given: name at least one tar file or pattern")
    found: dict[str, Path] = {}
    for pattern in patterns:
        for name in expand_braces(os.fspath(pattern)):
            path = Path(name)
            if path.is_dir():
                matches = [str(entry) for entry in path.glob("*.tar")]
            else:
                matches = [name] if path.exists() else glob.glob(name, recursive=True)  # noqa: PTH207
            if not matches:
                raise ValueError(f"no shard matches {name!r}: give .tar files, a folder of them or a glob in quotes")
            found.update((str(Path(match).absolute()), Path(match)) for match in matches)
    return [found[name] for name in sorted(found)]


def expand_braces(pattern: str) -> list[str]:
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    numbers = range(int(first), int(last) + 1)
    if not numbers:
        raise ValueError(f"the range {match.group()} in {pattern!r} is empty: write the smaller number first")
    return [
        name
        for number in numbers
        for name in expand_braces(f"{pattern[: match.start()]}{number:0{len(first)}}{pattern[match.end() :]}")
    ]


class ShardWriter:
    """Writes samples into shards with webdataset's TarWriter; the same samples give the same bytes.

    A shard appears under its name only when it is complete. Use as a context manager: leaving it by an exception
    drops the unfinished shard.

    Args:
        pattern: path with one %d field for the shard's number, e.g. "out/train-%06d.tar"; its folder is made.
        samples_per_shard: samples in each shard but the last.

    Raises:
        ValueError: a pattern without a field, or a size below 1.
    """

    def __init__(self, pattern: str | os.PathLike[str], samples_per_shard: int = 10_000) -> None:
        self.pattern = os.fspath(pattern)
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard must be at least 1, got {samples_per_shard}")
        if not re.fullmatch(r"[^%]*%0?\d*d[^%]*", self.pattern):
            raise ValueError(f"pattern must hold one field like %06d for the shard's number, got {self.pattern!r}")
        self.samples_per_shard = samples_per_shard
        self.paths: list[Path] = []
        self.count = 0
        self._in_shard = 0
        self._writer: Any = None
        self._file: IO[bytes] | None = None
        Path(self.pattern).parent.mkdir(parents=True, exist_ok=True)

    def write(self, key: str, members: Mapping[str, bytes | str]) -> None:
        """Adds one sample: `members` maps extensions without the leading dot ("jpg", "txt", "mask.png") to contents.

        Raises:
            ValueError: a key that would not read back as itself.
        """
        if split_key(f"{key}.x".encode()) != (key.encode(), b"x"):
            raise ValueError(f"key must have no dot in its last part and not be empty, got {key!r}")
        if self._writer is not None and self._in_shard == self.samples_per_shard:
            self._finish()
        if self._writer is None:
            self._writer = self._open()
        self._writer.write({"__key__": key, **{ext: _as_bytes(content) for ext, content in members.items()}})
        self._in_shard += 1
        self.count += 1

    def close(self) -> None:
        """Finishes the last shard."""
        if self._writer is not None:
            self._finish()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, exc_type: object, *_: object) -> None:
        if exc_type is None:
            self.close()
        else:
            self._drop()

    @property
    def _temporary(self) -> Path:
        path = Path(self.pattern % len(self.paths))
        return path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def _open(self) -> Any:
        # webdataset imports torch, which takes seconds; readers of shards do without it.
        from webdataset.writer import TarWriter

        self._file = self._temporary.open("wb")
        self._in_shard = 0
        return TarWriter(
            self._file,
            user="farl",
            group="farl",
            mode=0o444,
            encoder=False,
            mtime=0,
            format="GNU_FORMAT",
            compress=False,
        )

    def _finish(self) -> None:
        assert self._file is not None
        path = Path(self.pattern % len(self.paths))
        try:
            self._writer.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._temporary.replace(path)
        except BaseException:
            self._drop()
            raise
        self.paths.append(path)
        self._writer = self._file = None

    def _drop(self) -> None:
        """Removes the unfinished shard, if any."""
        for part in (self._writer, self._file):
            # On a full disk closing fails as writing did.
            with contextlib.suppress(OSError):
                if part is not None:
                    part.close()
        if self._file is not None:
            self._temporary.unlink(missing_ok=True)
        self._writer = self._file = None


def write_shards(
    samples: Iterable[Mapping[str, Any]], out_pattern: str | os.PathLike[str], samples_per_shard: int = 10_000
) -> list[Path]:
    """Writes samples into shards and returns the shards' paths.

    Args:
        samples: mappings with `key` (str), `image` (encoded bytes), `image_ext` ("jpg" if absent), `caption` (str), and
            optionally `extra`, a mapping of further extensions to bytes or str.
        out_pattern, samples_per_shard: see `ShardWriter`.
    """
    with ShardWriter(out_pattern, samples_per_shard) as writer:
        for sample in samples:
            members = {sample.get("image_ext", "jpg"): sample["image"], "txt": sample["caption"]}
            writer.write(sample["key"], {**members, **sample.get("extra", {})})
    return writer.paths


def _as_bytes(content: bytes | str) -> bytes:
    return content.encode() if isinstance(content, str) else content
