"""LAION-Face's files are read as what they are, and nothing in a hostile one is run or believed."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from farl.data.laion import detections, downloads, ids, near, torch_files
from farl.data.laion.faces import shares

BOX = np.array([10, 20, 30, 60], np.float32)
POINTS = np.arange(10, dtype=np.float32).reshape(5, 2)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


class Crafted:
    """Pickles as a call of numpy's own functions with arguments of our choice."""

    def __init__(self, function: Any, arguments: tuple[Any, ...], state: Any = None) -> None:
        self.function, self.arguments, self.state = function, arguments, state

    def __reduce__(self) -> Any:
        return self.function, self.arguments, self.state


def save(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


class TestSafeLoading:
    def test_what_numpy_and_torch_store_comes_back(self, tmp_path):
        kinds = [BOX, BOX.astype(np.float64), BOX.astype(np.int64), torch.from_numpy(BOX), BOX.tolist(), list(BOX)]
        for value in kinds:
            loaded = torch_files.load(save(tmp_path / "a.pth", {7: [value]}), "faces")
            assert torch_files.numbers(loaded[7][0]).tolist() == BOX.tolist()
        scalars = torch_files.load(save(tmp_path / "a.pth", [np.float32(0.5), np.float64(0.5), 0.5]), "faces")
        assert [float(torch_files.numbers(value)[0]) for value in scalars] == [0.5] * 3

    def test_older_names_of_numpys_module(self, tmp_path):
        path = save(tmp_path / "a.pth", [BOX, np.float32(2)])
        with zipfile.ZipFile(path) as archive:
            stored = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in stored.items():
                archive.writestr(name, content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
        array, number = torch_files.load(path, "faces")
        assert torch_files.numbers(array).tolist() == BOX.tolist() and number == 2

    def test_nothing_is_run(self, tmp_path):
        made = tmp_path / "made"
        for value in (Evil(made), {1: [Evil(made)]}):
            path = save(tmp_path / "evil.pth", value)
            with pytest.raises(ValueError, match=r"does not load safely as faces: it asks for posix.mkdir"):
                torch_files.load(path, "faces")
            path.write_bytes(pickle.dumps(value))  # without torch's container
            with pytest.raises(ValueError, match="does not load safely"):
                torch_files.load(path, "faces")
        assert not made.exists()

    def test_arrays_that_lie_are_refused(self, tmp_path):
        reconstruct, start = BOX.__reduce__()[:2]
        f4, objects = np.dtype("f4"), np.dtype("O")
        wrong = {
            "too few bytes": Crafted(reconstruct, start, (1, (1 << 40,), f4, False, b"1234")),
            "objects": np.array([{}, []], object),
            "text": np.array(["a"]),
            "fields": np.zeros(2, [("a", "f4")]),
            "big-endian": BOX.astype(">f4"),
            "a list for bytes": Crafted(reconstruct, start, (1, (1,), f4, False, [1.0])),
            "a scalar object": Crafted(np.float32(1).__reduce__()[0], (objects, b"1234")),
            "a made dtype": Crafted(np.dtype, ("V8", False, True), (3, "<", None, ("a",), {"a": (f4, 100)}, 8, 1, 0)),
        }
        for name, value in wrong.items():
            with pytest.raises(ValueError, match="does not load safely"):
                torch_files.load(save(tmp_path / "a.pth", [value]), "faces")
                pytest.fail(name)

    def test_damaged_files(self, tmp_path):
        whole = save(tmp_path / "a.pth", [1, 2, 3]).read_bytes()
        for content in (b"", b"\x80", b"<html>", whole[:-50], whole[: len(whole) // 2]):
            (tmp_path / "b.pth").write_bytes(content)
            with pytest.raises(ValueError, match=r"b.pth does not load safely as faces"):
                torch_files.load(tmp_path / "b.pth", "faces")
        with pytest.raises(FileNotFoundError):
            torch_files.load(tmp_path / "none.pth", "faces")


class TestIds:
    def test_whole_numbers_floats_tensors_and_arrays(self, tmp_path):
        big = 1_060_015_000_010
        parts = [[3, big, 3], [2.0, float(big)], torch.tensor([5, 4]), np.array([9, 8]), []]
        loaded = ids.load_ids(save(tmp_path / "ids.pth", parts))
        assert [part.tolist() for part in loaded] == [[3, big], [2, big], [4, 5], [8, 9], []]
        assert all(part.dtype == np.int64 for part in loaded)

    @pytest.mark.parametrize(
        "value", [7, {}, [], [["a"]], [[1.5]], [[float("nan")]], [[True]], [[None]], [5], [torch.tensor([0.5])]]
    )
    def test_others_are_refused(self, tmp_path, value):
        with pytest.raises(ValueError, match="list"):
            ids.load_ids(save(tmp_path / "ids.pth", value))

    def test_positions(self):
        found = ids.positions(np.array([2, 5, 9]), np.array([9, 1, 2, 10, 5, -1]))
        assert found.tolist() == [2, -1, 0, -1, 1, -1]
        assert ids.positions(np.empty(0, np.int64), np.array([1])).tolist() == [-1]

    def test_parts(self):
        assert ids.parse_parts("all", 3) == [0, 1, 2]
        assert ids.parse_parts("20m", 32) == [0, 2, 5, 8, 13, 15, 17, 18, 21, 22, 24, 25, 28]
        assert ids.parse_parts("4-6, 1", 32) == [1, 4, 5, 6]
        for text in ("", "x", "1-", "-1", "1;2"):
            with pytest.raises(ValueError, match="--parts is"):
                ids.parse_parts(text, 32)
        with pytest.raises(ValueError, match="names part 32, but the id list has 32"):
            ids.parse_parts("32", 32)


class TestDetections:
    def test_the_main_face_is_large_and_sure(self, tmp_path):
        large, small, unsure = BOX * 2, BOX, BOX * 3
        faces = [(small, POINTS, np.float32(0.99)), (large, POINTS, 0.9), (unsure, POINTS, np.float32(0.01))]
        save(tmp_path / "sample2detect_0.pth", {12: faces, 7: [(small, POINTS, 0.8)], 8: []})
        found = detections.load_detections(tmp_path).find(np.array([7, 8, 12, 99]))
        assert found[:, :4].tolist()[0] == BOX.tolist() and found[2, :4].tolist() == large.tolist()
        assert found[2, 4:14].tolist() == list(range(10)) and np.allclose(found[[0, 2], 14], [0.8, 0.9])
        assert np.isnan(found[[1, 3]]).all()

    def test_entries_that_are_no_faces_are_counted(self, tmp_path):
        good = [(BOX, POINTS, 0.9)]
        bad = [
            *([(BOX, POINTS)], [(BOX, POINTS[:4], 0.9)], 5, [None], [(BOX[[2, 1, 0, 3]], POINTS, 0.9)]),
            *([(BOX * np.nan, POINTS, 0.9)], [(BOX * 1e9, POINTS, 0.9)], [("abcd", POINTS, 0.9)]),
        ]
        entries = dict(enumerate(bad)) | {100: good, "x": good, 1.5: good, 2**70: good}
        save(tmp_path / "sample2detect_3.pth", entries)
        found = detections.load_detections(tmp_path)
        assert len(found) == 1 and found.damaged == len(bad) + 3

    def test_an_id_with_two_truths_has_none(self, tmp_path):
        save(tmp_path / "sample2detect_0.pth", {1: [(BOX, POINTS, 0.9)], 2: [(BOX, POINTS, 0.9)]})
        save(tmp_path / "sample2detect_1.pth", {1: [(BOX, POINTS, 0.9)], 2: [(BOX + 1, POINTS, 0.9)]})
        found = detections.load_detections(tmp_path)
        assert found.ambiguous == 1 and len(found) == 1
        assert np.isnan(found.find(np.array([1, 2]))[:, 0]).tolist() == [False, True]

    def test_a_part_is_read_once_and_again_when_it_changes(self, tmp_path, monkeypatch):
        source = save(tmp_path / "sample2detect_0.pth", {1: [(BOX, POINTS, 0.9)]})
        detections.load_detections(tmp_path)
        loaded = []
        real = torch_files.load
        monkeypatch.setattr(torch_files, "load", lambda path, what: loaded.append(path) or real(path, what))
        detections.load_detections(tmp_path)
        assert loaded == []
        save(source, {1: [(BOX + 1, POINTS, 0.9)], 2: [(BOX, POINTS, 0.9)]})
        assert len(detections.load_detections(tmp_path)) == 2 and loaded == [source]
        (tmp_path / "sample2detect_0.faces").write_bytes(b"cut short")
        assert len(detections.load_detections(tmp_path)) == 2
        source.unlink()  # 30 GB that may go once they are converted
        assert len(detections.load_detections(tmp_path)) == 2

    def test_wrong_folders(self, tmp_path):
        for folder in (tmp_path, tmp_path / "none"):
            with pytest.raises(ValueError, match=r"holds no sample2detect_N.pth"):
                detections.load_detections(folder)
        save(tmp_path / "sample2detect_0.pth", [1])
        with pytest.raises(ValueError, match="holds a list, wanted SAMPLE_ID -> faces"):
            detections.load_detections(tmp_path)


def test_boxes_become_shares_only_where_they_can_be_trusted():
    face = np.concatenate([[20, 10, 60, 50], np.arange(10) * 10, [0.95]]).astype(np.float32)
    none = np.full(15, np.nan, np.float32)
    low, over, away = face.copy(), face.copy(), face.copy()
    low[14], over[:4], away[:4] = 0.5, (-10, 10, 60, 50), (150, 10, 190, 50)
    cases = [
        # face, size, original size, turned, unknown, cause
        (face, (100, 50), (100, 50), False, False, "face"),
        (face, (50, 25), (100, 50), False, False, "face"),
        (face, (33, 16), (100, 50), False, False, "face"),
        (face, (100, 50), (-1, -1), False, False, "face"),
        (over, (100, 50), (100, 50), False, False, "face"),
        (none, (100, 50), (100, 50), False, False, "no_face"),
        (low, (100, 50), (100, 50), False, False, "low_score"),
        (face, (-1, -1), (-1, -1), False, False, "unknown_size"),
        (face, (100, 50), (100, 50), True, False, "turned"),
        (face, (256, 256), (100, 50), False, False, "reframed"),
        (away, (100, 50), (100, 50), False, False, "outside"),
        (face, (100, 50), (100, 50), False, True, "unknown_sample"),
    ]
    columns = list(zip(*cases, strict=True))
    found, causes = shares(np.array(columns[0]), *(np.array(column) for column in columns[1:5]), min_score=0.9)
    assert causes == list(columns[5])
    for row in found[:4]:
        assert np.allclose(row[:4], [0.2, 0.2, 0.6, 1.0]) and np.allclose(row[6:8], [0.2, 0.6])
    assert np.allclose(found[4, :4], [0.0, 0.2, 0.6, 1.0])
    assert np.isnan(found[5:]).all()


class TestDownloads:
    @staticmethod
    def shard(folder: Path, rows: list[dict[str, Any]], *, parquet: bool) -> Path:
        import pyarrow
        import pyarrow.parquet

        path = folder / "00000.tar"
        with tarfile.open(path, "w") as tar:
            for row in rows:
                content = json.dumps(row).encode()
                info = tarfile.TarInfo(f"{row['key']}.json")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        if parquet:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path.with_suffix(".parquet"))
        return path

    @pytest.mark.parametrize("parquet", [True, False])
    def test_the_table_and_the_members_say_the_same(self, tmp_path, parquet):
        turned = {"Image Orientation": "Rotated 90 CW"}
        upright = {"Image Orientation": "Horizontal (normal)"}
        base = {"width": 8, "SAMPLE_ID": 10**12, "status": "success"}
        rows = [
            {**base, "key": "a", "exif": json.dumps(turned)},
            {**base, "key": "b", "exif": json.dumps(upright), "SAMPLE_ID": 5},
            {**base, "key": "c", "exif": None, "status": "failed_to_download", "width": None},
        ]
        path = self.shard(tmp_path, rows, parquet=parquet)
        table = downloads.read_downloads(path, ["SAMPLE_ID", "width", "exif", "NSFW"])
        assert table.column_names == ["key", "SAMPLE_ID", "width", "exif"]
        assert downloads.strings(table, "key") == ["a", "b"]
        assert downloads.numbers(table, "SAMPLE_ID").tolist() == [10**12, 5]
        assert downloads.turned(table).tolist() == [True, False]

    def test_odd_members_are_nulls(self, tmp_path):
        odd: list[Any] = ["12", 3.0, 2.5, True, None, 1e300, [], "x"]
        rows = [{"key": str(i), "SAMPLE_ID": value, "NSFW": value} for i, value in enumerate(odd)]
        table = downloads.read_downloads(self.shard(tmp_path, rows, parquet=False), ["SAMPLE_ID", "NSFW"])
        assert downloads.numbers(table, "SAMPLE_ID").tolist() == [12, 3, -1, -1, -1, -1, -1, -1]
        assert downloads.strings(table, "NSFW") == ["12", "", "", "", "", "", "", "x"]

    def test_files_of_another_kind(self, tmp_path):
        import pyarrow
        import pyarrow.parquet

        path = self.shard(tmp_path, [], parquet=False)
        assert len(downloads.read_downloads(path, ["NSFW"])) == 0
        path.with_suffix(".parquet").write_text("no parquet")
        with pytest.raises(ValueError, match="is not img2dataset's"):
            downloads.read_downloads(path, [])
        for rows, message in (([{"a": 1}], "no column key"), ([{"key": "a", "width": "wide"}], "is not img2dataset's")):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path.with_suffix(".parquet"))
            with pytest.raises(ValueError, match=message):
                downloads.read_downloads(path, ["width"])

    def test_stats(self, tmp_path):
        stats = {"count": 3, "successes": 2, "failed_to_download": 1, "failed_to_resize": 0, "status_dict": {"x": 1}}
        file = tmp_path / "00000_stats.json"
        file.write_text(json.dumps({**stats, "duration": 1.5}))
        assert downloads.read_stats(tmp_path / "00000.tar") == stats
        for content in (
            "",
            "[]",
            "{}",
            json.dumps({**stats, "count": "many"}),
            json.dumps({**stats, "status_dict": 5}),
        ):
            file.write_text(content)
            assert downloads.read_stats(tmp_path / "00000.tar") is None


def test_difference_hash_finds_copies_and_tells_pictures_apart():
    rng = np.random.default_rng(0)

    def jpeg(image: Image.Image, quality: int = 90) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        return buffer.getvalue()

    pictures = [
        Image.fromarray(rng.integers(0, 256, (8, 9, 3), dtype=np.uint8)).resize((180, 160), Image.Resampling.BICUBIC)
        for _ in range(60)
    ]
    hashes = [near.difference_hash(jpeg(picture)) for picture in pictures]
    assert len(set(hashes)) == 60 and 0 not in hashes
    copies = [near.difference_hash(jpeg(picture.resize((270, 240)), 60)) for picture in pictures]
    assert sum(a == b for a, b in zip(hashes, copies, strict=True)) >= 45
    for nothing in (b"", b"<html>", jpeg(Image.new("RGB", (50, 50), "red")), jpeg(pictures[0])[:100]):
        assert near.difference_hash(nothing) == 0
