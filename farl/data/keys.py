"""Keys of samples: what joins a sample in a shard with a row of a table that names its image."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from hashlib import blake2b

# The name field of a tar header holds 100 bytes; the rest is for the extension and the number of a repeated image.
MAX_KEY_CHARACTERS = 80


def sample_key(image: str) -> str:
    """The key of an image: its path without suffix, "images/00012.jpg" -> "images/00012".

    Characters other than ASCII letters, digits, "_" and "-" become "_", because a dot ends a key in a tar. Where a
    letter gets lost so, or a long path is cut, a hash of the path keeps two such images apart; the hash also ends what
    would read as one of webdataset's own names, `__NAME__`.
    """
    parts = [part for part in image.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    path = re.sub(r"(?<=[^/])\.[^./]*$", "", "/".join(parts))
    key = re.sub(r"[^A-Za-z0-9_/-]", "_", path)
    reserved = not key or (key.startswith("__") and key.endswith("__"))
    if not path.isascii() or len(key) > MAX_KEY_CHARACTERS or reserved:
        digest = blake2b(path.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
        key = f"{key[: MAX_KEY_CHARACTERS - 9]}-{digest}"
    return key


def number_repeats(keys: Iterable[str]) -> Iterator[str]:
    """The keys in order, with "--2", "--3", ... after one that was there before (an image with several captions)."""
    count: dict[str, int] = {}
    for key in keys:
        name = key
        while name in count:
            count[key] += 1
            name = f"{key}--{count[key]}"
        count[name] = 1
        yield name


def in_validation(group: str, fraction: float) -> bool:
    """Whether a group belongs to the validation split: a hash of its name decides, so that neither the order nor
    samples that are added later move it."""
    digest = blake2b(group.encode("utf-8", "surrogatepass"), digest_size=8, person=b"farl.val").digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
