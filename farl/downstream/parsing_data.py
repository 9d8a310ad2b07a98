"""Sets for face parsing: LaPa, CelebAMask-HQ, a folder of images and masks, and our own shards.

A sample is "image" uint8 [H, W, 3], "mask" uint8 [H, W] of class numbers (255: not labelled), "name", and what the crop
is made from, where there is any: "points" float32 [5, 2], or "box" float32 [4] (left, top, right, bottom). Points and
boxes are in pixels, with pixel centres at whole numbers.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from farl.downstream.confusion import UNLABELLED
from farl.downstream.face_points import five_points, read_points
from farl.downstream.image_files import (
    check_present,
    check_same_size,
    list_images,
    read_image,
    read_mask,
    real_paths,
)
from farl.downstream.shard_members import ShardMembers, shards_of
from farl.downstream.task import Sample, Split, fingerprint
from farl.faces.face import CLASSES as LAPA_CLASSES
from farl.faces.shards import MANIFEST
from farl.progress import Progress

# Parts as CelebAMask-HQ names its files; where parts overlap the later one wins (FaRL
# `farl/datasets/celebamask_hq.py`). The class number is the place here, after the background.
CELEBAMASK_PARTS = (
    "neck", "skin", "cloth", "l_ear", "r_ear", "l_brow", "r_brow", "l_eye", "r_eye", "nose", "mouth", "l_lip", "u_lip",
    "hair", "eye_g", "hat", "ear_r", "neck_l",
)  # fmt: skip
CELEBAMASK_FOLDER = 2000  # images a folder of parts
CELEBAMASK_SPLITS = {"train": "0", "test": "2"}  # in list_eval_partition.txt; 1 is validation

LAPA_FOLDERS = ("images", "labels", "landmarks")
MASK_MEMBER = "mask.png"
CLASSES_FILE = "classes.txt"
_SCAN_THREADS = 8
_PART = re.compile(r"(\d{5})_(\w+)\.png")
_EACH = ": each image needs its own file there"


class ParsingSet:
    """Labelled images of one layout.

    Args:
        path: as the user gave it. layout: "lapa", "celebamask-hq", "folder", "faces" or "shards".
        classes: names, by class number; None where nothing but a look at all masks could say.
        read: decodes a sample by position.
        files: name and size in bytes of each file that belongs to the set.
        sources: as `OpenedSet.sources`.
    """

    def __init__(
        self,
        path: str,
        layout: str,
        classes: Sequence[str] | None,
        samples: int,
        read: Callable[[int], Sample],
        files: Iterable[tuple[str, int]],
        *,
        sources: Callable[[], Sequence[Hashable]],
        crop_from: str = "whole",
        image_size: int | None = None,
    ) -> None:
        self._read, self._samples, self._sources = read, samples, sources
        self._classes = len(classes) if classes is not None else None
        self._about: dict[str, Any] = {
            "path": path,
            "layout": layout,
            "samples": samples,
            "fingerprint": fingerprint(files),
            "crop_from": crop_from,
        }
        if classes is not None:
            self._about["classes"] = list(classes)
        if image_size is not None:
            self._about["image_size"] = image_size

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> Sample:
        """One sample; ValueError or OSError with the file's name where it cannot be used."""
        sample = self._read(range(self._samples)[index])
        if self._classes is not None:
            check_labels(sample["mask"], self._classes, sample["name"])
        return sample

    def about(self) -> dict[str, Any]:
        """As `LabelledSet.about`.

        Also "crop_from": "points", "box" or "whole"; and "image_size" where all images are squares of that side. A
        plain test set without a list of classes has no "classes": it may lack some of the training set's.
        """
        return dict(self._about)

    def sources(self) -> Sequence[Hashable]:
        """As `OpenedSet.sources`."""
        return self._sources()


def open_parsing_set(path: str, *, split: Split) -> ParsingSet:
    """The set at `path`, recognised by its layout.

    - LaPa: a folder with train/ and test/ (`split` chooses), or one of those itself: images/, labels/, landmarks/.
    - CelebAMask-HQ: CelebA-HQ-img/, CelebAMask-HQ-mask-anno/ and the two lists that split it.
    - a folder with images/ and masks/ of the same names; optional points/NAME.txt (5, 68, 98 or 106 points) or
      boxes/NAME.txt (left, top, right, bottom), and classes.txt (a name a line, the background first).
    - shards: tars whose samples have an image and mask.png, such as those of `farl.faces`.

    Raises:
        ValueError: none of those, or an incomplete one. OSError: it cannot be read.
    """
    folder = Path(path)
    if not folder.is_dir():
        return _open_shards(path, split)
    if (folder / "CelebA-HQ-img").is_dir():
        return _open_celebamask(path, folder, split)
    if all((folder / split / name).is_dir() for name in LAPA_FOLDERS):
        return _open_lapa(path, folder / split)
    if all((folder / name).is_dir() for name in LAPA_FOLDERS):
        return _open_lapa(path, folder)
    if (folder / "images").is_dir() and (folder / "masks").is_dir():
        return _open_folder(path, folder, split)
    if any(folder.glob("*.tar")):
        return _open_shards(path, split)
    raise ValueError(
        f"{path} is no set for parsing. Looked for: images/ and masks/; LaPa's {split}/ with images/, labels/ and "
        "landmarks/; CelebAMask-HQ's CelebA-HQ-img/; shards (*.tar)"
    )


def check_labels(mask: NDArray[np.uint8], classes: int, name: str) -> None:
    """ValueError where a mask holds a number that is neither a class nor 255."""
    highest = int(np.max(mask, where=mask != UNLABELLED, initial=0))
    if highest >= classes:
        raise ValueError(
            f"{name}: the mask holds {highest}, but the {classes} classes are 0 to {classes - 1} "
            f"({UNLABELLED}: not labelled)"
        )


def merge_parts(parts: dict[str, NDArray[np.bool_]], shape: tuple[int, int]) -> NDArray[np.uint8]:
    """CelebAMask-HQ's parts [H, W] by name to class numbers; the later in `CELEBAMASK_PARTS` lies on top."""
    mask = np.zeros(shape, np.uint8)
    for number, name in enumerate(CELEBAMASK_PARTS, 1):
        if name in parts:
            mask[parts[name]] = number
    return mask


def _open_lapa(path: str, folder: Path) -> ParsingSet:
    images = _images(folder / "images")
    stems = [image.stem for image in images]
    labels = [folder / "labels" / f"{stem}.png" for stem in stems]
    landmarks = [folder / "landmarks" / f"{stem}.txt" for stem in stems]
    check_present(labels + landmarks, _EACH)

    def read(index: int) -> Sample:
        points = five_points(read_points(landmarks[index]), str(landmarks[index]))
        return _sample(images[index], labels[index], points=points)

    files = _files(folder, images + labels + landmarks)
    sources = partial(real_paths, images)
    return ParsingSet(path, "lapa", LAPA_CLASSES, len(images), read, files, sources=sources, crop_from="points")


def _open_celebamask(path: str, folder: Path, split: Split) -> ParsingSet:
    numbers = _celebamask_split(folder, split)
    images = [folder / "CelebA-HQ-img" / f"{number}.jpg" for number in numbers]
    check_present(images, _EACH)
    home = folder / "CelebAMask-HQ-mask-anno"
    parts = _celebamask_parts(home, numbers)

    def read(index: int) -> Sample:
        number = numbers[index]
        inside = home / str(number // CELEBAMASK_FOLDER)
        files = {name: inside / _part_file(number, name) for name in CELEBAMASK_PARTS if name in parts[number]}
        if not files:
            raise ValueError(f"{images[index]}: no part of it lies under {inside}")
        masks = {name: _read_part(file) for name, file in files.items()}
        shape = next(iter(masks.values())).shape
        for name, mask in masks.items():
            if mask.shape != shape:
                raise ValueError(f"{files[name]} is {mask.shape[::-1]} pixels, other parts {shape[::-1]}")
        image = _to_parts(read_image(images[index]), shape, str(images[index]))
        return {"image": image, "mask": merge_parts(masks, shape), "name": str(images[index])}

    classes = ("background", *CELEBAMASK_PARTS)
    files = _files(folder, images)
    files += [(_part_file(number, name), size) for number in numbers for name, size in sorted(parts[number].items())]
    sources = partial(real_paths, images)
    return ParsingSet(path, "celebamask-hq", classes, len(images), read, files, sources=sources)


def _part_file(number: int, name: str) -> str:
    return f"{number:05d}_{name}.png"


def _celebamask_parts(home: Path, numbers: Sequence[int]) -> dict[int, dict[str, int]]:
    """Names and bytes of the parts of each image.

    One listing a folder: with 18 names an image, asking for each would take a minute on a network disk.
    """
    found: dict[int, dict[str, int]] = {number: {} for number in numbers}
    for inside in sorted({home / str(number // CELEBAMASK_FOLDER) for number in numbers}):
        if not inside.is_dir():
            continue
        with os.scandir(inside) as entries:
            for entry in entries:
                words = _PART.fullmatch(entry.name)
                if words and words[2] in CELEBAMASK_PARTS and int(words[1]) in found:
                    found[int(words[1])][words[2]] = entry.stat().st_size
    return found


def _celebamask_split(folder: Path, split: Split) -> list[int]:
    """Numbers of the images of a split: CelebA's own, through the list that names each image's origin."""
    mapping, partition = folder / "CelebA-HQ-to-CelebA-mapping.txt", folder / "list_eval_partition.txt"
    for file in (mapping, partition):
        if not file.is_file():
            raise ValueError(f"{folder} is CelebAMask-HQ without {file.name}, which says what is in train and test")
    group = {}
    for line in partition.read_text().splitlines():
        if len(words := line.split()) == 2:
            group[words[0]] = words[1]
    numbers = []
    for line in mapping.read_text().splitlines():
        words = line.split()
        if len(words) == 3 and words[0].isdigit() and group.get(words[2]) == CELEBAMASK_SPLITS[split]:
            numbers.append(int(words[0]))
    if not numbers:
        raise ValueError(f"{mapping} and {partition.name} have no image of the split {split} in common")
    return sorted(numbers)


def _open_folder(path: str, folder: Path, split: Split) -> ParsingSet:
    images = _images(folder / "images")
    masks = [folder / "masks" / f"{image.stem}.png" for image in images]
    check_present(masks, _EACH)
    sidecar = next((name for name in ("points", "boxes") if (folder / name).is_dir()), None)
    sides = [folder / sidecar / f"{image.stem}.txt" for image in images] if sidecar else []
    check_present(sides, _EACH)

    def read(index: int) -> Sample:
        crop: dict[str, Any] = {}
        if sidecar == "points":
            crop["points"] = five_points(read_points(sides[index]), str(sides[index]))
        elif sidecar == "boxes":
            crop["box"] = _read_box(sides[index])
        return _sample(images[index], masks[index], **crop)

    classes = _named_classes(folder)
    if classes is None and split == "train":
        classes = _scan_classes(path, len(masks), lambda i: read_mask(masks[i]))
    crop_from = {"points": "points", "boxes": "box", None: "whole"}[sidecar]
    files = _files(folder, images + masks + sides)
    sources = partial(real_paths, images)
    return ParsingSet(path, "folder", classes, len(images), read, files, sources=sources, crop_from=crop_from)


def _open_shards(path: str, split: Split) -> ParsingSet:
    members = ShardMembers(shards_of(path, split))
    indices = [i for i in range(len(members)) if members.has(i, MASK_MEMBER)]
    if not indices:
        raise ValueError(f"{path}: no sample of these shards has a {MASK_MEMBER}")
    with_points = all(members.has(i, "landmarks.json") for i in indices)

    def read(index: int) -> Sample:
        i = indices[index]
        name = members.where(i)
        image = read_image(members.read(i, "image"), name)
        mask = read_mask(members.read(i, MASK_MEMBER), f"{name}.{MASK_MEMBER}")
        check_same_size(image, mask, name)
        sample: Sample = {"image": image, "mask": mask, "name": name}
        if with_points:
            try:
                points = np.array(json.loads(members.read(i, "landmarks.json")), np.float32)
            except ValueError:
                raise ValueError(f"{name}.landmarks.json is not a list of [x, y]") from None
            sample["points"] = five_points(points, name)
        return sample

    home = members.paths[0].parent
    manifest = home / MANIFEST
    size = json.loads(manifest.read_text()).get("size") if manifest.is_file() else None
    classes = LAPA_CLASSES if size else _named_classes(home)
    if classes is None and split == "train":
        classes = _scan_classes(path, len(indices), lambda i: read_mask(members.read(indices[i], MASK_MEMBER)))
    kinds = ("image", MASK_MEMBER, *(["landmarks.json"] * with_points))
    files = [(f"{members.keys[i]}.{kind}", members.size(i, kind)) for i in indices for kind in kinds]
    crop_from = "points" if with_points else "whole"
    layout = "faces" if size else "shards"
    return ParsingSet(
        path,
        layout,
        classes,
        len(indices),
        read,
        files,
        sources=partial(members.sources, indices),
        crop_from=crop_from,
        image_size=size,
    )


def _sample(image_file: Path, mask_file: Path, **more: Any) -> Sample:
    image, mask = read_image(image_file), read_mask(mask_file)
    check_same_size(image, mask, str(image_file))
    return {"image": image, "mask": mask, "name": str(image_file), **more}


def _to_parts(image: NDArray[np.uint8], shape: tuple[int, ...], name: str) -> NDArray[np.uint8]:
    """Images are 1024, parts 512: the image comes to them by the mean of blocks (at one half, FaRL's bilinear)."""
    factor = image.shape[0] // shape[0]
    if image.shape[:2] != (factor * shape[0], factor * shape[1]):
        raise ValueError(f"{name} is {image.shape[1::-1]} pixels, no multiple of its parts' {shape[::-1]}")
    return np.asarray(Image.fromarray(image).reduce(factor))


def _read_part(file: Path) -> NDArray[np.bool_]:
    return read_image(file).max(-1) > 0


def _read_box(file: Path) -> NDArray[np.float32]:
    box = read_points(file)
    if box.shape != (2, 2) or not (box[1] > box[0]).all():
        raise ValueError(f"{file} is not a box: wanted 4 numbers, left top right bottom")
    return box.ravel()


def _named_classes(folder: Path) -> list[str] | None:
    file = folder / CLASSES_FILE
    if not file.is_file():
        return None
    names = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    if len(names) < 2 or len(set(names)) < len(names) or len(names) > UNLABELLED:
        raise ValueError(f"{file} must name 2 to {UNLABELLED} different classes, one a line, the background first")
    return names


def _scan_classes(path: str, count: int, read: Callable[[int], NDArray[np.uint8]]) -> list[str]:
    """As many classes as the masks hold; a file of names saves this look at all of them."""

    def highest(index: int) -> int:
        mask = read(index)
        return int(np.max(mask, where=mask != UNLABELLED, initial=0))

    top = 0
    with ThreadPoolExecutor(_SCAN_THREADS) as pool, Progress(count, "look for classes", unit="masks") as progress:
        for value in pool.map(highest, range(count)):
            top = max(top, value)
            progress.update()
    if top == 0:
        raise ValueError(f"{path}: all masks hold nothing but 0 (and {UNLABELLED}, not labelled): nothing to learn")
    return ["background", *(f"class_{number}" for number in range(1, top + 1))]


def _images(folder: Path) -> list[Path]:
    images = list_images(folder)
    if not images:
        raise ValueError(f"{folder} holds no image")
    return images


def _files(root: Path, files: list[Path]) -> list[tuple[str, int]]:
    return [(str(file.relative_to(root)), file.stat().st_size) for file in files]
