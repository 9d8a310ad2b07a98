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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"FARLARR1"
_ALIGN = 64
_DTYPES = frozenset({"|u1", "<u4", "<i4", "<i8"})
# Smaller files are checked in full when opened; larger ones by header and length alone, to keep opening fast.
_CHECK_BYTES = 64 << 20


class ArrayFileError(ValueError):
    """The file is not what `write` made; the message says how."""


def write(path: Path, meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Writes `meta` (plain JSON values) and one-dimensional arrays; readers see the old file or the new, never half.

    Raises:
        OSError: the folder cannot be written.
    """
    table: dict[str, Any] = {}
    offset = 0
    flat = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    for label, array in flat.items():
        assert array.ndim == 1 and array.dtype.str in _DTYPES, (label, array.dtype)
        table[label] = [array.dtype.str, len(array), offset, zlib.crc32(array.view(np.uint8).data)]
        offset = _aligned(offset + array.nbytes)
    header = json.dumps({"meta": meta, "arrays": table, "bytes": offset}).encode()
    # A name of its own for every writer: ranks that build the same index at once do not meet.
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(MAGIC + struct.pack("<QQ", len(header), zlib.crc32(header)) + header)
            _pad(file)
            start = file.tell()
            for label, array in flat.items():
                assert file.tell() - start == table[label][2]
                file.write(array.view(np.uint8).data)
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


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGN) * _ALIGN


def _pad(file: Any) -> None:
    file.write(bytes(_aligned(file.tell()) - file.tell()))
