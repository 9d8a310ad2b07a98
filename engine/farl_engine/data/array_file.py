"""One file of named numpy arrays that opens in milliseconds: a JSON header, then raw arrays to be mapped into memory.

Layout: magic (8 bytes), header length and its CRC-32 (little-endian uint64 each), header (UTF-8 JSON), then each
array at a multiple of 64 bytes. Nothing in it is ever executed or unpickled.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"FARLARR1"
_ALIGN = 64
_DTYPES = frozenset({"|u1", "<u4", "<i4", "<i8", "<f4"})
# Smaller files are checked in full when opened; larger ones by header and length alone, to keep opening fast.
_CHECK_BYTES = 64 << 20


class ArrayFileError(ValueError):
    """The file is not what `write` made; the message says how."""


def write(
    path: Path,
    meta: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray[Any, Any] | Sequence[np.ndarray[Any, Any]]],
) -> None:
    """Writes `meta` (plain JSON values) and one-dimensional arrays; readers see the old file or the new, never half.

    An array may be given as pieces of one dtype, at least one, which are written one after the other; so an array that
    lies in several files is not gathered in memory.

    Raises:
        OSError: the folder cannot be written.
    """
    table: dict[str, Any] = {}
    offset = 0
    pieces = {name: [array] if isinstance(array, np.ndarray) else list(array) for name, array in arrays.items()}
    for label, parts in pieces.items():
        dtype, checksum = parts[0].dtype, 0
        assert dtype.str in _DTYPES, (label, dtype)
        for part in parts:
            assert part.ndim == 1 and part.dtype == dtype, (label, part.dtype)
            checksum = zlib.crc32(_raw(part), checksum)
        table[label] = [dtype.str, sum(map(len, parts)), offset, checksum]
        offset = _aligned(offset + sum(part.nbytes for part in parts))
    header = json.dumps({"meta": meta, "arrays": table, "bytes": offset}).encode()
    # A name of its own for every writer: ranks that build the same index at once do not meet.
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(MAGIC + struct.pack("<QQ", len(header), zlib.crc32(header)) + header)
            _pad(file)
            start = file.tell()
            for label, parts in pieces.items():
                assert file.tell() - start == table[label][2]
                for part in parts:
                    file.write(_raw(part))
                _pad(file)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files for their owner alone; the shards' readers are often others.
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """Meta and read-only arrays mapped from the file.

    Raises:
        ArrayFileError: the file is damaged or of another kind.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(24)
        if len(head) < 24 or head[:8] != MAGIC:
            raise ArrayFileError("it does not start as an array file")
        length, checksum = struct.unpack("<QQ", head[8:])
        header = file.read(min(length, size))
    if len(header) != length or zlib.crc32(header) != checksum:
        raise ArrayFileError("its header is damaged")
    parsed = json.loads(header)
    start = _aligned(24 + length)
    if size != start + parsed["bytes"]:
        raise ArrayFileError(f"it has {size} bytes instead of {start + parsed['bytes']}")
    # np.asarray: indexing a memmap costs several times what indexing a plain array does.
    whole = np.asarray(np.memmap(path, np.uint8, "r")) if size else np.empty(0, np.uint8)
    arrays = {}
    for name, (dtype, count, offset, checksum) in parsed["arrays"].items():
        if dtype not in _DTYPES:
            raise ArrayFileError(f"array {name} has dtype {dtype}")
        raw = whole[start + offset : start + offset + count * np.dtype(dtype).itemsize]
        if size <= _CHECK_BYTES and zlib.crc32(raw.data) != checksum:
            raise ArrayFileError(f"array {name} is damaged")
        arrays[name] = raw.view(dtype)
    return parsed["meta"], arrays


def _raw(array: np.ndarray[Any, Any]) -> memoryview:
    return np.ascontiguousarray(array).view(np.uint8).data


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGN) * _ALIGN


def _pad(file: Any) -> None:
    file.write(bytes(_aligned(file.tell()) - file.tell()))
