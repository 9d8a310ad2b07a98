"""Reads samples back from tars, as img2dataset writes them: image, .txt and .json under one key."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

from farl.data.keys import sample_key
from farl.data.sources import Sample, Skipped, as_utf8, make_sample
from farl_engine.data.exclusions import read_exclusions
from farl_engine.data.shards import IMAGE_EXTENSIONS, MAX_IMAGE_BYTES, split_key
from farl_engine.data.tar_members import TarWalkError, walk_members


def find_tars(folder: Path, without: Path) -> list[Path]:
    """All tars below `folder` but those below `without`, sorted by path."""
    tars = []
    for top, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if not Path(top).resolve().is_relative_to(without.resolve()):
            tars += [Path(top) / name for name in names if name.endswith(".tar")]
    return sorted(tars)


class Tars:
    """Samples of tars, in order; other members of a sample stay with it. Where the tars lie in several folders, as
    those of LAION-Face (`split_0`, `split_1`, ...) whose keys all start from zero, the folder is put before the key.

    A sample whose json has a `status` other than "success" is skipped, as is one that lacks its image or caption, and
    one that `farl.data laion filter` took out.
    """

    def __init__(self, tars: list[Path], root: Path) -> None:
        self._tars = tars
        self._root = root
        self._folder_in_key = len({tar.parent for tar in tars}) > 1

    def __iter__(self) -> Iterator[Sample | Skipped]:
        for tar in self._tars:
            yield from self._read(tar)

    def _read(self, tar: Path) -> Iterator[Sample | Skipped]:
        shown = tar.relative_to(self._root).as_posix()
        folder = tar.parent.relative_to(self._root).as_posix() + "/" if self._folder_in_key else ""
        fault: Skipped | None = None
        try:
            fd = os.open(tar, os.O_RDONLY)
        except OSError as error:
            yield Skipped("unreadable_shard", f"{shown} ({error.strerror})")
            return
        try:
            samples: dict[bytes, dict[bytes, tuple[int, int]]] = {}
            try:
                for name, offset, size in walk_members(fd):
                    if (parts := split_key(name)) is not None:
                        key, extension = parts
                        if extension in samples.setdefault(key, {}):
                            yield Skipped("duplicate_key", f"{shown}: {_text(name)}")
                        else:
                            samples[key][extension] = (offset, size)
            except TarWalkError as error:  # what came before it is good
                fault = Skipped(error.cause, shown)
            for key, cause in read_exclusions(tar).items():
                if samples.pop(key, None) is not None:
                    yield Skipped(f"filtered_{cause}", f"{shown}: {_text(key)}")
            for key, places in samples.items():
                if any(size > MAX_IMAGE_BYTES for _, size in places.values()):
                    yield Skipped("oversized", f"{shown}: {_text(key)}")
                    continue
                try:
                    members = {extension: os.pread(fd, size, offset) for extension, (offset, size) in places.items()}
                except OSError as error:
                    yield Skipped("unreadable", f"{shown}: {_text(key)} ({error.strerror})")
                    continue
                yield _sample(folder, key, members, shown)
        finally:
            os.close(fd)
        if fault is not None:
            yield fault


def _sample(folder: str, raw_key: bytes, members: dict[bytes, bytes], shard: str) -> Sample | Skipped:
    where = f"{shard}: {_text(raw_key)}"
    key = folder + _safe_key(raw_key)
    meta = _metadata(members.get(b"json"))
    if meta.get("status", "success") != "success":
        return Skipped("failed_download", where)
    images = [extension for extension in members if extension in IMAGE_EXTENSIONS]
    if not images:
        return Skipped("missing_image", where)
    caption = (
        as_utf8(members.pop(b"txt", b"")).strip() or str(meta.get("caption") or "").encode("utf-8", "replace").strip()
    )
    if not caption:
        return Skipped("missing_caption", where)
    image = members.pop(images[0])
    # webdataset keeps names such as __key__ for itself.
    extra = {
        _text(extension): content
        for extension, content in members.items()
        if extension not in IMAGE_EXTENSIONS and not extension.startswith(b"__")
    }
    return make_sample(key, image, caption, group=key, where=where, extra=extra)


def _safe_key(raw: bytes) -> str:
    """The key as it is where it can do no harm to whoever unpacks the new shard, else one made of its parts."""
    key = _text(raw).removeprefix("./")
    harmless = key.isprintable() and "\\" not in key and not {"", ".", ".."} & set(key.split("/"))
    if harmless and not (key.startswith("__") and key.endswith("__")):
        return key
    # Without the hash, `../a` and `a` would be one.
    return f"{sample_key(key)}-{blake2b(raw, digest_size=4).hexdigest()}"


def _metadata(content: bytes | None) -> dict[str, object]:
    try:
        meta = json.loads(content or b"{}")
    except (ValueError, RecursionError):
        return {}
    return meta if isinstance(meta, dict) else {}


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")
