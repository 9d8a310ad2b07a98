"""A test set that was trained on is told from the two parts of a layout that splits itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from farl.downstream import alignment_data
from farl.downstream.alignment_data import open_alignment_set
from farl.downstream.attributes_data import open_attribute_set
from farl.downstream.overlap import samples_in_both
from farl.downstream.parsing_data import open_parsing_set
from farl_engine.data.shards import ShardWriter

OPEN: dict[str, Callable[..., Any]] = {
    "parsing": open_parsing_set,
    "alignment": open_alignment_set,
    "attributes": open_attribute_set,
}


def in_both(task: str, train: Path | str, test: Path | str) -> int:
    opened = (OPEN[task](str(path), split=split) for path, split in ((train, "train"), (test, "test")))
    return samples_in_both(*opened)


def write(path: Path, content: str | np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        path.write_text(content)
    else:
        Image.fromarray(content).save(path)


def pixels(value: int = 0) -> np.ndarray:
    return np.full((4, 4, 3), value, np.uint8)


def masks(folder: Path, count: int) -> Path:
    for i in range(count):
        write(folder / "images" / f"{i}.png", pixels(i))
        write(folder / "masks" / f"{i}.png", np.eye(4, dtype=np.uint8))
    return folder


def pts(folder: Path, names: str) -> Path:
    for name in names:
        write(folder / f"{name}.png", pixels())
        write(folder / f"{name}.pts", "n_points: 2\n{\n1 1\n3 2\n}\n")
    return folder


def test_a_folder_without_parts_given_twice(tmp_path: Path) -> None:
    folder = masks(tmp_path / "faces", 3)
    assert in_both("parsing", folder, folder) == 3
    assert in_both("parsing", folder, shutil.copytree(folder, tmp_path / "copy")) == 3
    # A copy of a part of it is another set: that the files are the same is not looked for.
    (folder / "images" / "2.png").unlink()
    assert in_both("parsing", folder, tmp_path / "copy") == 0
    points = pts(tmp_path / "points", "ab")
    assert in_both("alignment", points, points) == 2


def test_patterns_that_overlap(tmp_path: Path) -> None:
    folder = pts(tmp_path / "points", "abcd")
    (tmp_path / "link").symlink_to(folder)
    assert in_both("alignment", f"{folder}/*.pts", f"{folder}/[cd]*.pts") == 2
    assert in_both("alignment", f"{folder}/[abc]*.pts", f"{tmp_path}/link/../link/[cd]*.pts") == 1
    assert in_both("alignment", f"{folder}/[ab]*.pts", f"{folder}/[cd]*.pts") == 0


def test_shards(tmp_path: Path) -> None:
    for name, keys in (("train-0", "ab"), ("train-1", "c"), ("val-0", "ad")):
        with ShardWriter(tmp_path / f"{name}-%03d.tar") as writer:
            for key in keys:
                writer.write(key, {"png": b"\x89PNG", "landmarks.json": "[[1, 2]]", "json": '{"hat": 1}', "txt": "x"})
    for task in ("alignment", "attributes"):
        assert in_both(task, tmp_path, tmp_path) == 0  # both parts have a sample called "a"
        assert in_both(task, tmp_path / "train-*.tar", tmp_path / "*.tar") == 3
        assert in_both(task, tmp_path / "train-*.tar", tmp_path / "train-1-*.tar") == 1


def test_lapa(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("test", 2)):
        masks(tmp_path / split, count)
        (tmp_path / split / "masks").rename(tmp_path / split / "labels")
        for i in range(count):
            write(tmp_path / split / "landmarks" / f"{i}.txt", "1 2 3 2 2 3 1 4 3 4")
    # The two parts have images of the same names and sizes.
    assert in_both("parsing", tmp_path, tmp_path) == 0
    assert in_both("parsing", tmp_path, tmp_path / "train") == 3
    assert in_both("parsing", tmp_path / "test", tmp_path) == 2


def test_two_faces_of_one_photograph_are_two_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HRNet's lists of AFLW-19, whose parts share photographs; and one list for both parts, as in its .mat file."""
    write(tmp_path / "images" / "0.png", pixels())
    for split, x in (("train", 0), ("test", 2)):
        row = ",".join(["0.png", "1", "4", "2", "2", *(f"{x + i % 2}" for i in range(2 * 19))])
        write(tmp_path / f"face_landmarks_aflw_{split}.csv", f"head\n{row}\n")
    assert in_both("alignment", tmp_path, tmp_path) == 0
    shutil.copy(tmp_path / "face_landmarks_aflw_train.csv", tmp_path / "face_landmarks_aflw_test.csv")
    assert in_both("alignment", tmp_path, tmp_path) == 1

    points = np.zeros((19, 2), np.float32)

    def read_mat(file: Path, split: str) -> list[alignment_data.Face]:
        return [alignment_data.Face(Path("0.png"), points + "train test".index(split))]

    write(tmp_path / alignment_data.AFLW_MAT, "")
    monkeypatch.setattr(alignment_data, "_read_aflw_mat", read_mat)
    assert in_both("alignment", tmp_path, tmp_path) == 0


def test_tables_of_attributes(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(30)]
    for name in names:
        write(tmp_path / name, pixels())
    rows = [f"{name},{i % 2}" for i, name in enumerate(names)]
    write(tmp_path / "attributes.csv", "\n".join(["image,hat", *rows]))
    write(tmp_path / "few.csv", "\n".join(["image,hat", *rows[:4]]))
    # The folder is split by a hash; a table that is named itself is taken whole.
    assert in_both("attributes", tmp_path, tmp_path) == 0
    test = len(open_attribute_set(str(tmp_path), split="test"))
    assert in_both("attributes", tmp_path / "attributes.csv", tmp_path) == test > 0
    assert in_both("attributes", tmp_path / "attributes.csv", tmp_path / "few.csv") == 4
    assert in_both("attributes", tmp_path / "few.csv", tmp_path / "few.csv") == 4
