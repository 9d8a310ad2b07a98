"""The command: shards that webdataset and our index read, the same bytes each time, one-line errors."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from farl.faces import draw, sample_sheet, write_faces
from farl.faces.__main__ import main
from farl.faces.shards import VALIDATION_START, FaceSet
from farl_engine.data import ShardIndex

SET = FaceSet(train=14, val=5, size=48, seed=2, samples_per_shard=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("faces")
    assert write_faces(out, SET, workers=0)
    return out


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()}


def test_files(folder: Path) -> None:
    names = [path.name for path in sorted(folder.iterdir())]
    assert names == [
        *("attributes-train.csv", "attributes-val.csv", "attributes.csv", "faces.json"),
        *("train-000000.tar", "train-000001.tar", "train-000002.tar", "val-000000.tar"),
    ]


def test_webdataset_reads_the_shards(folder: Path) -> None:
    tars = sorted(map(str, folder.glob("train-*.tar")))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False))
    assert len(samples) == 14
    face = draw(9, seed=2, size=48)
    sample = samples[9]
    assert sample["__key__"] == "000000009" and sample["txt"].decode() == face.caption
    assert sample["jpg"] == face.jpeg()
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample["mask.png"]))), face.mask)
    np.testing.assert_allclose(json.loads(sample["landmarks.json"]), face.landmarks, atol=0.01)
    assert json.loads(sample["json"]) == face.attributes


def test_our_index_reads_the_shards(folder: Path) -> None:
    index = ShardIndex.build(str(folder / "train-*.tar"))
    assert len(index) == 14 and not sum(index.problems.values())
    image, caption = index.read(3)
    face = draw(3, seed=2, size=48)
    assert image == face.jpeg() and caption == face.caption.encode()


def test_attribute_tables(folder: Path) -> None:
    with (folder / "attributes-val.csv").open() as file:
        rows = list(csv.DictReader(file))
    face = draw(VALIDATION_START + 4, seed=2, size=48)
    assert len(rows) == 5 and rows[4].pop("key") == f"{VALIDATION_START + 4:09d}"
    assert {name: value == "1" for name, value in rows[4].items()} == face.attributes
    train, val, both = ((folder / f"attributes{n}.csv").read_text().splitlines() for n in ("-train", "-val", ""))
    assert both == train + val[1:]


def test_same_bytes_from_several_processes(folder: Path, tmp_path: Path) -> None:
    before = digests(folder)
    seen: list[int] = []
    assert write_faces(tmp_path, SET, workers=2, progress=seen.append)
    after = digests(tmp_path)
    assert {name: after[name] for name in after} == {name: before[name] for name in after}
    assert sum(seen) == 19


def test_held_out_faces_do_not_depend_on_the_training_set(folder: Path, tmp_path: Path) -> None:
    write_faces(tmp_path, FaceSet(train=1, val=5, size=48, seed=2, samples_per_shard=6), workers=0)
    assert digests(tmp_path)["val-000000.tar"] == digests(folder)["val-000000.tar"]


def test_a_whole_set_is_left_and_another_is_refused(folder: Path, tmp_path: Path) -> None:
    small = FaceSet(train=2, val=0, size=32)
    assert write_faces(tmp_path, small, workers=0)
    stamp = (tmp_path / "train-000000.tar").stat().st_mtime_ns
    assert not write_faces(tmp_path, small, workers=0)
    assert (tmp_path / "train-000000.tar").stat().st_mtime_ns == stamp
    other = FaceSet(train=1, val=0, size=32)
    with pytest.raises(ValueError, match="--overwrite"):
        write_faces(tmp_path, other, workers=0)
    assert write_faces(tmp_path, other, workers=0, overwrite=True)
    (tmp_path / "faces.json").unlink()
    assert write_faces(tmp_path, small, workers=0), "what an interrupted run left is drawn again"


def test_foreign_shards_are_never_removed(tmp_path: Path) -> None:
    (tmp_path / "train-000000.tar").write_bytes(b"photo-0001.jpg" + bytes(600))
    with pytest.raises(ValueError, match="something else"):
        write_faces(tmp_path, FaceSet(train=1, val=0, size=32), workers=0)
    assert (tmp_path / "train-000000.tar").exists()


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "farl.faces", *words], capture_output=True, text=True)


def test_command(tmp_path: Path) -> None:
    out = tmp_path / "new" / "faces"
    assert main(["--out", str(out), "--train", "3", "--val", "1", "--size", "32", "--workers", "0"]) == 0
    assert Image.open(out / "sheet.png").width > 500
    assert len(ShardIndex.build(str(out / "train-*.tar"))) == 3


def test_help_and_errors_are_short(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for words, problem in (
        (["--out", str(tmp_path), "--train", "-3"], "train must be 0 to"),
        (["--out", str(tmp_path), "--size", "7"], "size must be 32 to 1024"),
        (["--out", str(tmp_path / "file"), "--train", "1", "--val", "0"], "file"),
        (["--size", "64"], "missing --out"),
    ):
        done = run(*words)
        assert done.returncode in (1, 2) and problem in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_sheet(tmp_path: Path) -> None:
    picture = sample_sheet(tmp_path / "sheet.png", 1, 2, size=64)
    assert Image.open(tmp_path / "sheet.png").size == picture.size
    bare = sample_sheet(None, 1, 2, size=64, labels=False, captions=False)
    assert picture.width == bare.width and picture.height > 2 * bare.height - 64
    with pytest.raises(ValueError, match="at least 1"):
        sample_sheet(None, 0, 2)
