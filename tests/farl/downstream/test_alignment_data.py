"""Tiny sets in each benchmark's own layout."""

from __future__ import annotations

import importlib
import io
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from farl.downstream.alignment_data import hrnet_box, open_alignment_set, read_pts
from farl.faces.face import draw
from farl.faces.shards import FaceSet, write_faces
from farl_engine.data.shards import ShardWriter

RNG = np.random.default_rng(0)


def save(path: Path, height: int = 30, width: int = 40) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return path


def scattered(count: int) -> np.ndarray:
    """Points with two decimals, some outside the image."""
    return RNG.uniform(-5, 45, (count, 2)).round(2).astype(np.float32)


def write_pts(path: Path, points: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{x:.2f} {y:.2f}" for x, y in points]
    path.write_text(f"version: 1\nn_points:  {len(points)}\n{{\n" + "\n".join(lines) + "\n}\n")
    return path


def csv_row(name: str, head: list[float], points: np.ndarray) -> str:
    return ",".join([name, *(f"{value:g}" for value in head), *(f"{value:.2f}" for value in points.ravel())])


def test_hrnet_box_is_that_of_its_lists() -> None:
    """Rows of HRNet's list of the 300W challenge part: extremes of the points; centre and scale."""
    for low, high, center, scale in (
        ((312.411702, 57.357609), (416.568955, 166.942542), (364.5, 112.0), 0.55),
        ((189.012152, 65.764917), (309.476242, 194.136995), (249.5, 130.0), 0.65),
        ((195.138378, 406.922371), (690.164596, 884.146214), (443.0, 645.5), 2.48),
    ):
        box = hrnet_box(np.array([low, high, (np.add(low, high) / 2)], np.float32))
        half = 100 * scale
        assert box.tolist() == pytest.approx([center[0] - half, center[1] - half, center[0] + half, center[1] + half])


@pytest.fixture
def aflw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, Any]]:
    """20,003 faces in an order of their own, on 3 images; what scipy gives for the .mat, shapes and kinds alike."""
    root, count = tmp_path / "AFLW-19", 20_003
    for name in ("0/image00002.jpg", "2/image00013.jpg", "3/image00014.jpg"):
        save(root / "data" / "flickr" / name)
    (root / "AFLWinfo_release.mat").write_bytes(b"MATLAB 5.0 MAT-file")
    names = np.empty((count, 1), object)
    for i in range(count):
        names[i, 0] = np.array([["0/image00002.jpg", "2/image00013.jpg", "3/image00014.jpg"][i % 3]])
    mask = np.ones((count, 19), np.uint8)
    mask[::2, 7] = 0
    info = {
        "bbox": np.tile(np.array([[5, 35, 2, 26]], np.float64), (count, 1)) + np.arange(count)[:, None] / 100,
        "data": RNG.uniform(0, 30, (count, 38)),
        "mask_new": mask,
        "nameList": names,
        "ra": (RNG.permutation(count) + 1).astype(np.uint16)[None],
    }
    package, module = ModuleType("scipy"), ModuleType("scipy.io")
    module.loadmat = lambda file: info  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "scipy", package)
    monkeypatch.setitem(sys.modules, "scipy.io", module)
    return root, info


def test_aflw(aflw: tuple[Path, dict[str, Any]]) -> None:
    root, info = aflw
    train, test = (open_alignment_set(str(root), split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (20_000, 3)
    assert train.about()["layout"] == "aflw-19" and train.about()["points"] == 19
    for position in range(3):
        face = int(info["ra"][0, 20_000 + position]) - 1
        sample = test[position]
        assert sample["name"].endswith(info["nameList"][face, 0][0])
        assert sample["points"] == pytest.approx(np.stack([info["data"][face, :19], info["data"][face, 19:]], 1))
        assert sample["points"].dtype == np.float32
        shift = face / 100
        assert sample["box"] == pytest.approx(np.array([5, 2, 35, 26]) + shift)
        assert sample["subsets"] == (("frontal",) if face % 2 else ())
        assert sample["image"].shape == (30, 40, 3)


def test_aflw_without_scipy(aflw: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ModuleType:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r"needs scipy: pip install scipy, or .* face_landmarks_aflw_train.csv"):
        open_alignment_set(str(aflw[0]), split="train")


def test_aflw_as_hrnet_lists_it(tmp_path: Path) -> None:
    save(tmp_path / "images" / "0" / "a.jpg")
    points = scattered(19)
    rows = ["image_path,scale,box_size,center_w,center_h,...", csv_row("0/a.jpg", [0.2, 30, 20, 15], points)]
    for split in ("train", "test"):
        (tmp_path / f"face_landmarks_aflw_{split}.csv").write_text("\n".join(rows) + "\n")
    sample = open_alignment_set(str(tmp_path), split="test")[0]
    assert sample["points"] == pytest.approx(points) and sample["box"].tolist() == [5, 0, 35, 30]


@pytest.fixture
def ibug_csv(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    root, points = tmp_path / "IBUG300W", {}
    lists = {
        "face_landmarks_300w_train.csv": ["afw/1.jpg", "helen/trainset/2.jpg"],
        "face_landmarks_300w_valid_common.csv": ["lfpw/testset/3.png"],
        "face_landmarks_300w_valid_challenge.csv": ["ibug/image_092_01.jpg"],
    }
    for file, names in lists.items():
        rows = ["image_name,scale,center_w,center_h,original_0_x,..."]
        for name in names:
            save(root / name.replace("092_01", "092 _01"))
            points[name] = scattered(68) + 2
            rows.append(csv_row(name, [0.2, 22.5, 17], points[name]))
        (root / file).write_text("\n".join([*rows, "# a note", ""]))
    return root, points


def test_300w_as_hrnet_lists_it(ibug_csv: tuple[Path, dict[str, np.ndarray]]) -> None:
    root, points = ibug_csv
    train, test = (open_alignment_set(str(root), split=split) for split in ("train", "test"))
    assert (len(train), len(test), train.about()["layout"]) == (2, 2, "300w")
    assert train[1]["points"] == pytest.approx(points["helen/trainset/2.jpg"] - 2, abs=1e-4)
    assert train[1]["box"].tolist() == [0.5, -5, 40.5, 35]
    assert [test[i]["subsets"] for i in range(2)] == [("common",), ("challenge",)]
    assert test[1]["name"].endswith("ibug/image_092 _01.jpg")
    assert train.about()["fingerprint"] != test.about()["fingerprint"]


def test_300w_with_faults(ibug_csv: tuple[Path, dict[str, np.ndarray]]) -> None:
    root, _ = ibug_csv
    listed = root / "face_landmarks_300w_train.csv"
    text = listed.read_text()
    listed.write_text(text.replace("afw/1.jpg,0.2,", "afw/1.jpg,"))
    with pytest.raises(ValueError, match=r"300w_train.csv, line 2: wanted a name and 139 numbers"):
        open_alignment_set(str(root), split="train")
    listed.write_text(text)
    (root / "afw" / "1.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"afw/1.jpg cannot be decoded"):
        open_alignment_set(str(root), split="train")[0]
    (root / "afw" / "1.jpg").unlink()
    with pytest.raises(ValueError, match=r"afw/1.jpg missing"):
        open_alignment_set(str(root), split="train")
    (root / "face_landmarks_300w_valid_common.csv").unlink()
    with pytest.raises(ValueError, match=r"valid_common.csv missing"):
        open_alignment_set(str(root), split="test")


def test_300w_from_its_archives(tmp_path: Path) -> None:
    parts = ("afw", "helen/trainset", "helen/testset", "lfpw/trainset", "lfpw/testset", "ibug")
    points = {}
    for part in parts:
        save(tmp_path / part / "image_1.png")
        points[part] = scattered(68)
        write_pts(tmp_path / part / "image_1.pts", points[part])
    train, test = (open_alignment_set(str(tmp_path), split=split) for split in ("train", "test"))
    assert (len(train), len(test), test.about()["layout"]) == (3, 3, "300w")
    found = {
        str(Path(s["name"]).parent.relative_to(tmp_path)): s
        for s in [data[i] for data in (train, test) for i in range(3)]
    }
    assert {name: s["subsets"] for name, s in found.items()} == {
        "afw": (), "helen/trainset": (), "lfpw/trainset": (),
        "helen/testset": ("common",), "lfpw/testset": ("common",), "ibug": ("challenge",),
    }  # fmt: skip
    for part, sample in found.items():
        assert sample["points"] == pytest.approx(points[part] - 1, abs=1e-5)
        assert sample["box"].tolist() == hrnet_box(points[part] - 1).tolist()
    (tmp_path / "helen" / "testset").rename(tmp_path / "helen" / "test")
    with pytest.raises(ValueError, match="300W without helen/testset/, which its test part needs"):
        open_alignment_set(str(tmp_path), split="test")


@pytest.fixture
def wflw(tmp_path: Path) -> tuple[Path, np.ndarray]:
    save(tmp_path / "WFLW_images" / "7--Cheering" / "7_Cheering_1.jpg", 50, 60)
    points = scattered(98)
    home = tmp_path / "WFLW_annotations" / "list_98pt_rect_attr_train_test"
    home.mkdir(parents=True)
    numbers = " ".join(f"{value:.6f}" for value in points.ravel())
    line = f"{numbers} 10 11 30 31 1 0 0 1 0 1 7--Cheering/7_Cheering_1.jpg"
    plain = line.replace(" 1 0 0 1 0 1 7--", " 0 0 0 0 0 0 7--")
    (home / "list_98pt_rect_attr_train.txt").write_text(line + "\n")
    (home / "list_98pt_rect_attr_test.txt").write_text(f"{line}\n{plain}\n")
    return tmp_path, points


def test_wflw(wflw: tuple[Path, np.ndarray]) -> None:
    root, points = wflw
    train, test = (open_alignment_set(str(root), split=split) for split in ("train", "test"))
    assert (len(train), len(test), test.about()["layout"], test.about()["points"]) == (1, 2, "wflw", 98)
    sample = test[0]
    assert sample["points"] == pytest.approx(points, abs=1e-5)
    assert sample["subsets"] == ("largepose", "makeup", "blur") and test[1]["subsets"] == ()
    assert sample["box"].tolist() == hrnet_box(points).tolist() and sample["image"].shape == (50, 60, 3)
    assert "7_Cheering_1.jpg (line 1)" in sample["name"]


def test_wflw_with_faults(wflw: tuple[Path, np.ndarray]) -> None:
    root, _ = wflw
    listed = root / "WFLW_annotations" / "list_98pt_rect_attr_train_test" / "list_98pt_rect_attr_train.txt"
    listed.write_text("1 2 3\n")
    with pytest.raises(ValueError, match=r"attr_train.txt, line 1: wanted 98 points, 4 numbers, 6 flags and a name"):
        open_alignment_set(str(root), split="train")
    listed.unlink()
    with pytest.raises(ValueError, match=r"has WFLW_images/ but not list_98pt_rect_attr_train.txt"):
        open_alignment_set(str(root), split="train")


def test_folder_of_pts(tmp_path: Path) -> None:
    points = [scattered(68) for _ in range(4)]
    for i, found in enumerate(points):
        save(tmp_path / f"{i}_1.jpg", 20 + i, 50)
        write_pts(tmp_path / f"{i}_1.pts", found)
    whole = open_alignment_set(str(tmp_path), split="train")
    assert (len(whole), whole.about()["layout"], whole.about()["points"]) == (4, "folder", 68)
    sample = whole[2]
    # The centre of the first pixel is 1 in the file and 0 here.
    assert sample["points"] == pytest.approx(points[2] - 1, abs=1e-5) and sample["image"].shape == (22, 50, 3)
    low, high = sample["points"].min(0), sample["points"].max(0)
    assert sample["box"].tolist() == [*low.tolist(), *high.tolist()]
    part = open_alignment_set(str(tmp_path / "[01]_*.pts"), split="test")
    assert len(part) == 2 and part.about()["fingerprint"] != whole.about()["fingerprint"]
    with pytest.raises(IndexError):
        whole[4]
    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(whole.__getitem__, [0, 1, 2, 3] * 4))) == 16


def test_folder_with_train_and_test(tmp_path: Path) -> None:
    for name in ("train/a", "train/b", "test/c"):
        save(tmp_path / f"{name}.jpg")
        write_pts(tmp_path / f"{name}.pts", scattered(5))
    assert [len(open_alignment_set(str(tmp_path), split=split)) for split in ("train", "test")] == [2, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version: 1\nn_points: 3\n{\n1 2\n3 4\n}\n", "announces 3 points and has 2"),
        ("version: 1\nn_points: 2\n{\n1 2\n3\n}\n", "announces 2 points and has 1.5"),
        ("1 2\n3 4\n", "is not a .pts file"),
        ("version: 1\nn_points: 1\n{\none two\n}\n", "is not a .pts file"),
    ],
)
def test_broken_pts(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.pts").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_pts(tmp_path / "a.pts")


def test_folder_with_faults(tmp_path: Path) -> None:
    for i in range(2):
        save(tmp_path / f"{i}.jpg")
        write_pts(tmp_path / f"{i}.pts", scattered(68 + i))
    data = open_alignment_set(str(tmp_path), split="train")
    assert len(data[0]["points"]) == 68
    with pytest.raises(ValueError, match=r"1.jpg has 69 points; the first of the set has 68"):
        data[1]
    bad = scattered(68)
    bad[3] = np.nan
    write_pts(tmp_path / "1.pts", bad)
    with pytest.raises(ValueError, match=r"1.jpg: points that are not finite"):
        data[1]
    (tmp_path / "1.jpg").unlink()
    with pytest.raises(ValueError, match=r"1.pts has no image of the same name"):
        open_alignment_set(str(tmp_path), split="train")
    with pytest.raises(ValueError, match=r"there is no such \.pts file"):
        open_alignment_set(str(tmp_path / "x*.pts"), split="train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"is no set for alignment\. Looked for"):
        open_alignment_set(str(tmp_path / "empty"), split="train")


def test_drawn_faces(tmp_path: Path) -> None:
    write_faces(tmp_path, FaceSet(train=3, val=2, size=48), workers=0)
    train = open_alignment_set(str(tmp_path / "train-*.tar"), split="train")
    about = train.about()
    assert (len(train), about["layout"], about["points"], about["image_size"]) == (3, "faces", 68, 48)
    face = draw(1, size=48)
    assert train[1]["points"] == pytest.approx(face.landmarks, abs=0.0051)
    assert train[1]["image"].shape == (48, 48, 3)
    assert [len(open_alignment_set(str(tmp_path), split=split)) for split in ("train", "test")] == [3, 2]


def test_other_shards(tmp_path: Path) -> None:
    def jpeg() -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(RNG.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(buffer, "JPEG")
        return buffer.getvalue()

    with ShardWriter(tmp_path / "%03d.tar") as writer:
        writer.write("a", {"jpg": jpeg(), "landmarks.json": json.dumps([[1.5, -2], [30, 4]]).encode()})
        writer.write("b", {"jpg": jpeg(), "txt": b"no points"})
        writer.write("c", {"jpg": jpeg(), "landmarks.json": b"no list"})
    data = open_alignment_set(str(tmp_path), split="train")
    assert (len(data), data.about()["layout"], data.about()["points"]) == (2, "shards", 2)
    assert data[0]["points"].tolist() == [[1.5, -2], [30, 4]] and "image_size" not in data.about()
    with pytest.raises(ValueError, match=r"c.landmarks.json is not a list"):
        data[1]
