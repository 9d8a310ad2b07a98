"""Tiny sets in each benchmark's own layout."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from farl.downstream.face_points import five_points, read_points
from farl.downstream.parsing_data import CELEBAMASK_PARTS, open_parsing_set
from farl.faces.face import CLASSES, draw
from farl.faces.shards import FaceSet, write_faces
from farl_engine.data.shards import ShardWriter

RNG = np.random.default_rng(0)


def save(path: Path, pixels: np.ndarray, palette: list[int] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if palette:
        image.putpalette(palette)
    image.save(path)
    return path


def photo(height: int, width: int) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def labels(height: int, width: int, classes: int) -> np.ndarray:
    found = RNG.integers(0, classes, (height, width), dtype=np.uint8)
    found[0, 0] = classes - 1
    return found


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def lapa(tmp_path: Path) -> Path:
    root = tmp_path / "LaPa"
    for split, count in (("train", 3), ("val", 1), ("test", 2)):
        for i in range(count):
            save(root / split / "images" / f"{split}{i}_0.jpg", photo(30 + i, 40))
            save(root / split / "labels" / f"{split}{i}_0.png", labels(30 + i, 40, 11))
            points = [f"{k}.5 {k + 100}.25" for k in range(106)]
            file = root / split / "landmarks" / f"{split}{i}_0.txt"
            file.parent.mkdir(exist_ok=True)
            file.write_text("106\n" + "\n".join(points) + "\n")
    return root


def test_lapa(lapa: Path) -> None:
    train, test = (open_parsing_set(str(lapa), split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (3, 2)
    about = train.about()
    assert about["layout"] == "lapa" and about["classes"] == list(CLASSES) and about["crop_from"] == "points"
    sample = train[1]
    assert sample["image"].shape == (31, 40, 3) and sample["image"].dtype == np.uint8
    assert np.array_equal(sample["mask"], np.asarray(Image.open(lapa / "train" / "labels" / "train1_0.png")))
    assert sample["points"].tolist() == [[k + 0.5, k + 100.25] for k in (104, 105, 54, 84, 90)]
    assert sample["name"].endswith("train1_0.jpg")
    assert len(open_parsing_set(str(lapa / "val"), split="test")) == 1
    assert train.about()["fingerprint"] != test.about()["fingerprint"]
    with pytest.raises(IndexError):
        train[3]


def test_lapa_with_faults(lapa: Path) -> None:
    folder = lapa / "train"
    save(folder / "labels" / "train0_0.png", labels(15, 20, 11))
    with pytest.raises(ValueError, match=r"train0_0.jpg: the image is 40 x 30 pixels .* but its mask 20 x 15"):
        open_parsing_set(str(lapa), split="train")[0]
    save(folder / "labels" / "train0_0.png", np.full((30, 40), 11, np.uint8))
    with pytest.raises(ValueError, match="the mask holds 11, but the 11 classes are 0 to 10"):
        open_parsing_set(str(lapa), split="train")[0]
    (folder / "landmarks" / "train1_0.txt").write_text("106\n1 2\n")
    with pytest.raises(ValueError, match="announces 106 points and has 1"):
        open_parsing_set(str(lapa), split="train")[1]
    (folder / "landmarks" / "train1_0.txt").write_text("1 2\n3 4\n")
    with pytest.raises(ValueError, match=r"train1_0.txt: landmarks of shape \[2, 2\]"):
        open_parsing_set(str(lapa), split="train")[1]
    (folder / "images" / "train2_0.jpg").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"train2_0.jpg cannot be decoded"):
        open_parsing_set(str(lapa), split="train")[2]
    (folder / "labels" / "train2_0.png").unlink()
    with pytest.raises(ValueError, match=r"labels/train2_0.png missing"):
        open_parsing_set(str(lapa), split="train")


@pytest.fixture
def celebamask(tmp_path: Path) -> Path:
    """Images 3, 7 and 2001 of a size twice their masks'; CelebA's own names in another order."""
    root = tmp_path / "CelebAMask-HQ"
    for number in (3, 7, 2001):
        save(root / "CelebA-HQ-img" / f"{number}.jpg", photo(64, 64))
        parts = root / "CelebAMask-HQ-mask-anno" / str(number // 2000)
        skin, hair = np.zeros((2, 32, 32, 3), np.uint8)
        skin[8:28, 8:24], hair[2:12, 6:26] = 255, 255
        save(parts / f"{number:05d}_skin.png", skin)
        save(parts / f"{number:05d}_hair.png", hair)
    nose = np.zeros((32, 32), np.uint8)
    nose[16:20, 14:18] = 255
    save(root / "CelebAMask-HQ-mask-anno" / "0" / "00003_nose.png", nose)
    mapping = ["idx          orig_idx orig_file", "3 11 000012.jpg", "7 12 000013.jpg", "2001 5 000006.jpg"]
    (root / "CelebA-HQ-to-CelebA-mapping.txt").write_text("\n".join(mapping) + "\n")
    split = ["000006.jpg 0", "000012.jpg 0", "000013.jpg 2", "000099.jpg 2"]
    (root / "list_eval_partition.txt").write_text("\n".join(split) + "\n")
    return root


def test_celebamask(celebamask: Path) -> None:
    train, test = (open_parsing_set(str(celebamask), split=split) for split in ("train", "test"))
    assert [Path(train[i]["name"]).stem for i in range(len(train))] == ["3", "2001"]
    assert [Path(test[i]["name"]).stem for i in range(len(test))] == ["7"]
    assert train.about()["layout"] == "celebamask-hq" and len(train.about()["classes"]) == 19
    number = {name: i for i, name in enumerate(train.about()["classes"])}
    mask = train[0]["mask"]
    assert mask.shape == (32, 32)
    assert mask[18, 15] == number["nose"] == 10
    assert mask[25, 10] == number["skin"] == 2
    assert mask[10, 10] == number["hair"] == 14  # hair lies on skin
    assert mask[0, 0] == 0
    assert sorted(np.unique(mask)) == [0, 2, 10, 14]


@pytest.mark.parametrize("change", ["another", "longer", "lost"])
def test_celebamask_masks_belong_to_the_fingerprint(celebamask: Path, change: str) -> None:
    before = [open_parsing_set(str(celebamask), split=split).about()["fingerprint"] for split in ("train", "test")]
    folder = celebamask / "CelebAMask-HQ-mask-anno" / "0"
    if change == "another":
        save(folder / "00003_hat.png", np.zeros((32, 32), np.uint8))
    elif change == "longer":
        with (folder / "00003_skin.png").open("ab") as file:
            file.write(b"x")
    else:
        (folder / "00003_nose.png").unlink()
    after = [open_parsing_set(str(celebamask), split=split).about()["fingerprint"] for split in ("train", "test")]
    # Image 3 is in train.
    assert before[0] != after[0] and before[1] == after[1]


def test_celebamask_other_files_among_the_parts_do_not_matter(celebamask: Path) -> None:
    train = open_parsing_set(str(celebamask), split="train")
    folder = celebamask / "CelebAMask-HQ-mask-anno" / "0"
    for name in ("Thumbs.db", "00003_skin.png.tmp", "3_skin.png", "00003_soul.png", "01999_skin.png", "00007_hat.png"):
        (folder / name).write_bytes(b"no mask")
    again = open_parsing_set(str(celebamask), split="train")
    assert again.about() == train.about() and np.array_equal(again[0]["mask"], train[0]["mask"])


def test_celebamask_images_are_halved_without_a_shift(celebamask: Path) -> None:
    file = celebamask / "CelebA-HQ-img" / "3.jpg"
    Image.fromarray(np.kron(photo(32, 32), np.ones((2, 2, 1), np.uint8))).save(file, quality=100, subsampling=0)
    full = np.asarray(Image.open(file)).astype(float)
    half = open_parsing_set(str(celebamask), split="train")[0]["image"]
    wanted = full.reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(half - wanted).max() <= 0.5
    save(celebamask / "CelebA-HQ-img" / "2001.jpg", photo(40, 40))
    with pytest.raises(ValueError, match=r"2001.jpg is \(40, 40\) pixels, no multiple"):
        open_parsing_set(str(celebamask), split="train")[1]


def test_parts_lie_on_each_other_in_the_protocols_order(celebamask: Path) -> None:
    folder = celebamask / "CelebAMask-HQ-mask-anno" / "0"
    for name in CELEBAMASK_PARTS:
        save(folder / f"00003_{name}.png", np.full((32, 32), 255, np.uint8))
    for name in reversed(CELEBAMASK_PARTS):
        found = open_parsing_set(str(celebamask), split="train")[0]["mask"]
        assert np.unique(found).tolist() == [CELEBAMASK_PARTS.index(name) + 1]
        (folder / f"00003_{name}.png").unlink()
    with pytest.raises(ValueError, match="no part of it"):
        open_parsing_set(str(celebamask), split="train")[0]


def test_celebamask_without_its_lists(celebamask: Path) -> None:
    (celebamask / "list_eval_partition.txt").unlink()
    with pytest.raises(ValueError, match=r"without list_eval_partition.txt"):
        open_parsing_set(str(celebamask), split="train")


def folder_of(tmp_path: Path, mask: Callable[[int], np.ndarray], palette: list[int] | None = None) -> Path:
    for i in range(3):
        save(tmp_path / "images" / f"{i}.jpg", photo(20, 24))
        save(tmp_path / "masks" / f"{i}.png", mask(i), palette)
    return tmp_path


def test_a_folder_with_palette_masks_gives_indices(tmp_path: Path) -> None:
    indices = [labels(20, 24, 4) for _ in range(3)]
    root = folder_of(tmp_path, lambda i: indices[i], [255, 0, 0, 255, 255, 0, 0, 255, 255, 0, 0, 255])
    assert Image.open(root / "masks" / "0.png").mode == "P"
    data = open_parsing_set(str(root), split="train")
    assert np.array_equal(data[2]["mask"], indices[2])
    assert data.about()["classes"] == ["background", "class_1", "class_2", "class_3"]
    assert data.about()["crop_from"] == "whole" and "points" not in data[0]


def test_a_folder_with_names_of_classes_points_or_boxes(tmp_path: Path) -> None:
    root = folder_of(tmp_path, lambda i: labels(20, 24, 2))
    (root / "classes.txt").write_text("nothing\nface\nhair\n")
    (root / "boxes").mkdir()
    for i in range(3):
        (root / "boxes" / f"{i}.txt").write_text("2 3 20 18.5\n")
    data = open_parsing_set(str(root), split="test")
    assert data.about()["classes"] == ["nothing", "face", "hair"] and data.about()["crop_from"] == "box"
    assert data[0]["box"].tolist() == [2, 3, 20, 18.5]
    (root / "boxes" / "1.txt").write_text("20 3 2 18\n")
    with pytest.raises(ValueError, match=r"1.txt is not a box"):
        data[1]
    (root / "points").mkdir()
    with pytest.raises(ValueError, match=r"points/0.txt and 2 more missing"):
        open_parsing_set(str(root), split="test")
    for i in range(3):
        (root / "points" / f"{i}.txt").write_text("\n".join(f"{k} {k * k}" for k in range(5)))
    assert open_parsing_set(str(root), split="test")[0]["points"].tolist() == [[k, k * k] for k in range(5)]


def test_a_test_folder_may_lack_classes_but_a_training_folder_tells_them(tmp_path: Path) -> None:
    root = folder_of(tmp_path, lambda i: labels(20, 24, 3))
    assert len(open_parsing_set(str(root), split="train").about()["classes"]) == 3
    assert "classes" not in open_parsing_set(str(root), split="test").about()


def test_masks_that_cannot_be_meant(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "binary", lambda i: np.where(labels(20, 24, 2) > 0, 255, 0).astype(np.uint8))
    with pytest.raises(ValueError, match="nothing but 0"):
        open_parsing_set(str(root), split="train")
    root = folder_of(tmp_path / "colour", lambda i: photo(20, 24))
    with pytest.raises(ValueError, match=r"mask in colours \(RGB\): save class numbers"):
        open_parsing_set(str(root), split="train")
    root = folder_of(tmp_path / "high", lambda i: np.full((20, 24), 300, np.uint16))
    with pytest.raises(ValueError, match="holds the value 300"):
        open_parsing_set(str(root), split="train")
    root = folder_of(tmp_path / "twice", lambda i: labels(20, 24, 2))
    save(root / "images" / "0.png", photo(20, 24))
    with pytest.raises(ValueError, match=r"holds 0.jpg and 0.png"):
        open_parsing_set(str(root), split="train")


def test_images_stand_upright_as_exif_says(tmp_path: Path) -> None:
    pixels = photo(16, 24)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees to the right
    (tmp_path / "images").mkdir()
    Image.fromarray(pixels).save(tmp_path / "images" / "a.png", exif=exif)
    save(tmp_path / "masks" / "a.png", labels(24, 16, 2))
    sample = open_parsing_set(str(tmp_path), split="train")[0]
    assert np.array_equal(sample["image"], np.rot90(pixels, -1))
    save(tmp_path / "masks" / "a.png", labels(16, 24, 2))
    with pytest.raises(ValueError, match="16 x 24 pixels"):
        open_parsing_set(str(tmp_path), split="train")[0]


def test_drawn_faces(tmp_path: Path) -> None:
    write_faces(tmp_path, FaceSet(train=5, val=2, size=48, samples_per_shard=3), workers=0)
    train = open_parsing_set(str(tmp_path / "train-*.tar"), split="train")
    about = train.about()
    assert len(train) == 5 and about["layout"] == "faces" and about["image_size"] == 48
    assert about["classes"] == list(CLASSES) and about["crop_from"] == "points"
    face = draw(4, size=48)
    sample = train[4]
    assert np.array_equal(sample["mask"], face.mask)
    assert np.abs(sample["image"].astype(int) - face.image).mean() < 12  # a JPEG
    assert np.abs(sample["points"] - five_points(face.landmarks)).max() < 0.01
    assert "000000004" in sample["name"]
    with ThreadPoolExecutor(4) as pool:
        masks = list(pool.map(lambda i: train[i]["mask"], [i % 5 for i in range(40)]))
    assert all(np.array_equal(mask, masks[i % 5]) for i, mask in enumerate(masks))
    assert [len(open_parsing_set(str(tmp_path), split=split)) for split in ("train", "test")] == [5, 2]


def test_shards_of_others(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "%03d.tar") as writer:
        writer.write("a", {"png": png(photo(10, 12)), "mask.png": png(labels(10, 12, 3)), "txt": "x"})
        writer.write("b", {"png": png(photo(10, 12)), "txt": "no mask"})
        writer.write("c", {"png": png(photo(10, 12)), "mask.png": png(labels(9, 12, 3)), "txt": "x"})
    data = open_parsing_set(str(tmp_path), split="train")
    assert len(data) == 2 and data.about()["layout"] == "shards" and len(data.about()["classes"]) == 3
    assert data[0]["mask"].shape == (10, 12) and "points" not in data[0]
    with pytest.raises(ValueError, match=r"000.tar: c: the image is 12 x 10"):
        data[1]
    with ShardWriter(tmp_path / "plain" / "%03d.tar") as writer:
        writer.write("a", {"png": png(photo(10, 12)), "txt": "x"})
    with pytest.raises(ValueError, match=r"no sample of these shards has a mask.png"):
        open_parsing_set(str(tmp_path / "plain"), split="train")
    (tmp_path / "plain" / "001.tar").write_bytes(b"x" * 2000)
    with pytest.raises(ValueError, match=r"001.tar"):
        open_parsing_set(str(tmp_path / "plain"), split="train")


def test_what_is_no_set(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no set for parsing. Looked for"):
        open_parsing_set(str(tmp_path), split="train")
    with pytest.raises(ValueError, match="no shard matches"):
        open_parsing_set(str(tmp_path / "nowhere"), split="train")


def test_five_points_of_68_are_the_middles_of_the_eyes() -> None:
    points = np.arange(136, dtype=np.float64).reshape(68, 2)
    assert five_points(points)[:, 0].tolist() == [77, 89, 60, 96, 108]
    with pytest.raises(ValueError, match="someone: a landmark is not a finite number"):
        five_points(np.full((5, 2), np.nan), "someone")


def test_points_of_a_file_that_is_something_else(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("version: 1\n")
    with pytest.raises(ValueError, match="is not a list of points"):
        read_points(tmp_path / "x.txt")


@pytest.mark.skipif(not os.environ.get("FARL_DATA"), reason="FARL_DATA does not name the photographs")
def test_real_photographs() -> None:
    data = open_parsing_set(str(Path(os.environ["FARL_DATA"]) / "parsing"), split="train")
    assert len(data) > 100 and len(data.about()["classes"]) == 6
    sample = data[0]
    assert sample["image"].shape[:2] == sample["mask"].shape and set(np.unique(sample["mask"])) <= set(range(6))


def test_landmarks_that_are_no_list(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "%03d.tar") as writer:
        members = {"png": png(photo(10, 12)), "mask.png": png(labels(10, 12, 3)), "landmarks.json": "nonsense"}
        writer.write("a", members | {"txt": "x"})
        writer.write("b", members | {"txt": "x", "landmarks.json": json.dumps([[1, 2]] * 7)})
    data = open_parsing_set(str(tmp_path), split="train")
    with pytest.raises(ValueError, match=r"a.landmarks.json is not a list"):
        data[0]
    with pytest.raises(ValueError, match=r"b: landmarks of shape \[7, 2\]"):
        data[1]
    before = data.about()["fingerprint"]
    with ShardWriter(tmp_path / "%03d.tar") as writer:
        writer.write("a", members | {"txt": "x"})
        writer.write("b", members | {"txt": "x", "landmarks.json": json.dumps([[1, 20]] * 7)})
    assert open_parsing_set(str(tmp_path), split="train").about()["fingerprint"] != before
