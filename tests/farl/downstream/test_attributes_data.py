"""Tiny sets in each benchmark's own layout."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from farl.downstream import attributes_data
from farl.downstream.attributes_data import open_attribute_set
from farl.downstream.face_points import five_points
from farl.faces.face import draw
from farl.faces.shards import FaceSet, write_faces
from farl_engine.data.shards import ShardWriter

RNG = np.random.default_rng(0)
FIVE = [[69, 111], [108, 110], [88, 131], [73, 152], [105, 151]]


def save(path: Path, height: int = 22, width: int = 18) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def celeba(root: Path, *, nested: bool = False, landmarks: bool = True, kaggle: bool = False) -> Path:
    """Six images: three to train, one to validate, two to test."""
    anno, split = (root / "Anno", root / "Eval") if nested else (root, root)
    names = [f"{i:06d}.jpg" for i in range(1, 7)]
    for name in names:
        save((root / "Img" if nested else root) / "img_align_celeba" / name)
    parts = [0, 0, 0, 1, 2, 2]
    values = [[1 if (i >> bit) & 1 else -1 for bit in range(3)] for i in range(6)]
    heads = ["5_o_Clock_Shadow", "Arched_Eyebrows", "Young"]
    if kaggle:
        rows = [f"{name},{','.join(map(str, row))}" for name, row in zip(names, values, strict=True)]
        write(anno / "list_attr_celeba.csv", "\n".join([",".join(["image_id", *heads]), *rows]))
        lines = [f"{name},{part}" for name, part in zip(names, parts, strict=True)]
        write(split / "list_eval_partition.csv", "\n".join(["image_id,partition", *lines]))
        return root
    rows = [f"{name} {' '.join(f'{v:2d}' for v in row)}" for name, row in zip(names, values, strict=True)]
    write(anno / "list_attr_celeba.txt", "\n".join(["6", " ".join(heads) + " ", *rows, ""]))
    lines = [f"{name} {part}" for name, part in zip(names, parts, strict=True)]
    write(split / "list_eval_partition.txt", "\n".join(lines) + "\n")
    if landmarks:
        places = ("lefteye", "righteye", "nose", "leftmouth", "rightmouth")
        heads = [f"{place}_{axis}" for place in places for axis in "xy"]
        rows = [f"{name} {' '.join(str(v + i) for point in FIVE for v in point)}" for i, name in enumerate(names)]
        write(anno / "list_landmarks_align_celeba.txt", "\n".join(["6", " ".join(heads), *rows]))
    return root


@pytest.mark.parametrize("nested", [False, True])
def test_celeba(tmp_path: Path, nested: bool) -> None:
    root = celeba(tmp_path / "CelebA", nested=nested)
    train, test = (open_attribute_set(str(root), split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (3, 2)
    about = train.about()
    assert about["layout"] == "celeba" and about["crop_from"] == "whole"
    assert about["attributes"] == ["5_o_Clock_Shadow", "Arched_Eyebrows", "Young"] == test.about()["attributes"]
    assert about["fingerprint"] != test.about()["fingerprint"]
    assert [train[i]["attributes"].tolist() for i in range(3)] == [[0, 0, 0], [1, 0, 0], [0, 1, 0]]
    sample = test[1]
    assert sample["attributes"].tolist() == [1, 0, 1] and sample["name"].endswith("000006.jpg")
    assert sample["image"].shape == (22, 18, 3) and sample["attributes"].dtype == np.float32
    assert "points" not in sample
    # The mean of the second training image's landmarks, in a square of 22 with 2 columns beside the 18 of the image.
    np.testing.assert_allclose(about["frame"], (np.array(FIVE) + 1 + np.array([2.5, 0.5])) / 22, atol=1e-6)


def test_celeba_without_landmarks_and_as_kaggle_has_it(tmp_path: Path) -> None:
    plain = open_attribute_set(str(celeba(tmp_path / "a", landmarks=False)), split="test")
    assert "frame" not in plain.about()
    other = celeba(tmp_path / "b", kaggle=True)
    # It unpacks into a folder of the same name.
    (other / "img_align_celeba").rename(other / "inner")
    (other / "img_align_celeba").mkdir()
    (other / "inner").rename(other / "img_align_celeba" / "img_align_celeba")
    kaggle = open_attribute_set(str(other), split="test")
    assert kaggle.about()["attributes"] == plain.about()["attributes"]
    assert [kaggle[i]["attributes"].tolist() for i in range(2)] == [plain[i]["attributes"].tolist() for i in range(2)]


def test_an_incomplete_celeba_is_refused(tmp_path: Path) -> None:
    root = celeba(tmp_path)
    labels = (root / "list_attr_celeba.txt").read_text()
    for changed, message in (
        (labels.replace("000002.jpg", "000009.jpg"), "no row for 000002.jpg"),
        (labels.replace("000001.jpg -1", "000001.jpg  2"), "000001.jpg has the value '2'"),
        (labels.replace("000003.jpg -1", "000003.jpg"), "000003.jpg has 2 values, wanted 3"),
    ):
        write(root / "list_attr_celeba.txt", changed)
        with pytest.raises(ValueError, match=message):
            open_attribute_set(str(root), split="train")
    write(root / "list_attr_celeba.txt", labels)
    (root / "img_align_celeba" / "000006.jpg").unlink()
    with pytest.raises(ValueError, match=r"000006.jpg is missing"):
        open_attribute_set(str(root), split="test")
    (root / "list_eval_partition.txt").unlink()
    with pytest.raises(ValueError, match=r"CelebA without list_eval_partition.txt"):
        open_attribute_set(str(root), split="train")


MAT: dict[str, dict[str, Any]] = {
    "lfw_att_40.mat": {
        "name": ["Ann_Lee\\Ann_Lee_0001.jpg", "Bo_Yu\\Bo_Yu_0001.jpg", "Bo_Yu\\Bo_Yu_0002.jpg"],
        "AttrName": ["5 o Clock Shadow", "Young"],
        "label": np.array([[0, 1], [1, 1], [1, 0]], np.float64),
    },
    "indices_train_test.mat": {"indices_img_train": np.array([[2.0], [3.0]]), "indices_img_test": np.array([[1.0]])},
}


def lfwa(root: Path) -> Path:
    for name in MAT["lfw_att_40.mat"]["name"]:
        save(root / "lfw" / name.replace("\\", "/"), 25, 25)
    for name in MAT:
        write(root / name, "")
    return root


def check_lfwa(root: Path) -> None:
    train, test = (open_attribute_set(str(root), split=split) for split in ("train", "test"))
    assert train.about()["attributes"] == ["5_o_Clock_Shadow", "Young"] and train.about()["layout"] == "lfwa"
    assert [train[i]["attributes"].tolist() for i in range(len(train))] == [[1, 1], [1, 0]]
    assert [test[i]["attributes"].tolist() for i in range(len(test))] == [[0, 1]]
    assert train[1]["name"].endswith("Bo_Yu/Bo_Yu_0002.jpg")


def test_lfwa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attributes_data, "_read_mat", lambda file: MAT[file.name])
    root = lfwa(tmp_path)
    check_lfwa(root)
    monkeypatch.setitem(MAT["indices_train_test.mat"], "indices_img_test", np.array([[4.0]]))
    with pytest.raises(ValueError, match="indices_img_test must be 1 to 3"):
        open_attribute_set(str(root), split="test")
    (root / "indices_train_test.mat").unlink()
    with pytest.raises(ValueError, match=r"LFWA without indices_train_test.mat"):
        open_attribute_set(str(root), split="test")


def test_lfwa_from_matlab_files(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    root = lfwa(tmp_path)
    for file, variables in MAT.items():
        with h5py.File(root / file, "w") as content:
            for name, value in variables.items():
                if isinstance(value, np.ndarray):
                    content[name] = value.T  # MATLAB's order of axes
                    continue
                cells = []
                for number, text in enumerate(value):
                    cell = content.create_dataset(
                        f"#refs#/{name}{number}", data=np.array([[ord(c)] for c in text], "u2")
                    )
                    cells.append(cell.ref)
                content.create_dataset(name, (1, len(cells)), dtype=h5py.ref_dtype)[0] = cells
    check_lfwa(root)
    write(root / "lfw_att_40.mat", "MATLAB 5.0 MAT-file")
    with pytest.raises(ValueError, match=r"no MATLAB 7.3 file"):
        open_attribute_set(str(root), split="train")


def test_lfwa_without_h5py_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ValueError, match="pip install h5py"):
        open_attribute_set(str(lfwa(tmp_path)), split="train")


def table(root: Path, rows: Sequence[Sequence[object]]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    with (root / "attributes.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return root


def test_a_table_with_persons_is_split_by_person(tmp_path: Path) -> None:
    rows: list[list[object]] = [["image", "person", "Smiling", "Left_Handed", "comment"]]
    for i in range(90):
        rows.append([f"images/{i}.jpg", i // 3, i % 2, "" if i % 4 else -1, "no label"])
    for row in rows[1:]:
        save(tmp_path / str(row[0]), 5, 5)
    table(tmp_path, rows)
    train, test = (open_attribute_set(str(tmp_path), split=split) for split in ("train", "test"))
    assert train.about()["attributes"] == ["Smiling", "Left_Handed"]
    people = [{int(Path(s[i]["name"]).stem) // 3 for i in range(len(s))} for s in (train, test)]
    assert not people[0] & people[1] and len(people[0]) + len(people[1]) == 30
    assert 2 <= len(people[1]) <= 12 and len(train) + len(test) == 90
    assert test.about()["split"] == "20% of the persons (column person) to test, by hash with seed 0"
    sample = next(train[i] for i in range(len(train)) if int(Path(train[i]["name"]).stem) % 4)
    assert np.isnan(sample["attributes"][1]) and sample["attributes"][0] in (0, 1)
    again = open_attribute_set(str(tmp_path), split="test")
    assert again.about() == test.about()
    # The file itself is taken whole.
    whole = open_attribute_set(str(tmp_path / "attributes.csv"), split="test")
    assert len(whole) == 90 and whole.about()["split"] == "all rows"


def test_the_fingerprint_tells_labels_apart(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg")
    save(tmp_path / "b.jpg")
    prints = []
    for rows in ([[0, 1], [1, 0]], [[1, 0], [1, 0]]):
        table(tmp_path, [["image", "x", "y"], ["a.jpg", *rows[0]], ["b.jpg", *rows[1]]])
        prints.append(open_attribute_set(str(tmp_path / "attributes.csv"), split="train").about()["fingerprint"])
    assert prints[0] != prints[1]


def test_a_table_with_a_split_column(tmp_path: Path) -> None:
    names = [save(tmp_path / "images" / f"{name}.png").stem for name in "abcd"]
    rows = [[name, part, i % 2] for i, (name, part) in enumerate(zip(names, ["train", "Test", "val", ""], strict=True))]
    table(tmp_path, [["image", "Split", "Bald"], *rows])
    train, test = (open_attribute_set(str(tmp_path), split=split) for split in ("train", "test"))
    assert [Path(train[0]["name"]).name, Path(test[0]["name"]).name] == ["a.png", "b.png"]
    assert len(train) == len(test) == 1 and train.about()["attributes"] == ["Bald"]
    table(tmp_path, [["image", "split", "Bald"], *[[name, i % 2, 1] for i, name in enumerate(names)]])
    with pytest.raises(ValueError, match="column split holds '0'; use train, test and val"):
        open_attribute_set(str(tmp_path), split="train")
    table(tmp_path, [["image", "split", "Bald"], *[[name, "train", 1] for name in names]])
    with pytest.raises(ValueError, match="no row for test"):
        open_attribute_set(str(tmp_path), split="test")


def test_a_table_with_landmarks(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg")
    points = RNG.uniform(0, 20, (68, 2)).astype(np.float32)
    write(tmp_path / "points" / "a.txt", "\n".join(f"{x} {y}" for x, y in points.tolist()))
    table(tmp_path, [["image", "x"], ["a.jpg", 1]])
    found = open_attribute_set(str(tmp_path / "attributes.csv"), split="train")
    assert found.about()["crop_from"] == "points"
    np.testing.assert_allclose(found[0]["points"], five_points(points), rtol=1e-6)
    (tmp_path / "points" / "a.txt").unlink()
    with pytest.raises(ValueError, match=r"points/a.txt is missing"):
        open_attribute_set(str(tmp_path / "attributes.csv"), split="train")


def test_tables_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg")
    table(tmp_path, [["image", "x"], ["a.jpg", 1], ["b.jpg", 0]])
    with pytest.raises(ValueError, match=r"b.jpg is missing"):
        open_attribute_set(str(tmp_path / "attributes.csv"), split="train")
    table(tmp_path, [["image", "x"], ["a.jpg", 1], ["a.jpg", 0]])
    with pytest.raises(ValueError, match=r"names a.jpg twice"):
        open_attribute_set(str(tmp_path / "attributes.csv"), split="train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"is no set for attributes. Looked for: img_align_celeba/"):
        open_attribute_set(str(tmp_path / "empty"), split="train")


def test_drawn_faces(tmp_path: Path) -> None:
    write_faces(tmp_path, FaceSet(train=3, val=2, size=48), workers=0)
    train, test = (open_attribute_set(str(tmp_path), split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (3, 2)
    about = train.about()
    assert about["layout"] == "faces" and about["image_size"] == 48 and about["crop_from"] == "whole"
    face = draw(1, size=48)
    assert about["attributes"] == list(face.attributes)
    assert train[1]["attributes"].tolist() == list(map(float, face.attributes.values()))
    assert np.abs(train[1]["points"] - five_points(face.landmarks)).max() < 0.01
    pattern = open_attribute_set(str(tmp_path / "val-*.tar"), split="train")
    assert pattern.about()["fingerprint"] == test.about()["fingerprint"]
    (tmp_path / "val-000000.tar").unlink()
    with pytest.raises(ValueError, match="has train shards but none for test"):
        open_attribute_set(str(tmp_path), split="test")


def test_shards_of_others(tmp_path: Path) -> None:
    image = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(image, "PNG")
    entries: list[dict[str, object]] = [
        {"Bald": True, "Young": -1, "width": 640, "url": "x", "always": None},
        {"Bald": None, "Young": 1, "width": 1, "url": "y"},
        {"Young": 0, "width": 0, "url": "z", "always": None},
    ]
    with ShardWriter(tmp_path / "a-%06d.tar", 10) as writer:
        for i, entry in enumerate(entries):
            writer.write(f"{i}", {"png": image.getvalue(), "json": json.dumps(entry).encode()})
        writer.write("bare", {"png": image.getvalue()})
    found = open_attribute_set(str(tmp_path), split="train")
    assert found.about()["attributes"] == ["Bald", "Young"] and len(found) == 3
    np.testing.assert_array_equal([found[i]["attributes"] for i in range(3)], [[1, 0], [np.nan, 1], [np.nan, 0]])


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg")
    table(tmp_path, [["image", "x"], ["a.jpg", 1]])
    found = open_attribute_set(str(tmp_path / "attributes.csv"), split="train")
    write(tmp_path / "a.jpg", "no image")
    with pytest.raises(ValueError, match=r"a.jpg cannot be decoded"):
        found[0]


@pytest.mark.skipif("FARL_DATA" not in os.environ, reason="FARL_DATA does not name a folder of photographs")
def test_photographs() -> None:
    root = Path(os.environ["FARL_DATA"]) / "faces"
    train, test = (open_attribute_set(str(root), split=split) for split in ("train", "test"))
    about = train.about()
    assert len(about["attributes"]) == 36 and "person" not in about["attributes"] and "Male" in about["attributes"]
    assert len(train) + len(test) == 6000 and 0.15 < len(test) / 6000 < 0.25
    sample = test[0]
    assert sample["image"].shape == (250, 250, 3) and set(sample["attributes"].tolist()) <= {0, 1}


def test_landmarks_belong_to_the_fingerprint(tmp_path: Path) -> None:
    root, five = tmp_path / "own", "1 2\n3 2\n2 3\n1 4\n3 4"
    save(root / "a.png")
    write(root / "attributes.csv", "image,hat,split\na.png,1,train\n")
    write(root / "points" / "a.txt", five)
    prints = [open_attribute_set(str(root), split="train").about()["fingerprint"]]
    write(root / "points" / "a.txt", five + ".5")
    prints.append(open_attribute_set(str(root), split="train").about()["fingerprint"])
    image = (root / "a.png").read_bytes()
    for places in ("[[1, 2]]", "[[1, 20]]"):
        with ShardWriter(tmp_path / "shards" / "%03d.tar") as writer:
            writer.write("a", {"png": image, "json": '{"hat": 1}', "landmarks.json": places, "txt": "x"})
        prints.append(open_attribute_set(str(tmp_path / "shards"), split="train").about()["fingerprint"])
    assert len(set(prints)) == 4
