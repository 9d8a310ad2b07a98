"""Attribute tables: CSV files of binary labels, matched to the samples of an index."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

GROUP_COLUMNS = ("person", "person_id", "identity", "subject", "subject_id", "group")
# -1 is CelebA's "no".
_VALUES = {"1": 1.0, "0": 0.0, "-1": 0.0, "true": 1.0, "false": 0.0, "yes": 1.0, "no": 0.0, "": torch.nan}
_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass
class AttributeTable:
    """Labels of images, one row each.

    Attributes:
        keys: the first column: a sample key or the path of an image.
        names: names of the binary attributes (A of them).
        labels: float32 [rows, A] of 0, 1 or NaN (empty cell).
        groups: the person of each row, or None if the table has no such column.
        group_column: its name.
        ignored: columns that are neither binary nor the person.
    """

    keys: list[str]
    names: list[str]
    labels: Tensor
    groups: list[str] | None
    group_column: str | None
    ignored: list[str]


def read_attributes(path: str | Path) -> AttributeTable:
    """Read a CSV whose first column names the image; binary columns hold 0/1, -1/1, true/false or yes/no.

    A column called person, person_id, identity, subject, subject_id or group tells who is on the image; other columns
    that are not binary are ignored.

    Raises:
        ValueError: no rows, rows of unequal length, or no binary column.
    """
    with Path(path).open(newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.reader(file) if row]
    if len(rows) < 2:
        raise ValueError(f"{path} has no rows below its header: wanted image,attribute,... and a row an image")
    header, body = [name.strip() for name in rows[0]], rows[1:]
    for number, row in enumerate(body, 2):
        if len(row) != len(header):
            raise ValueError(f"{path}: row {number} has {len(row)} cells, its header has {len(header)}")
    columns = {name: [row[i].strip() for row in body] for i, name in enumerate(header)}
    group_column = next((name for name in header[1:] if name.lower() in GROUP_COLUMNS), None)
    names = [
        name
        for name in header[1:]
        if name != group_column and all(value.lower() in _VALUES for value in columns[name]) and any(columns[name])
    ]
    if not names:
        raise ValueError(f"{path} has no column of 0/1 labels: it has {', '.join(header[1:]) or 'one column only'}")
    labels = torch.tensor([[_VALUES[value.lower()] for value in columns[name]] for name in names]).T.contiguous()
    return AttributeTable(
        keys=columns[header[0]],
        names=names,
        labels=labels,
        groups=columns[group_column] if group_column else None,
        group_column=group_column,
        ignored=[name for name in header[1:] if name not in names and name != group_column],
    )


def match_rows(table: AttributeTable, keys: Sequence[str]) -> Tensor:
    """int64 [len(keys)], the row of `table` for each sample key, or -1.

    Compared without the image's suffix: the whole path first, then the last part alone where it is one row's only.

    Raises:
        ValueError: no key has a row.
    """
    whole: dict[str, int] = {}
    stems: dict[str, int] = {}
    for row, key in enumerate(table.keys):
        path = _without_suffix(key)
        whole.setdefault(path, row)
        stem = path.rsplit("/", 1)[-1]
        stems[stem] = -1 if stem in stems else row
    found = []
    for key in keys:
        path = _without_suffix(key)
        found.append(whole.get(path, stems.get(path.rsplit("/", 1)[-1], -1)))
    if keys and max(found) < 0:
        raise ValueError(
            f"no sample matches the attribute table: its first column has {table.keys[0]!r}, the shards have "
            f"{keys[0]!r}; name the images in the CSV as the samples are named in the shards"
        )
    return torch.tensor(found, dtype=torch.int64)


def hash_share(names: Sequence[str], seed: int) -> Tensor:
    """float64 [len(names)] in [0, 1), a fixed function of each name: equal names always land on one side of a split."""
    digests = [hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest() for name in names]
    return torch.tensor([int.from_bytes(digest, "little") / 2**64 for digest in digests], dtype=torch.float64)


def _without_suffix(name: str) -> str:
    path = name.replace("\\", "/").removeprefix("./")
    suffix = "." + path.rsplit(".", 1)[-1].lower() if "." in path else ""
    return path[: -len(suffix)] if suffix in _IMAGE_SUFFIXES else path
