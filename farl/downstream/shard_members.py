"""All members of the samples of our shards, by position: image, mask, landmarks, whatever lies under the same key."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from farl.downstream.task import Split
from farl_engine.data.shard_files import ShardFiles
from farl_engine.data.shards import IMAGE_EXTENSIONS, expand_paths, split_key
from farl_engine.data.tar_members import TarWalkError, walk_members


class ShardMembers:
    """Samples of tar shards, in the order of the shards sorted by path; those without an image are left out.

    Attributes:
        keys: of the samples. paths: the shards.

    Raises:
        ValueError: a pattern that names nothing, a file that is no plain tar, or no sample at all.
    """

    def __init__(self, pattern: str | os.PathLike[str]) -> None:
        self.paths: list[Path] = expand_paths(pattern)
        self.keys: list[str] = []
        self._places: list[tuple[int, dict[str, tuple[int, int]]]] = []
        self._files = ShardFiles(self.paths)
        images = sorted(extension.decode() for extension in IMAGE_EXTENSIONS)
        for shard, path in enumerate(self.paths):
            for key, members in _walk(path):
                image = next((extension for extension in images if extension in members), None)
                if image is not None:
                    self.keys.append(key)
                    self._places.append((shard, {**members, "image": members[image]}))
        if not self.keys:
            raise ValueError(f"no image in {len(self.paths)} shards such as {self.paths[0]}")

    def __len__(self) -> int:
        return len(self.keys)

    def has(self, index: int, member: str) -> bool:
        """Whether a sample has a member, by extension, such as "mask.png"; "image" is its image of any kind."""
        return member in self._places[index][1]

    def size(self, index: int, member: str) -> int:
        """Bytes of a member."""
        return self._places[index][1][member][1]

    def read(self, index: int, member: str) -> bytes:
        """A member's bytes; safe to call from many threads. KeyError: there is none. OSError: unreadable."""
        shard, members = self._places[index]
        offset, size = members[member]
        return self._files.pread(shard, size, offset)

    def sources(self, indices: Sequence[int]) -> list[tuple[str, str]]:
        """Real path of the shard and key, of each of these samples."""
        shards = [os.path.realpath(path) for path in self.paths]
        return [(shards[self._places[index][0]], self.keys[index]) for index in indices]

    def where(self, index: int) -> str:
        """Shard and key, for people."""
        return f"{self.paths[self._places[index][0]]}: {self.keys[index]}"


def shards_of(path: str, split: Split) -> str:
    """The pattern that `path` stands for. Of a folder with train-*.tar and test-*.tar or val-*.tar, `split`'s part: it
    is never taken whole.

    Raises:
        ValueError: there are such parts, but not `split`'s.
    """
    folder = Path(path)
    if not folder.is_dir():
        return path
    parts = {prefix for prefix in ("train", "test", "val") if any(folder.glob(f"{prefix}-*.tar"))}
    if not parts:
        return path
    found = next((prefix for prefix in (("train",) if split == "train" else ("test", "val")) if prefix in parts), None)
    if found is None:
        raise ValueError(f"{folder} has {', '.join(sorted(parts))} shards but none for {split}: name them by a pattern")
    return str(folder / f"{found}-*.tar")


def _walk(path: Path) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    found: dict[bytes, dict[str, tuple[int, int]]] = {}
    fd = os.open(path, os.O_RDONLY)
    try:
        for name, offset, size in walk_members(fd):
            if (parts := split_key(name)) is not None:
                found.setdefault(parts[0], {}).setdefault(parts[1].decode(errors="replace"), (offset, size))
    except TarWalkError as error:
        raise ValueError(f"{path}: {error}") from None
    finally:
        os.close(fd)
    for key, members in found.items():
        yield key.decode(errors="backslashreplace"), members
