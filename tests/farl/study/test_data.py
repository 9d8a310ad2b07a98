from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from farl.downstream import alignment, attributes, parsing
from farl.downstream.shard_members import ShardMembers
from farl.study.data import check_photographs, make_data, split_landmarks
from farl.study.plans import PHOTOGRAPHS

PEOPLE = 40


def _image(path: Path, side: int = 16) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side, 3), len(path.name), np.uint8)).save(path)


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """The layout of the real photographs: two pictures of each of 40 people, 30 with landmarks, 13 with masks."""
    root = tmp_path / "photographs"
    names = [f"images/{number:05d}.jpg" for number in range(2 * PEOPLE)]
    for name in names:
        _image(root / "faces" / name)
    pairs = ["image\tcaption", *(f"{name}\ta face" for name in names)]
    (root / "faces" / "pairs.tsv").write_text("\n".join(pairs) + "\n")
    rows = ["image,person,Bald,Young", *(f"{name},p{i // 2},{i % 2},{i % 3 % 2}" for i, name in enumerate(names))]
    (root / "faces" / "attributes.csv").write_text("\n".join(rows) + "\n")
    for number in range(15):
        for face in (1, 2):
            stem = root / "landmarks" / f"{1000 + number}_{face}"
            _image(stem.with_suffix(".jpg"))
            points = "\n".join(f"{x} {x}" for x in range(1, 6))
            stem.with_suffix(".pts").write_text(f"version: 1\nn_points: 5\n{{\n{points}\n}}\n")
    stems = [f"multipose01_train_0_personne0{person}146p0p0" for person in range(1, 8)]
    stems += [f"frontal02_train_{number}" for number in (1, 2, 15, 16, 17, 20)]
    for stem in stems:
        _image(root / "parsing" / "images" / f"{stem}.jpg")
        path = root / "parsing" / "masks" / f"{stem}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((16, 16), 5, np.uint8)).save(path)
    return root


def test_nobody_is_on_both_sides(photographs: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    make_data(PHOTOGRAPHS, data, photographs, workers=0)
    make_data(PHOTOGRAPHS, data, photographs, workers=0)  # again: nothing is done twice, nothing is refused

    seen = {key.rsplit("/", 1)[-1] for key in ShardMembers(str(data / "pretrain" / "train-*.tar")).keys}
    sets = {split: attributes.open_set(str(data / "attributes"), split=split) for split in ("train", "test")}
    named = {split: {Path(each[i]["name"]).stem for i in range(len(each))} for split, each in sets.items()}
    assert named["train"] == seen
    assert len(named["test"]) == 2 * PEOPLE - len(seen) > 0
    assert not {int(name) // 2 for name in named["train"]} & {int(name) // 2 for name in named["test"]}

    faces = {split: alignment.open_set(str(data / "alignment" / split), split=split) for split in ("train", "test")}
    photos = {s: {Path(each[i]["name"]).stem.split("_")[0] for i in range(len(each))} for s, each in faces.items()}
    assert len(photos["train"]) + len(photos["test"]) == 15
    assert not photos["train"] & photos["test"]

    masks = {split: parsing.open_set(str(data / "parsing" / split), split=split) for split in ("train", "test")}
    stems = {s: {Path(each[i]["name"]).stem for i in range(len(each))} for s, each in masks.items()}
    assert {stem for stem in stems["test"] if "personne" in stem} == {
        f"multipose01_train_0_personne0{person}146p0p0" for person in (6, 7)
    }
    assert {stem for stem in stems["test"] if "frontal" in stem} == {f"frontal02_train_{n}" for n in (16, 17, 20)}
    assert len(stems["train"]) == 8
    assert masks["train"].about()["classes"][5] == "hair"


def test_photographs_must_be_there_and_whole(photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs real photographs: name their folder with --photographs"):
        make_data(PHOTOGRAPHS, tmp_path / "data", None, workers=0)
    (photographs / "faces" / "pairs.tsv").unlink()
    with pytest.raises(ValueError, match=r"has no faces/pairs\.tsv"):
        check_photographs(photographs)


def test_a_split_without_a_test_part_is_refused(photographs: Path, tmp_path: Path) -> None:
    for path in (photographs / "landmarks").iterdir():
        if not path.name.startswith("1000_"):
            path.unlink()
    with pytest.raises(ValueError, match="no file falls into the"):
        split_landmarks(photographs / "landmarks", tmp_path / "out")
