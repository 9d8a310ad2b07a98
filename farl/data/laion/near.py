"""Hashes of small gray copies, equal for most copies of one picture at another size or quality."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from farl_engine.data import array_file
from farl_engine.data.decode_cpu import MAX_PIXELS
from farl_engine.data.shards import IMAGE_EXTENSIONS, MAX_IMAGE_BYTES, split_key
from farl_engine.data.tar_members import TarWalkError, walk_members

KIND = "difference hashes"
VERSION = 1
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
# A picture that is one colour, or one gradient, is no evidence.
_FEWEST_BITS = 12


def difference_hash(image: bytes) -> int:
    """64 bits: whether each pixel of the 9 x 8 gray copy is darker than its right neighbour (dHash); 0 for none.

    None have images that cannot be decoded, and those with too little in them.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(image), formats=_FORMATS) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    return 0
                # JPEGs decode at down to an eighth of their size.
                picture.draft("L", (72, 64))
                small = np.asarray(picture.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    except Exception:  # Pillow's parsers raise nearly anything on hostile input
        return 0
    bits = small[:, 1:] > small[:, :-1]
    if not _FEWEST_BITS <= int(bits.sum()) <= 64 - _FEWEST_BITS:
        return 0
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def shard_hashes(shard: Path) -> dict[str, int]:
    """Key -> hash of all images of a shard; kept in `NNNNN.dhash` beside it, so that each is decoded once.

    Raises:
        OSError: the shard cannot be read, or the folder not be written.
    """
    stat = shard.stat()
    state = [stat.st_size, stat.st_mtime_ns]
    kept = shard.with_suffix(".dhash")
    try:
        meta, arrays = array_file.read(kept)
        if (meta["kind"], meta["version"], meta["state"]) == (KIND, VERSION, state):
            return dict(zip(_keys(arrays), arrays["hash"].view(np.uint64).tolist(), strict=True))
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        pass
    hashes = _compute(shard)
    names = [key.encode("utf-8", "surrogatepass") for key in hashes]
    arrays = {
        "hash": np.fromiter(hashes.values(), np.uint64, len(hashes)).view(np.int64),
        "key_bytes": np.frombuffer(b"".join(names), np.uint8),
        "key_ends": np.cumsum([len(name) for name in names], dtype=np.int64),
    }
    array_file.write(kept, {"kind": KIND, "version": VERSION, "state": state}, arrays)
    return hashes


def _keys(arrays: dict[str, NDArray[np.uint8]]) -> list[str]:
    text, ends = arrays["key_bytes"].tobytes(), arrays["key_ends"].tolist()
    return [text[a:b].decode("utf-8", "surrogatepass") for a, b in zip([0, *ends], ends, strict=False)]


def _compute(shard: Path) -> dict[str, int]:
    hashes: dict[str, int] = {}
    fd = os.open(shard, os.O_RDONLY)
    try:
        for name, offset, size in walk_members(fd):
            parts = split_key(name)
            if parts is not None and parts[1] in IMAGE_EXTENSIONS and size <= MAX_IMAGE_BYTES:
                key = parts[0].decode("utf-8", "backslashreplace")
                hashes.setdefault(key, difference_hash(os.pread(fd, size, offset)))
    except TarWalkError:
        pass  # what comes before is good; the index names the fault
    finally:
        os.close(fd)
    return hashes
