"""A list beside a shard of the samples that a filter took out: the index leaves them out, the tar stays as it is.

The list of `00000.tar` is `00000.exclude.jsonl`: one JSON array `["key", "cause"]` a line. Deleting it brings the
samples back.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

CAUSE = "filtered"
_SUFFIX = ".exclude.jsonl"


def exclusion_path(shard: Path) -> Path:
    """Where the list of a shard lies."""
    return shard.with_name(shard.name.removesuffix(".tar") + _SUFFIX)


def exclusion_state(shard: Path) -> list[int]:
    """[size, modification time in ns] of a shard's list, [] if it has none."""
    try:
        stat = exclusion_path(shard).stat()
    except OSError:
        return []
    return [stat.st_size, stat.st_mtime_ns]


def read_exclusions(shard: Path) -> dict[bytes, str]:
    """Key -> cause of the samples that the list takes out; {} if there is no list.

    Raises:
        ValueError: the list is damaged, which must not pass for "nothing is filtered".
        OSError: it cannot be read.
    """
    path = exclusion_path(shard)
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return {}
    found: dict[bytes, str] = {}
    for number, line in enumerate(lines, start=1):
        try:
            key, cause = json.loads(line)
            found[key.encode()] = str(cause)
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{path}, line {number} is not [key, cause]: delete the file and filter again") from None
    return found


def write_exclusions(shard: Path, causes: Mapping[str, str]) -> None:
    """Replaces the list of a shard (key -> cause) in one go; removes it where nothing is taken out.

    A list that already says the same is left alone, so that the index beside it stays good.
    """
    path = exclusion_path(shard)
    text = "".join(json.dumps([key, cause]) + "\n" for key, cause in causes.items()).encode()
    try:
        if path.read_bytes() == text:
            return
    except FileNotFoundError:
        if not text:
            return
    if not text:
        path.unlink()
        return
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(text)
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
