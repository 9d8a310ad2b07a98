"""What img2dataset says of the samples in its shards: `NNNNN.parquet` and `NNNNN_stats.json` beside `NNNNN.tar`.

Where the parquet file is gone, the .json members of the tar say the same, and take a pass over the tar.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from farl.progress import Progress
from farl_engine.data.shards import MAX_JSON_BYTES, split_key
from farl_engine.data.tar_members import TarWalkError, walk_members

# name -> pyarrow type. All are there in a download made with `laion command`.
COLUMNS = {
    "key": "string",
    "status": "string",
    "caption": "string",
    "url": "string",
    "width": "int64",
    "height": "int64",
    "original_width": "int64",
    "original_height": "int64",
    "exif": "string",
    "sha256": "string",
    "md5": "string",
    "NSFW": "string",
    "LICENSE": "string",
    "SAMPLE_ID": "int64",
}
Result = TypeVar("Result")
_TURNED = '"Image Orientation": "(Mirrored|Rotated)'


def read_downloads(shard: Path, columns: Sequence[str]) -> Any:
    """A pyarrow table of a shard's downloaded samples with "key" and those of `columns` that are known, in the order
    of the parquet file; failed downloads are left out.

    Raises:
        ValueError: a file of another kind. OSError: it cannot be read.
    """
    pc = compute()

    wanted = list(dict.fromkeys(["key", *columns]))
    path = shard.with_suffix(".parquet")
    table = _from_parquet(path, [*wanted, "status"]) if path.exists() else _from_tar(shard, [*wanted, "status"])
    if "status" in table.column_names:
        table = table.filter(pc.fill_null(pc.equal(table.column("status"), "success"), False))
    return table.select([name for name in wanted if name in table.column_names])


def each_shard(
    function: Callable[..., Result], shards: Sequence[Path], *others: Sequence[Any], workers: int, description: str
) -> list[Result]:
    """`function(shard, ...)` of all shards in threads, with a bar; results in order. An error ends it soon."""
    pool = ThreadPoolExecutor(workers)
    try:
        results = []
        with Progress(len(shards), description, unit="shards") as progress:
            for result in pool.map(function, shards, *others):
                results.append(result)
                progress.update()
        return results
    finally:
        pool.shutdown(cancel_futures=True)


def read_stats(shard: Path) -> dict[str, Any] | None:
    """ "count", "successes", "failed_to_download", "failed_to_resize" and "status_dict" (message -> count) of a shard;
    None where there is no such file, or it is of another kind."""
    try:
        stats = json.loads(shard.with_name(f"{shard.stem}_stats.json").read_text())
        numbers = {name: int(stats[name]) for name in ("count", "successes", "failed_to_download", "failed_to_resize")}
        messages = {str(message): int(count) for message, count in stats.get("status_dict", {}).items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return {**numbers, "status_dict": messages}


def compute() -> Any:
    """The module pyarrow.compute; it makes its functions when imported, where type checkers do not see them."""
    import pyarrow.compute

    return pyarrow.compute


def strings(table: Any, name: str) -> list[str]:
    """A column as strings, null as ""."""
    pc = compute()

    return pc.fill_null(table.column(name), "").to_pylist()


def numbers(table: Any, name: str) -> NDArray[np.int64]:
    """A column as int64, null as -1."""
    pc = compute()

    return pc.fill_null(table.column(name), -1).to_numpy()


def turned(table: Any) -> NDArray[np.bool_]:
    """Whether EXIF turns or mirrors each image; no where it is not known."""
    pc = compute()

    if "exif" not in table.column_names:
        return np.zeros(len(table), bool)
    return pc.fill_null(pc.match_substring_regex(table.column("exif"), _TURNED), False).to_numpy(zero_copy_only=False)


def _from_parquet(path: Path, columns: Sequence[str]) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if "key" not in names:
            raise ValueError(f"{path} has no column key: it is not img2dataset's")
        table = file.read([name for name in columns if name in names])
        fields = [(name, COLUMNS[name]) for name in table.column_names]
        return table.cast(pyarrow.schema([(name, pyarrow.type_for_alias(kind)) for name, kind in fields]))
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        raise ValueError(f"{path} is not img2dataset's: {' '.join(str(error).split())}") from None


def _from_tar(shard: Path, columns: Sequence[str]) -> Any:
    import pyarrow

    rows: dict[str, list[Any]] = {name: [] for name in columns}
    fd = os.open(shard, os.O_RDONLY)
    try:
        for name, offset, size in walk_members(fd):
            parts = split_key(name)
            if parts is not None and parts[1] == b"json" and size <= MAX_JSON_BYTES:
                facts = _facts(os.pread(fd, size, offset))
                facts["key"] = parts[0].decode("utf-8", "backslashreplace")
                for column, values in rows.items():
                    values.append(_typed(facts.get(column), COLUMNS[column]))
    except TarWalkError:
        pass  # what comes before is good; the index names the fault
    finally:
        os.close(fd)
    found = {name: pyarrow.array(values, COLUMNS[name]) for name, values in rows.items()}
    return pyarrow.table({name: array for name, array in found.items() if array.null_count < max(len(array), 1)})


def _facts(content: bytes) -> dict[str, Any]:
    try:
        facts = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _typed(value: Any, kind: str) -> Any:
    """The value if it is of the kind, else None."""
    if kind == "string":
        return value.encode("utf-8", "replace").decode() if isinstance(value, str) else None
    if isinstance(value, str) and value.lstrip("-").isdecimal():
        value = int(value)
    whole = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**62
    return int(value) if whole and value == int(value) else None
