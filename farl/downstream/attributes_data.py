"""Sets for face attributes: CelebA, LFWA, images with a CSV file, and our own shards.

A sample is "image" uint8 [H, W, 3], "attributes" float32 [A] of 0, 1 or NaN (unknown), "name", and where the set has
landmarks "points" float32 [5, 2] (eyes, tip of the nose, corners of the mouth), in pixels with pixel centres at whole
numbers.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from farl.downstream.face_points import five_points, read_points
from farl.downstream.image_files import EXTENSIONS, read_image, real_paths
from farl.downstream.shard_members import ShardMembers, shards_of
from farl.downstream.task import Sample, Split, fingerprint
from farl.evaluation.attributes_table import AttributeTable, hash_share, read_attributes
from farl.faces.shards import MANIFEST

CELEBA_SPLITS = {"train": "0", "test": "2"}  # in list_eval_partition.txt; 1 is validation
CELEBA_IMAGES = "img_align_celeba"
LFWA_LABELS, LFWA_SPLIT, LFWA_IMAGES = "lfw_att_40.mat", "indices_train_test.mat", "lfw"
CSV_FILE = "attributes.csv"
SPLIT_COLUMN = "split"
SPLIT_WORDS = {"train": "train", "training": "train", "test": "test", "val": "", "valid": "", "validation": "", "": ""}
# Of a table without a split column.
TEST_SHARE, SPLIT_SEED = 0.2, 0
_VALUES = {"1": 1.0, "-1": 0.0, "0": 0.0}


class AttributeSet:
    """Labelled images of one layout.

    Args:
        path: as the user gave it. layout: "celeba", "lfwa", "folder", "faces" or "shards".
        attributes: names. labels: float32 [N, A].
        read: gives image and name of a sample by position. points: gives its five points.
        files: name and size in bytes of each file that belongs to the set.
        sources: as `OpenedSet.sources`.
        more: further entries of `about`.
    """

    def __init__(
        self,
        path: str,
        layout: str,
        attributes: Sequence[str],
        labels: NDArray[np.float32],
        read: Callable[[int], Sample],
        files: Iterable[tuple[str, int]],
        *,
        sources: Callable[[], Sequence[Hashable]],
        points: Callable[[int], NDArray[np.float32]] | None = None,
        crop_from: str = "whole",
        **more: Any,
    ) -> None:
        self._labels, self._read, self._points, self._sources = labels, read, points, sources
        digest = hashlib.sha256(np.ascontiguousarray(labels).tobytes()).hexdigest()
        self._about: dict[str, Any] = {
            "path": path,
            "layout": layout,
            "samples": len(labels),
            "fingerprint": fingerprint([*files, (f"labels {digest}", labels.size)]),
            "attributes": list(attributes),
            "crop_from": crop_from,
            **more,
        }

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Sample:
        """One sample; ValueError or OSError with the file's name where it cannot be used."""
        index = range(len(self))[index]
        sample = {**self._read(index), "attributes": self._labels[index].copy()}
        if self._points is not None:
            sample["points"] = self._points(index)
        return sample

    def about(self) -> dict[str, Any]:
        """As `LabelledSet.about`.

        Also "attributes" (names), "split" (what decided which images are in it), "crop_from" ("points" or "whole": what
        suits the layout), "image_size" where all images are squares of that side, and "frame" where the set has aligned
        images with landmarks: the mean five points, as shares of the longer side of an image that lies in the middle of
        a square, 0 to 1 between the square's outer edges.
        """
        return dict(self._about)

    def sources(self) -> Sequence[Hashable]:
        """As `OpenedSet.sources`."""
        return self._sources()


def open_attribute_set(path: str, *, split: Split) -> AttributeSet:
    """The set at `path`, recognised by its layout.

    - CelebA: img_align_celeba/, list_attr_celeba, list_eval_partition, and optionally list_landmarks_align_celeba,
      each .txt or .csv, beside each other or in Img/, Anno/ and Eval/ as the download has them.
    - LFWA: lfw/, lfw_att_40.mat and indices_train_test.mat.
    - a folder with attributes.csv: the first column names the image (from the folder or its images/), others hold 0/1
      or -1/1 or nothing (unknown). A column "split" (train, test, val) decides; without one, `TEST_SHARE` of the
      persons (columns such as "person"; of the images where there is none) are the test part, by a fixed hash.
      points/NAME.txt may hold 5, 68, 98 or 106 landmarks of each image.
    - such a CSV file itself: all of its rows, unless it has a column "split".
    - shards: tars whose samples have an image and a .json with 0/1 values, such as those of `farl.faces`; of a folder
      with train-*.tar, `split` chooses train-*.tar or test-*.tar (or val-*.tar).

    Raises:
        ValueError: none of those, or an incomplete one. OSError: it cannot be read.
    """
    folder = Path(path)
    if folder.is_file() and folder.suffix.lower() == ".csv":
        return _open_csv(path, folder, split, whole=True)
    if not folder.is_dir():
        return _open_shards(path, split)
    if _celeba_images(folder) is not None:
        return _open_celeba(path, folder, split)
    if (folder / LFWA_LABELS).is_file():
        return _open_lfwa(path, folder, split)
    if any(folder.glob("*.tar")):
        return _open_shards(path, split)
    if (folder / CSV_FILE).is_file():
        return _open_csv(path, folder / CSV_FILE, split, whole=False)
    raise ValueError(
        f"{path} is no set for attributes. Looked for: {CELEBA_IMAGES}/ (CelebA); {LFWA_LABELS} (LFWA); "
        f"shards (*.tar); {CSV_FILE}"
    )


def _open_celeba(path: str, folder: Path, split: Split) -> AttributeSet:
    images = _celeba_images(folder)
    assert images is not None
    group = {words[0]: words[1] for words in _rows(_celeba_list(folder, "list_eval_partition"), 1)}
    names = [name for name, number in group.items() if number == CELEBA_SPLITS[split]]
    if not names:
        raise ValueError(f"{folder}: list_eval_partition has no image of the part {CELEBA_SPLITS[split]} ({split})")
    place = {name: index for index, name in enumerate(names)}
    file = _celeba_list(folder, "list_attr_celeba")
    attributes = _header(file)
    labels = np.full((len(names), len(attributes)), np.nan, np.float32)
    seen = np.zeros(len(names), bool)
    for words in _rows(file, len(attributes)):
        if (index := place.get(words[0])) is not None:
            try:
                labels[index] = [_VALUES[word] for word in words[1:]]
            except KeyError as error:
                raise ValueError(f"{file}: {words[0]} has the value {error}; wanted 1 or -1") from None
            seen[index] = True
    if not seen.all():
        raise ValueError(f"{file} has no row for {names[int(seen.argmin())]}, which list_eval_partition names")
    landmarks = _celeba_list(folder, "list_landmarks_align_celeba", optional=True)
    files = [images / name for name in names]
    more: dict[str, Any] = {"split": f"list_eval_partition, part {CELEBA_SPLITS[split]}"}
    if landmarks is not None:
        found = [_numbers(words[1:], landmarks, words[0]) for words in _rows(landmarks, 10) if words[0] in place]
        if not found:
            raise ValueError(f"{landmarks} has no row for the images of {split}")
        height, width = read_image(files[0]).shape[:2]
        mean = (np.mean(found, 0).reshape(5, 2) + 0.5 - np.array([width, height]) / 2) / max(height, width) + 0.5
        more["frame"] = mean.round(6).tolist()
    return _of_files(path, "celeba", attributes, labels, images, files, None, **more)


def _celeba_images(folder: Path) -> Path | None:
    places = (folder / "Img" / CELEBA_IMAGES, folder / CELEBA_IMAGES)
    found = next((place for place in places if place.is_dir()), None)
    # Some archives unpack into a folder of the same name.
    return found / CELEBA_IMAGES if found is not None and (found / CELEBA_IMAGES).is_dir() else found


def _celeba_list(folder: Path, stem: str, *, optional: bool = False) -> Any:
    for place in (folder, folder / "Anno", folder / "Eval"):
        for suffix in (".txt", ".csv"):
            if (place / f"{stem}{suffix}").is_file():
                return place / f"{stem}{suffix}"
    if optional:
        return None
    raise ValueError(f"{folder} is CelebA without {stem}.txt: put it there, or into Anno/ or Eval/")


def _lines(file: Path) -> Iterator[list[str]]:
    with file.open(encoding="utf-8-sig") as lines:
        for line in lines:
            if words := re.split(r"[\s,]+", line.strip(" \t\r\n,")):
                yield words


def _header(file: Path) -> list[str]:
    """Names of the columns: the line after the number of images, or the first one of a CSV without its first cell."""
    lines = _lines(file)
    first = next(lines, [""])
    names = next(lines, []) if len(first) == 1 else first[1:]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{file} does not begin with the names of its columns")
    return names


def _rows(file: Path, columns: int) -> Iterator[list[str]]:
    """Name of the image and values, of each line that begins with an image's name."""
    for words in _lines(file):
        if Path(words[0]).suffix.lower() in EXTENSIONS:
            if len(words) != columns + 1:
                raise ValueError(f"{file}: {words[0]} has {len(words) - 1} values, wanted {columns}")
            yield words


def _numbers(words: Sequence[str], file: Path, name: str) -> list[float]:
    try:
        return [float(word) for word in words]
    except ValueError:
        raise ValueError(f"{file}: {name} has values that are not numbers") from None


def _open_lfwa(path: str, folder: Path, split: Split) -> AttributeSet:
    for name in (LFWA_SPLIT, LFWA_IMAGES):
        if not (folder / name).exists():
            raise ValueError(f"{folder} is LFWA without {name}: put it beside {LFWA_LABELS}")
    content, parts = _read_mat(folder / LFWA_LABELS), _read_mat(folder / LFWA_SPLIT)
    try:
        names, attributes, labels = content["name"], content["AttrName"], np.asarray(content["label"], np.float32)
        chosen = np.asarray(parts[f"indices_img_{split}"]).astype(np.int64).ravel() - 1  # MATLAB counts from 1
    except KeyError as error:
        raise ValueError(f"{folder}: {LFWA_LABELS} and {LFWA_SPLIT} have no {error}") from None
    if labels.shape != (len(names), len(attributes)):
        raise ValueError(f"{folder / LFWA_LABELS}: labels {list(labels.shape)} of {len(names)} images")
    if not len(chosen) or chosen.min() < 0 or chosen.max() >= len(names):
        raise ValueError(f"{folder / LFWA_SPLIT}: indices_img_{split} must be 1 to {len(names)}")
    labels = np.where(labels > 0, 1, 0).astype(np.float32)[chosen]
    images = [folder / LFWA_IMAGES / names[index].strip().replace("\\", "/") for index in chosen]
    return _of_files(
        path, "lfwa", [name.strip().replace(" ", "_") for name in attributes], labels, folder, images, None,
        split=f"{LFWA_SPLIT}, indices_img_{split}",
    )  # fmt: skip


def _read_mat(file: Path) -> dict[str, Any]:
    """Variables of a MATLAB 7.3 file (which is HDF5): arrays as MATLAB has them, cells of text as lists of str.

    Raises:
        ValueError: h5py is not installed, or another kind of file.
    """
    try:
        import h5py  # pyrefly: ignore[missing-import]
    except ImportError:
        raise ValueError(f"{file} is read with h5py: pip install h5py") from None
    try:
        with h5py.File(file) as content:
            found = {}
            for name, value in content.items():
                if not isinstance(value, h5py.Dataset):
                    continue
                array = value[()].T
                if array.dtype == object:
                    cells = (content[cell][()].ravel() for cell in array.ravel(order="F"))
                    found[name] = ["".join(map(chr, cell)) for cell in cells]
                else:
                    found[name] = array
            return found
    except OSError:
        raise ValueError(f"{file} is no MATLAB 7.3 file (HDF5)") from None


def _open_csv(path: str, file: Path, split: Split, *, whole: bool) -> AttributeSet:
    table, root = read_attributes(file), file.parent
    if len(set(table.keys)) < len(table.keys):
        twice = next(key for key in table.keys if table.keys.count(key) > 1)
        raise ValueError(f"{file} names {twice} twice: an image must have one row")
    rows, how = _rows_of(table, file, split, whole=whole)
    labels = table.labels.numpy()[rows]
    images = [_image_of(root, table.keys[row]) for row in rows]
    points, crop_from, files = None, "whole", []
    if (root / "points").is_dir():
        files = [root / "points" / f"{image.stem}.txt" for image in images]
        if missing := [one for one in files if not one.is_file()]:
            raise ValueError(f"{missing[0]} is missing: each image needs its landmarks there")
        points, crop_from = (lambda index: five_points(read_points(files[index]), str(files[index]))), "points"
    more = {"split": how, "crop_from": crop_from}
    return _of_files(path, "folder", table.names, labels, root, images, points, landmarks=files, **more)


def _rows_of(table: AttributeTable, file: Path, split: Split, *, whole: bool) -> tuple[list[int], str]:
    """Rows of a part, and what decided."""
    with file.open(newline="", encoding="utf-8-sig") as lines:
        header, *body = (row for row in csv.reader(lines) if row)
    place = next((i for i, name in enumerate(header) if i and name.strip().lower() == SPLIT_COLUMN), None)
    if place is not None:
        words = [row[place].strip().lower() for row in body]
        if unknown := sorted(set(words) - set(SPLIT_WORDS)):
            raise ValueError(f"{file}: the column {header[place]} holds {unknown[0]!r}; use train, test and val")
        rows, how = [i for i, word in enumerate(words) if SPLIT_WORDS[word] == split], f"column {header[place]}"
    elif whole:
        return list(range(len(table.keys))), "all rows"
    else:
        units = table.groups or table.keys
        in_test = (hash_share(units, SPLIT_SEED) < TEST_SHARE).tolist()
        rows = [i for i, value in enumerate(in_test) if value == (split == "test")]
        what = f"persons (column {table.group_column})" if table.groups else "images (no column says who is on them)"
        how = f"{TEST_SHARE:.0%} of the {what} to test, by hash with seed {SPLIT_SEED}"
    if not rows:
        raise ValueError(f"{file} has no row for {split}: {how}")
    return rows, how


def _image_of(root: Path, key: str) -> Path:
    for place in (root / key, root / "images" / key):
        for file in (place, *(place.with_name(place.name + extension) for extension in EXTENSIONS)):
            if file.is_file():
                return file
    raise ValueError(f"{root / key} is missing, which the first column of the table names")


def _open_shards(path: str, split: Split) -> AttributeSet:
    members = ShardMembers(shards_of(path, split))
    indices = [i for i in range(len(members)) if members.has(i, "json")]
    if not indices:
        raise ValueError(f"{path}: no sample of these shards has a .json with attributes")
    rows = [_json_values(members.read(i, "json"), members.where(i)) for i in indices]
    names = list(dict.fromkeys(name for row in rows for name in row))
    names = [name for name in names if _is_attribute([row.get(name) for row in rows])]
    if not names:
        raise ValueError(f"{path}: no entry of the .json files holds nothing but 0 and 1")
    values = {1: 1.0, 0: 0.0, -1: 0.0, None: np.nan}
    labels = np.array([[values[row.get(name)] for name in names] for row in rows], np.float32)

    def read(index: int) -> Sample:
        where = members.where(indices[index])
        return {"image": read_image(members.read(indices[index], "image"), where), "name": where}

    def points(index: int) -> NDArray[np.float32]:
        where = members.where(indices[index])
        try:
            found = np.array(json.loads(members.read(indices[index], "landmarks.json")), np.float32)
        except ValueError:
            raise ValueError(f"{where}.landmarks.json is not a list of [x, y]") from None
        return five_points(found, where)

    manifest = members.paths[0].parent / MANIFEST
    size = json.loads(manifest.read_text()).get("size") if manifest.is_file() else None
    with_points = all(members.has(i, "landmarks.json") for i in indices)
    kinds = ("image", *(["landmarks.json"] * with_points))
    return AttributeSet(
        path,
        "faces" if size else "shards",
        names,
        labels,
        read,
        [(f"{members.keys[i]}.{kind}", members.size(i, kind)) for i in indices for kind in kinds],
        sources=partial(members.sources, indices),
        points=points if with_points else None,
        split="the shards themselves",
        **({"image_size": size} if size else {}),
    )


def _json_values(content: bytes, name: str) -> dict[str, Any]:
    try:
        values = json.loads(content)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"{name}.json does not hold names and values")
    return values


def _is_attribute(values: Sequence[Any]) -> bool:
    known = [value for value in values if value is not None]
    return bool(known) and all(isinstance(value, int | float) and value in (0, 1, -1) for value in known)


def _of_files(
    path: str,
    layout: str,
    attributes: Sequence[str],
    labels: NDArray[np.float32],
    root: Path,
    images: Sequence[Path],
    points: Callable[[int], NDArray[np.float32]] | None,
    *,
    landmarks: Sequence[Path] = (),
    **more: Any,
) -> AttributeSet:
    """A set of image files, and of those with their landmarks. ValueError where an image is not there."""

    def read(index: int) -> Sample:
        return {"image": read_image(images[index]), "name": str(images[index])}

    def files() -> Iterator[tuple[str, int]]:
        for image in images:
            try:
                yield str(image.relative_to(root)), image.stat().st_size
            except FileNotFoundError:
                raise ValueError(f"{image} is missing, which the table of labels names") from None
        for file in landmarks:
            yield str(file.relative_to(root)), file.stat().st_size

    sources = partial(real_paths, images)
    return AttributeSet(path, layout, attributes, labels, read, files(), sources=sources, points=points, **more)
