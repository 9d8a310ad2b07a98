"""Where samples come from: a folder of images or a table that names images (`tars.py` reads existing tars)."""

from __future__ import annotations

import codecs
import csv
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from farl.data.keys import number_repeats, sample_key
from farl_engine.data.shards import MAX_IMAGE_BYTES, MAX_TEXT_BYTES

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jfif", ".mpo"})
IMAGE_COLUMNS = ("image", "image_path", "img_path", "path", "filepath", "file_path", "filename", "file_name", "file")
CAPTION_COLUMNS = ("caption", "text", "captions", "title", "alt_text", "description")
TABLE_SUFFIXES = frozenset({".tsv", ".csv", ".parquet"})


@dataclass(frozen=True)
class Sample:
    """One pair, its image as the bytes of the file. `group` is the group column's value, or the image's path."""

    key: str
    image: bytes
    caption: bytes
    extension: str
    group: str
    extra: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Skipped:
    """A row that gives no sample: the cause (one of few) and what was at fault."""

    cause: str
    where: str


@dataclass(frozen=True)
class Row:
    """An image by path (relative to the root) and its caption; a caption of None is read from the .txt beside."""

    image: str
    caption: bytes | None
    group: str


class Files:
    """Samples of rows that name image files, relative to `root`. Only regular files inside `allowed` (by default the
    same folder) are read, whatever a row or a link says."""

    def __init__(self, rows: list[Row | Skipped], root: Path, *, allowed: Path | None = None) -> None:
        self._rows = rows
        self._root = root
        self._allowed = os.path.realpath(allowed or root)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Sample | Skipped]:
        keys = number_repeats(sample_key(row.image) for row in self._rows if isinstance(row, Row))
        for row in self._rows:
            yield row if isinstance(row, Skipped) else self._read(row, next(keys))

    def _read(self, row: Row, key: str) -> Sample | Skipped:
        caption = (self._caption_beside(row.image) if row.caption is None else row.caption).strip()
        if not caption:
            return Skipped("missing_caption", row.image)
        try:
            image = self._bytes(row.image)
        except _OutsideRootError:
            return Skipped("outside_root", row.image)
        except _OversizedError:
            return Skipped("oversized", row.image)
        except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a null byte in the path
            return Skipped("missing_file", row.image)
        except OSError as error:
            return Skipped("unreadable", f"{row.image} ({error.strerror})")
        return make_sample(key, image, caption, row.group, row.image)

    def _caption_beside(self, image: str) -> bytes:
        try:
            return as_utf8(self._bytes(os.path.splitext(image)[0] + ".txt", MAX_TEXT_BYTES))  # noqa: PTH122 - a name such as "a." has no suffix
        except (OSError, ValueError):
            return b""

    def _bytes(self, name: str, most: int = MAX_IMAGE_BYTES) -> bytes:
        real = os.path.realpath(self._root / name)
        if os.path.commonpath([real, self._allowed]) != self._allowed:
            raise _OutsideRootError(name)
        path = Path(real)
        if not path.is_file():  # a pipe or a device would never end
            raise FileNotFoundError(name)
        if path.stat().st_size > most:
            raise _OversizedError(name)
        return path.read_bytes()


class _OutsideRootError(OSError):
    pass


class _OversizedError(OSError):
    pass


def make_sample(
    key: str, image: bytes, caption: bytes, group: str, where: str, extra: Mapping[str, bytes] | None = None
) -> Sample | Skipped:
    """The sample, or why its image is none; the extension follows the content, not the name of the file."""
    if not image:
        return Skipped("empty", where)
    extension = image_extension(image)
    if extension is None:
        return Skipped("not_an_image", where)
    return Sample(key, image, caption, extension, group, extra or {})


def as_utf8(caption: bytes) -> bytes:
    """A caption in UTF-16, as its byte order mark says, in UTF-8; any other as it is."""
    if caption.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return caption.decode("utf-16", errors="replace").encode()
    return caption


def image_extension(image: bytes) -> str | None:
    """The extension for the kind of image that these bytes begin, None if they begin none."""
    if image.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if image.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    if image[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    if image[:4] in (b"II*\x00", b"MM\x00*"):
        return "tif"
    if image[:2] == b"BM" and len(image) > 26:
        return "bmp"
    return None


def read_folder(folder: Path) -> list[Row | Skipped]:
    """All images below `folder`, sorted by path; captions are in the .txt files beside them."""
    rows: list[Row | Skipped] = []
    for directory, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                image = (Path(directory) / name).relative_to(folder).as_posix()
                rows.append(Row(image, None, group=image))
    return sorted(rows, key=lambda row: row.image if isinstance(row, Row) else "")


def read_table(
    table: Path,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    group_column: str | None = None,
) -> list[Row | Skipped]:
    """The rows of a TSV, CSV or parquet file, in their order. Columns are found by the names in use if not given."""
    columns = table_columns(table)
    image = _find_column(columns, image_column, IMAGE_COLUMNS, "image", table)
    caption = _find_column(columns, caption_column, CAPTION_COLUMNS, "caption", table)
    wanted = [image, caption]
    if group_column is not None:
        wanted.append(_find_column(columns, group_column, (), "group", table))
    rows: list[Row | Skipped] = []
    for number, values in enumerate(read_columns(table, wanted), start=1):
        if values is None:
            rows.append(Skipped("malformed_row", f"{table.name}, row {number}"))
        elif not values[0]:
            rows.append(Skipped("missing_file", f"{table.name}, row {number}: no image is named"))
        elif group_column is not None and not values[2]:
            rows.append(Skipped("missing_group", f"{table.name}, row {number}"))
        else:
            group = values[2] if group_column is not None else values[0]
            rows.append(Row(values[0], values[1].encode("utf-8", "surrogateescape"), group))
    return rows


def read_groups(table: Path, group_column: str, image_column: str | None = None) -> dict[str, str]:
    """Key of an image -> its group, from a table of its own, which need not call the image's column the same."""
    columns = table_columns(table)
    image_column = image_column if image_column in columns else None
    wanted = [
        _find_column(columns, image_column, IMAGE_COLUMNS, "image", table),
        _find_column(columns, group_column, (), "group", table),
    ]
    return {sample_key(values[0]): values[1] for values in read_columns(table, wanted) if values and values[1]}


def _find_column(columns: list[str], asked: str | None, usual: Iterable[str], role: str, table: Path) -> str:
    option = f"--{role}-column"
    if asked is not None:
        if asked not in columns:
            raise ValueError(f"{option} {asked}: {table.name} has the columns {', '.join(columns)}")
        return asked
    by_name = {column.lower(): column for column in reversed(columns)}
    for name in usual:
        if name in by_name:
            return by_name[name]
    raise ValueError(f"{table.name} has the columns {', '.join(columns)}: say with {option} which is the {role}")


def table_columns(table: Path) -> list[str]:
    """The names of the columns; ValueError if there are none."""
    if table.suffix.lower() == ".parquet":
        return list(_open_parquet(table).schema_arrow.names)
    with _open_text(table) as file:
        columns = next(_split_rows(file, table), [])
    if not any(columns):
        raise ValueError(f"{table} is empty: wanted a first line with the names of the columns")
    return columns


def read_columns(table: Path, columns: list[str]) -> Iterator[list[str] | None]:
    """The values of some columns, a row at a time; None for a row with too few or too many. Bytes that are not UTF-8
    come through as surrogate escapes, so that nothing is lost on the way to the shard."""
    if table.suffix.lower() == ".parquet":
        for batch in _open_parquet(table).iter_batches(columns=list(dict.fromkeys(columns))):
            data = batch.to_pydict()
            for values in zip(*(data[column] for column in columns), strict=True):
                yield ["" if value is None else str(value) for value in values]
        return
    with _open_text(table) as file:
        reader = _split_rows(file, table)
        header = next(reader)
        places = [header.index(column) for column in columns]
        for row in reader:
            if row:  # a blank line is no row
                yield [row[place] for place in places] if len(row) == len(header) else None


def _open_text(table: Path) -> IO[str]:
    """A table as text: UTF-8, or UTF-16 (as spreadsheets save "Unicode text") where it has its byte order mark."""
    with table.open("rb") as file:
        head = file.read(2)
    if head in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return table.open(encoding="utf-16", errors="replace", newline="")
    return table.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def _split_rows(file: Any, table: Path) -> Iterator[list[str]]:
    csv.field_size_limit(sys.maxsize)
    if table.suffix.lower() != ".tsv":
        yield from csv.reader(file)
        return
    # A quote at the head of a caption would make csv's own TSV reading swallow the lines up to the next quote.
    for line in file:
        line = line.rstrip("\r\n")
        yield [_unquote(value) for value in line.split("\t")] if line else []


def _unquote(value: str) -> str:
    quoted = len(value) >= 2 and value[0] == value[-1] == '"' and value[1:-1].replace('""', "").count('"') == 0
    return value[1:-1].replace('""', '"') if quoted else value


def _open_parquet(table: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(table)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{table} is no parquet file: {' '.join(str(error).split())}") from None
