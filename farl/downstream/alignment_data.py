"""Sets for face alignment: AFLW-19, 300W, WFLW, images beside their .pts files, and our own shards.

A sample is "image" uint8 [H, W, 3], "points" float32 [N, 2] (x, y), "box" float32 [4] (left, top, right, bottom) from
which it is cropped and by which errors may be divided, "name", and "subsets" (names) where the benchmark has some.
Points and boxes are in pixels with pixel centres at whole numbers; points may lie outside the image.

Where a benchmark gives no box of its own, it is made from the true points: crops then know where the face is, in the
published figures on 300W and WFLW too.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from farl.downstream.image_files import check_present, list_images, read_image, real_paths
from farl.downstream.shard_members import ShardMembers, shards_of
from farl.downstream.task import Sample, Split, fingerprint
from farl.faces.shards import MANIFEST

Array = NDArray[np.float32]

AFLW_SUBSETS = ("frontal",)
IBUG_SUBSETS = ("common", "challenge")
# In the order of the flags in WFLW's lists, by FaRL's names.
WFLW_SUBSETS = ("largepose", "expression", "illumination", "makeup", "occlusion", "blur")

AFLW_MAT, AFLW_POINTS, AFLW_TRAIN = "AFLWinfo_release.mat", 19, 20000
AFLW_CSV = {"train": "face_landmarks_aflw_train.csv", "test": "face_landmarks_aflw_test.csv"}
IBUG_CSV = {
    "train": {"face_landmarks_300w_train.csv": ()},
    "test": {
        "face_landmarks_300w_valid_common.csv": ("common",),
        "face_landmarks_300w_valid_challenge.csv": ("challenge",),
    },
}
IBUG_FOLDERS = {
    "train": {"afw": (), "helen/trainset": (), "lfpw/trainset": ()},
    "test": {"helen/testset": ("common",), "lfpw/testset": ("common",), "ibug": ("challenge",)},
}
# HRNet's lists of 300W count from 2 (MATLAB's 1, and one more): FaRL subtracts it, and so do we.
IBUG_CSV_ORIGIN = 2.0
# The authors of 300W wrote .pts files with MATLAB, where the centre of the first pixel is 1; menpo reads them so too.
PTS_ORIGIN = 1.0
WFLW_LIST = "list_98pt_rect_attr_{}.txt"
WFLW_POINTS = 98
LANDMARKS_MEMBER = "landmarks.json"


@dataclass(frozen=True)
class Face:
    """A labelled face in an image file; `box` None is made from the points."""

    image: Path
    points: Array
    box: Array | None = None
    subsets: tuple[str, ...] = ()
    name: str = ""


class AlignmentSet:
    """Labelled faces of one layout.

    Args:
        path: as the user gave it. layout: "aflw-19", "300w", "wflw", "folder", "faces" or "shards".
        points: number of landmarks.
        read: decodes a sample by position.
        files: name and size in bytes of each file that belongs to the set.
        sources: as `OpenedSet.sources`.
        image_size: side of all images, where they are squares of one size.
    """

    def __init__(
        self,
        path: str,
        layout: str,
        points: int,
        samples: int,
        read: Callable[[int], Sample],
        files: Iterable[tuple[str, int]],
        *,
        sources: Callable[[], Sequence[Hashable]],
        image_size: int | None = None,
    ) -> None:
        self._read, self._samples, self._points, self._sources = read, samples, points, sources
        self._about: dict[str, Any] = {
            "path": path,
            "layout": layout,
            "samples": samples,
            "fingerprint": fingerprint(files),
            "points": points,
        }
        if image_size is not None:
            self._about["image_size"] = image_size

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> Sample:
        """One sample; ValueError or OSError with the file's name where it cannot be used."""
        sample = self._read(range(self._samples)[index])
        if sample["points"].shape != (self._points, 2):
            count = len(sample["points"])
            raise ValueError(f"{sample['name']} has {count} points; the first of the set has {self._points}")
        if sample.get("box") is None:
            sample["box"] = box_around(sample["points"])
        left, top, right, bottom = sample["box"]
        if not (np.isfinite(sample["points"]).all() and right > left and bottom > top):
            raise ValueError(f"{sample['name']}: points that are not finite numbers, or a box without area")
        return sample

    def about(self) -> dict[str, Any]:
        """As `LabelledSet.about`, and "image_size" where all images are squares of that side."""
        return dict(self._about)

    def sources(self) -> Sequence[Hashable]:
        """As `OpenedSet.sources`."""
        return self._sources()


def open_alignment_set(path: str, *, split: Split) -> AlignmentSet:
    """The set at `path`, recognised by its layout.

    - AFLW-19: AFLWinfo_release.mat and data/flickr/ (needs scipy), or HRNet's face_landmarks_aflw_*.csv.
    - 300W: HRNet's face_landmarks_300w_*.csv, or without them the .pts files in afw/, helen/, lfpw/ and ibug/.
    - WFLW: WFLW_images/ and list_98pt_rect_attr_*.txt (where the archive has them, or beside the images).
    - a folder (or one with train/ and test/) of images, each with NAME.pts beside it; or a pattern that ends in .pts.
    - shards: tars whose samples have an image and landmarks.json, such as those of `farl.faces`.

    Raises:
        ValueError: none of those, or an incomplete one. OSError: it cannot be read.
    """
    folder = Path(path)
    if folder.suffix == ".pts":
        return _open_points(path, folder.parent, sorted(folder.parent.glob(folder.name)))
    if not folder.is_dir():
        return _open_shards(path, split)
    if (folder / AFLW_MAT).is_file() or (folder / AFLW_CSV[split]).is_file():
        return _open_aflw(path, folder, split)
    if (folder / "WFLW_images").is_dir():
        return _open_wflw(path, folder, split)
    if (folder / "ibug").is_dir() or any((folder / name).is_file() for name in IBUG_CSV[split]):
        return _open_300w(path, folder, split)
    for home in (folder / split, folder):
        if home.is_dir() and any(home.glob("*.pts")):
            return _open_points(path, home, sorted(home.glob("*.pts")))
    if any(folder.glob("*.tar")):
        return _open_shards(path, split)
    raise ValueError(
        f"{path} is no set for alignment. Looked for: NAME.pts beside each image; AFLW-19's {AFLW_MAT}; 300W's "
        f"face_landmarks_300w_*.csv or ibug/; WFLW's WFLW_images/; shards (*.tar)"
    )


def read_pts(file: Path) -> Array:
    """Points float32 [N, 2] of a .pts file, counted from 0 (in the file from 1).

    Raises:
        ValueError: not such a file. OSError: it cannot be read.
    """
    try:
        head, body = file.read_text().split("{")
        numbers = np.array(body.split("}")[0].split(), np.float64)
    except (ValueError, UnicodeDecodeError):
        raise ValueError(
            f"{file} is not a .pts file: wanted n_points and, in braces, x and y of a point a line"
        ) from None
    fields = dict(line.split(":", 1) for line in head.splitlines() if ":" in line)
    announced = fields.get("n_points", "").strip()
    if not len(numbers) or len(numbers) % 2 or announced not in ("", str(len(numbers) // 2)):
        raise ValueError(f"{file} announces {announced or 'no'} points and has {len(numbers) / 2:g}")
    return (numbers.reshape(-1, 2) - PTS_ORIGIN).astype(np.float32)


def box_around(points: Array) -> Array:
    """The smallest box (left, top, right, bottom) that holds all points: float32 [4]."""
    return np.concatenate([points.min(0), points.max(0)])


def hrnet_box(points: Array) -> Array:
    """The square, float32 [4], that HRNet's lists give for 300W and WFLW: of whole pixels, as long as the longer side.

    In its lists that is the centre and the side / 200 ("scale"), computed from the true points.
    """
    low, high = np.floor(points.min(0)), np.ceil(points.max(0))
    center, half = (low + high) / 2, (high - low).max() / 2
    return np.concatenate([center - half, center + half]).astype(np.float32)


def _open_aflw(path: str, folder: Path, split: Split) -> AlignmentSet:
    listed = folder / AFLW_MAT
    if listed.is_file():
        faces = _read_aflw_mat(listed, split)
    else:
        listed = folder / AFLW_CSV[split]
        faces = []
        for name, (_, side, x, y, *points) in _read_csv(listed, 4 + 2 * AFLW_POINTS):
            box = np.array([x - side / 2, y - side / 2, x + side / 2, y + side / 2], np.float32)
            faces.append(Face(Path(name), _pairs(points), box))
    homes = [folder / "data" / "flickr", folder / "flickr", folder / "images", folder]
    root = next(home for home in homes if home.is_dir())
    return _of_faces(path, "aflw-19", AFLW_POINTS, [replace(face, image=root / face.image) for face in faces], [listed])


def _read_aflw_mat(file: Path, split: Split) -> list[Face]:
    """`ra` is a permutation of all faces, counted from 1, whose first 20,000 are for training (Zhu et al. 2016)."""
    try:
        loadmat = importlib.import_module("scipy.io").loadmat
    except ImportError:
        raise ValueError(
            f"{file} needs scipy: pip install scipy, or put HRNet's {AFLW_CSV[split]} there instead (without subsets)"
        ) from None
    info = loadmat(str(file))
    order = info["ra"].astype(np.int64).ravel() - 1
    faces = []
    for index in order[:AFLW_TRAIN] if split == "train" else order[AFLW_TRAIN:]:
        left, right, top, bottom = info["bbox"][index].astype(np.float32)
        faces.append(
            Face(
                Path(str(info["nameList"][index][0][0])),
                # All x, then all y.
                info["data"][index].reshape(2, AFLW_POINTS).T.astype(np.float32),
                np.array([left, top, right, bottom], np.float32),
                AFLW_SUBSETS if (info["mask_new"][index] == 1).all() else (),
            )
        )
    return faces


def _open_300w(path: str, folder: Path, split: Split) -> AlignmentSet:
    lists = [folder / name for name in IBUG_CSV[split]]
    faces: list[Face] = []
    if any(file.is_file() for file in lists):
        check_present(lists)
        root = folder / "images" if (folder / "images").is_dir() else folder
        for file, subsets in zip(lists, IBUG_CSV[split].values(), strict=True):
            for name, (scale, x, y, *points) in _read_csv(file, 3 + 2 * 68):
                half, center = 100 * scale, np.array([x, y]) - IBUG_CSV_ORIGIN
                box = np.concatenate([center - half, center + half]).astype(np.float32)
                # One file of the archive is called "image_092 _01.jpg", in the list it has no space.
                image = root / name.replace("image_092_01", "image_092 _01")
                faces.append(Face(image, _pairs(points) - np.float32(IBUG_CSV_ORIGIN), box, subsets))
        return _of_faces(path, "300w", 68, faces, lists)
    files = []
    for name, subsets in IBUG_FOLDERS[split].items():
        if not (folder / name).is_dir():
            raise ValueError(f"{folder} is 300W without {name}/, which its {split} part needs")
        points = sorted((folder / name).glob("*.pts"))
        for image, pts in _beside(folder / name, points):
            found = read_pts(pts)
            faces.append(Face(image, found, hrnet_box(found), subsets))
        files += points
    return _of_faces(path, "300w", 68, faces, files)


def _open_wflw(path: str, folder: Path, split: Split) -> AlignmentSet:
    name = WFLW_LIST.format(split)
    inner = "list_98pt_rect_attr_train_test"
    homes = (folder, folder / inner, folder / "WFLW_annotations" / inner, folder / "WFLW_annotations")
    listed = next((home / name for home in homes if (home / name).is_file()), None)
    if listed is None:
        raise ValueError(f"{folder} has WFLW_images/ but not {name}: unpack WFLW_annotations.tar.gz there")
    faces = []
    for number, line in enumerate(listed.read_text().splitlines(), 1):
        # 98 points, a detector's box (not used in the protocol), six flags, and the name.
        words = line.split(maxsplit=2 * WFLW_POINTS + 10)
        if not words:
            continue
        try:
            points = _pairs(np.array(words[: 2 * WFLW_POINTS], np.float64))
            flags = [int(word) for word in words[-7:-1]]
            subsets = tuple(subset for subset, flag in zip(WFLW_SUBSETS, flags, strict=True) if flag)
            image = folder / "WFLW_images" / words[2 * WFLW_POINTS + 10]
        except (ValueError, IndexError):
            raise ValueError(f"{listed}, line {number}: wanted 98 points, 4 numbers, 6 flags and a name") from None
        faces.append(Face(image, points, hrnet_box(points), subsets, f"{image} (line {number})"))
    return _of_faces(path, "wflw", WFLW_POINTS, faces, [listed])


def _open_points(path: str, folder: Path, points: list[Path]) -> AlignmentSet:
    if not points:
        raise ValueError(f"{path}: there is no such .pts file")
    pairs = _beside(folder, points)

    def read(index: int) -> Sample:
        image, pts = pairs[index]
        return {"image": read_image(image), "points": read_pts(pts), "name": str(image)}

    files = _files([*(image for image, _ in pairs), *points])
    sources = partial(real_paths, [image for image, _ in pairs])
    return AlignmentSet(path, "folder", len(read_pts(points[0])), len(pairs), read, files, sources=sources)


def _open_shards(path: str, split: Split) -> AlignmentSet:
    members = ShardMembers(shards_of(path, split))
    indices = [i for i in range(len(members)) if members.has(i, LANDMARKS_MEMBER)]
    if not indices:
        raise ValueError(f"{path}: no sample of these shards has a {LANDMARKS_MEMBER}")

    def points(i: int) -> Array:
        try:
            return np.array(json.loads(members.read(i, LANDMARKS_MEMBER)), np.float32).reshape(-1, 2)
        except ValueError:
            raise ValueError(f"{members.where(i)}.{LANDMARKS_MEMBER} is not a list of [x, y]") from None

    def read(index: int) -> Sample:
        i = indices[index]
        name = members.where(i)
        return {"image": read_image(members.read(i, "image"), name), "points": points(i), "name": name}

    manifest = members.paths[0].parent / MANIFEST
    size = json.loads(manifest.read_text()).get("size") if manifest.is_file() else None
    kinds = ("image", LANDMARKS_MEMBER)
    files = [(f"{members.keys[i]}.{kind}", members.size(i, kind)) for i in indices for kind in kinds]
    layout = "faces" if size else "shards"
    return AlignmentSet(
        path,
        layout,
        len(points(indices[0])),
        len(indices),
        read,
        files,
        sources=partial(members.sources, indices),
        image_size=size,
    )


def _of_faces(path: str, layout: str, points: int, faces: Sequence[Face], lists: list[Path]) -> AlignmentSet:
    if not faces:
        raise ValueError(f"{path} lists no face")
    images = sorted({face.image for face in faces})
    check_present(images)

    def read(index: int) -> Sample:
        face = faces[index]
        sample = {"image": read_image(face.image), "points": face.points, "name": face.name or str(face.image)}
        return sample | {"box": face.box, "subsets": face.subsets}

    def sources() -> list[Hashable]:
        # Several faces of a photograph may lie in both parts of a benchmark.
        places = real_paths([face.image for face in faces])
        return [(place, face.points.tobytes()) for place, face in zip(places, faces, strict=True)]

    # Lists of one name and size may hold other points, and one file may list both parts.
    labels = hashlib.sha256(b"".join(face.points.tobytes() for face in faces)).hexdigest()
    files = [*_files([*lists, *images]), (f"labels {labels}", len(faces))]
    return AlignmentSet(path, layout, points, len(faces), read, files, sources=sources)


def _read_csv(file: Path, numbers: int) -> list[tuple[str, list[float]]]:
    """Rows of HRNet's lists: a name, then numbers; the first line is a head."""
    rows = []
    for number, line in enumerate(file.read_text().splitlines()[1:], 2):
        if not line.strip() or line.startswith("#"):
            continue
        name, *words = line.strip().split(",")
        try:
            values = [float(word) for word in words]
        except ValueError:
            values = []
        if len(values) != numbers:
            raise ValueError(
                f"{file}, line {number}: wanted a name and {numbers} numbers, not {len(words)} more fields"
            )
        rows.append((name, values))
    return rows


def _pairs(numbers: Sequence[float] | NDArray[np.floating]) -> Array:
    return np.asarray(numbers, np.float32).reshape(-1, 2)


def _beside(folder: Path, points: list[Path]) -> list[tuple[Path, Path]]:
    """The image of each .pts file. ValueError where one has none."""
    images = {image.stem: image for image in list_images(folder)}
    for file in points:
        if file.stem not in images:
            raise ValueError(f"{file} has no image of the same name beside it")
    return [(images[file.stem], file) for file in points]


def _files(files: list[Path]) -> list[tuple[str, int]]:
    """Names with their folders' and sizes; where the set lies does not count."""
    return [(f"{file.parent.name}/{file.name}", file.stat().st_size) for file in files]
