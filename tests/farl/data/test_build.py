"""Folders, tables and tars become shards: the same bytes each time, bad rows counted, nothing left by a failure."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from farl.data import build as subject
from farl.data.build import BuildOptions, Report, build
from farl.data.build import main as build_main

FARL_DATA = os.environ.get("FARL_DATA")


def picture(shade: int = 0, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), (shade % 256, 10, 20)).save(buffer, kind)
    return buffer.getvalue()


def shard(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def run(source: Path, out: Path, **options: object) -> Report:
    return build(BuildOptions(str(source), str(out), **options))  # type: ignore[arg-type]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    files = {f"images/{n:03}.jpg": picture(n) for n in range(40)}
    rows = "".join(f"images/{n:03}.jpg\tcaption {n}\tp{n // 4}\n" for n in range(40))
    return put(tmp_path / "photos", {**files, "pairs.tsv": ("image\tcaption\tperson\n" + rows).encode()})


class TestFolder:
    def test_images_with_text_beside_them(self, tmp_path: Path) -> None:
        source = put(
            tmp_path / "in",
            {
                "b/2.png": picture(2, "PNG"),
                "b/2.txt": b"two\n",
                "a.jpg": picture(1),
                "a.txt": "één".encode(),
                "lone.jpg": picture(),
                "blank.jpg": picture(),
                "blank.txt": b" \n",
                "page.jpg": b"<html>not found</html>",
                "page.txt": b"a page",
                "zero.jpg": b"",
                "zero.txt": b"nothing",
                "wrong.jpg": picture(3, "WEBP"),
                "wrong.txt": b"a WebP",
                ".hidden/x.jpg": picture(),
                "notes.txt": b"no image",
            },
        )
        report = run(source, tmp_path / "out")
        members = shard(tmp_path / "out/train-00000.tar")
        assert list(dict.fromkeys(name.split(".")[0] for name in members)) == ["a", "b/2", "wrong"]
        assert members == {
            "a.jpg": picture(1),
            "a.txt": "één".encode(),
            "b/2.png": picture(2, "PNG"),
            "b/2.txt": b"two",
            "wrong.webp": picture(3, "WEBP"),
            "wrong.txt": b"a WebP",
        }
        assert report.skipped == {"missing_caption": 2, "not_an_image": 1, "empty": 1}
        assert report.examples["not_an_image"] == ["page.jpg"]
        assert json.loads((tmp_path / "out/train.build.json").read_text())["splits"]["train"]["samples"] == 3

    def test_links_out_of_the_folder_need_root(self, tmp_path: Path) -> None:
        source = put(tmp_path / "in", {"a.jpg": picture(), "a.txt": b"a", "b.txt": b"b"})
        put(tmp_path, {"secret.jpg": picture()})
        (source / "b.jpg").symlink_to(tmp_path / "secret.jpg")
        assert run(source, tmp_path / "out").skipped == {"outside_root": 1}
        assert run(source, tmp_path / "out2", root=str(tmp_path)).skipped == {}

    def test_a_folder_without_anything(self, tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        with pytest.raises(ValueError, match="neither images nor tars"):
            run(tmp_path / "in", tmp_path / "out")


class TestTable:
    def test_bad_rows_are_counted_by_cause(self, tmp_path: Path) -> None:
        root = put(tmp_path / "in", {"ok.jpg": picture(), "ok2.jpg": picture(), "html.jpg": b"<!DOCTYPE html>"})
        put(tmp_path, {"secret.jpg": picture(), "in2/x.jpg": picture()})
        os.mkfifo(root / "pipe.jpg")
        rows = [
            "image\tcaption",
            'ok.jpg\t"quoted" start, not a field in quotes',
            "gone.jpg\tlost",
            "../secret.jpg\tout of the folder",
            "../in2/x.jpg\ta folder whose name begins alike",
            f"{tmp_path}/secret.jpg\tabsolute",
            "html.jpg\ta page",
            "ok2.jpg\t   ",
            "pipe.jpg\twould block",
            "bad\0.jpg\tnull byte",
            "\tno image",
            "three\tcells\there",
            "",
            'ok.jpg\t"the ""same"" image"',
        ]
        table = put(root, {"pairs.tsv": "\r\n".join(rows).encode()}) / "pairs.tsv"
        report = run(table, tmp_path / "out")
        assert report.skipped == {
            "missing_file": 4,
            "outside_root": 3,
            "not_an_image": 1,
            "missing_caption": 1,
            "malformed_row": 1,
        }
        members = shard(tmp_path / "out/train-00000.tar")
        assert members["ok.txt"] == b'"quoted" start, not a field in quotes'
        assert members["ok--2.txt"] == b'the "same" image'

    def test_csv_and_parquet_give_what_tsv_gives(self, photos: Path, tmp_path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        rows = list(csv.DictReader((photos / "pairs.tsv").open(), delimiter="\t"))
        with (photos / "pairs.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["who", "File_Name", "TEXT"])
            writer.writerows([row["person"], row["image"], row["caption"]] for row in rows)
        columns = {"url": rows and [row["image"] for row in rows], "said": [row["caption"] for row in rows]}
        pyarrow.parquet.write_table(pyarrow.table(columns), photos / "pairs.parquet")
        run(photos / "pairs.tsv", tmp_path / "tsv")
        run(photos / "pairs.csv", tmp_path / "csv")
        run(photos / "pairs.parquet", tmp_path / "parquet", image_column="url", caption_column="said")
        expected = (tmp_path / "tsv/train-00000.tar").read_bytes()
        assert (tmp_path / "csv/train-00000.tar").read_bytes() == expected
        assert (tmp_path / "parquet/train-00000.tar").read_bytes() == expected

    def test_quoted_lines_of_csv_and_bytes_that_are_not_utf8(self, tmp_path: Path) -> None:
        root = put(tmp_path / "in", {"a.jpg": picture(), "b.jpg": picture()})
        put(root, {"t.csv": b'\xef\xbb\xbfimage,caption\na.jpg,"two\nlines, ""quoted"""\nb.jpg,caf\xe9\n'})
        run(root / "t.csv", tmp_path / "out")
        members = shard(tmp_path / "out/train-00000.tar")
        assert members["a.txt"] == b'two\nlines, "quoted"'
        assert members["b.txt"] == b"caf\xe9"

    @pytest.mark.parametrize(
        ("content", "options", "message"),
        [
            (b"", {}, "is empty"),
            (b"name\tcaption\na.jpg\tx\n", {}, "has the columns name, caption: say with --image-column"),
            (
                b"image\tcaption\n",
                {"caption_column": "alt"},
                "--caption-column alt: t.tsv has the columns image",
            ),
            (b"image\tcaption\n", {}, "no usable sample in .*it has no rows"),
            (b"image\tcaption\nx.jpg\tx\n", {}, r"no usable sample in .*missing_file 1 \(as x.jpg\)"),
        ],
    )
    def test_tables_that_cannot_be_used(
        self, tmp_path: Path, content: bytes, options: dict[str, object], message: str
    ) -> None:
        put(tmp_path, {"t.tsv": content})
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "t.tsv", tmp_path / "out", **options)
        assert not list((tmp_path / "out").glob("*"))

    def test_no_parquet(self, tmp_path: Path) -> None:
        put(tmp_path, {"t.parquet": b"image,caption\n"})
        with pytest.raises(ValueError, match="is no parquet file"):
            run(tmp_path / "t.parquet", tmp_path / "out")


class TestSplit:
    def people(self, folder: Path, name: str) -> set[int]:
        return {int(key[7:10]) // 4 for key in shard(folder / f"{name}-00000.tar")}

    def test_groups_stay_together(self, photos: Path, tmp_path: Path) -> None:
        report = run(photos / "pairs.tsv", tmp_path / "out", val_fraction=0.3, group_column="person")
        train, val = self.people(tmp_path / "out", "train"), self.people(tmp_path / "out", "val")
        assert not train & val
        assert train | val == set(range(10))
        assert report.samples == 40

    def test_groups_of_another_table(self, photos: Path, tmp_path: Path) -> None:
        rows = "".join(f"./images/{n:03}.jpg,{n // 4},1\n" for n in range(39))
        put(photos, {"attributes.csv": ("image,person,smiling\n" + rows).encode()})
        options = {"val_fraction": 0.3, "group_column": "person", "group_csv": str(photos / "attributes.csv")}
        report = run(photos / "pairs.tsv", tmp_path / "out", **options)
        assert not self.people(tmp_path / "out", "train") & self.people(tmp_path / "out", "val")
        assert report.skipped == {"missing_group": 1}  # it could be anyone, so it may go to neither side

    def test_two_captions_of_an_image_stay_together(self, photos: Path, tmp_path: Path) -> None:
        lines = (photos / "pairs.tsv").read_text().splitlines(keepends=True)
        (photos / "pairs.tsv").write_text("".join(lines + lines[1:]))
        run(photos / "pairs.tsv", tmp_path / "out", val_fraction=0.5)
        train, val = ({name[:10] for name in shard(tmp_path / f"out/{n}-00000.tar")} for n in ("train", "val"))
        assert not train & val
        assert len(train | val) == 40

    def test_too_few_groups(self, photos: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="no group fell into 'val'"):
            run(photos / "pairs.tsv", tmp_path / "out", val_fraction=0.0001)


class TestTars:
    def tar(self, path: Path, files: dict[str, bytes]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        return path

    def test_output_of_img2dataset(self, tmp_path: Path) -> None:
        good = json.dumps({"status": "success", "SAMPLE_ID": 7}).encode()
        failed = json.dumps({"status": "failed_to_resize"}).encode()
        for split in (0, 1):
            files = {
                "000.jpg": picture(split),
                "000.txt": b"zero",
                "000.json": good,
                "001.jpg": picture(),
                "001.txt": b"one",
                "001.json": failed,
                "002.txt": b"no image",
                "003.jpg": picture(),
                "003.json": json.dumps({"caption": "from json"}).encode(),
                "004.jpg": picture(),
                "004.json": b"[broken",
                "000.JPG": picture(9),
            }
            self.tar(tmp_path / f"laion/split_{split}/00000.tar", files)
        put(tmp_path, {"laion/split_0/00000.parquet": b"PAR1", "laion/split_0/00000_stats.json": b"{}"})
        cut = self.tar(tmp_path / "laion/split_1/00001.tar", {"1.jpg": picture(), "1.txt": b"x", "2.jpg": bytes(9999)})
        with cut.open("r+b") as file:
            file.truncate(4000)
        put(tmp_path, {"laion/split_1/00002.tar": b""})
        report = run(tmp_path / "laion", tmp_path / "out", samples_per_shard=2)
        assert [path.name for path in sorted((tmp_path / "out").glob("*.tar"))] == [
            "train-00000.tar",
            "train-00001.tar",
            "train-00002.tar",
        ]
        members = shard(tmp_path / "out/train-00000.tar")
        assert set(members) == {f"split_0/{key}.{ext}" for key in ("000", "003") for ext in ("jpg", "txt", "json")}
        assert members["split_0/000.jpg"] == picture(0)
        assert members["split_0/000.json"] == good
        assert members["split_0/003.txt"] == b"from json"
        assert "split_1/1.jpg" in shard(tmp_path / "out/train-00002.tar")
        assert report.skipped == {
            "duplicate_key": 2,
            "failed_download": 2,
            "missing_image": 2,
            "missing_caption": 2,
            "truncated_shard": 1,
            "empty_shard": 1,
        }

    def test_own_output_inside_the_source_is_no_source(self, tmp_path: Path) -> None:
        source = put(tmp_path / "in", {"a.jpg": picture(), "a.txt": b"a"})
        run(source, source / "shards")
        first = (source / "shards/train-00000.tar").read_bytes()
        run(source, source / "shards", overwrite=True)
        assert (source / "shards/train-00000.tar").read_bytes() == first


class TestOutput:
    def test_same_bytes_again_and_on_touched_files(self, photos: Path, tmp_path: Path) -> None:
        run(photos / "pairs.tsv", tmp_path / "one", samples_per_shard=16, val_fraction=0.2)
        for path in photos.rglob("*.jpg"):
            os.utime(path, (1, 1))
        run(photos / "pairs.tsv", tmp_path / "two", samples_per_shard=16, val_fraction=0.2)
        names = sorted(path.name for path in (tmp_path / "one").iterdir())
        assert names == [*(f"train-0000{n}.tar" for n in range(3)), "train.build.json", "val-00000.tar"]
        for name in names:
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()

    def test_max_samples_counts_good_ones(self, photos: Path, tmp_path: Path) -> None:
        (photos / "images/001.jpg").unlink()
        report = run(photos / "pairs.tsv", tmp_path / "out", max_samples=5)
        assert (report.samples, report.skipped) == (5, {"missing_file": 1})

    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
    def test_a_failure_leaves_the_folder_as_it_was(
        self, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
    ) -> None:
        run(photos / "pairs.tsv", tmp_path / "out")
        before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}

        def fail_late(group: str, fraction: float) -> bool:
            if group == "images/030.jpg":
                raise error
            return False

        monkeypatch.setattr(subject, "in_validation", fail_late)
        with pytest.raises(type(error)):
            run(photos / "pairs.tsv", tmp_path / "out", overwrite=True, samples_per_shard=10)
        assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before

    def test_leavings_of_a_killed_build_do_no_harm(self, photos: Path, tmp_path: Path) -> None:
        put(tmp_path / "out/.train.partial", {"train-00009.tar": b"half"})
        run(photos / "pairs.tsv", tmp_path / "out")
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train-00000.tar", "train.build.json"]

    def test_existing_shards_are_kept_unless_overwritten(self, photos: Path, tmp_path: Path) -> None:
        run(photos / "pairs.tsv", tmp_path / "out", samples_per_shard=10)
        with pytest.raises(ValueError, match=r"train-00000.tar exists: choose another --out or --name"):
            run(photos / "pairs.tsv", tmp_path / "out")
        run(photos / "pairs.tsv", tmp_path / "out", name="other")
        run(photos / "pairs.tsv", tmp_path / "out", overwrite=True)
        names = sorted(path.name for path in (tmp_path / "out").glob("*.tar"))
        assert names == ["other-00000.tar", "train-00000.tar"]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"val_fraction": 1.0}, "--val-fraction is 1.0"),
            ({"samples_per_shard": 0}, "--samples-per-shard is 0"),
            ({"max_samples": 0}, "--max-samples is 0"),
            ({"name": "a/b"}, "--name is 'a/b'"),
            ({"name": "val", "val_fraction": 0.5}, "--name val"),
            ({"group_column": "person"}, "give --val-fraction"),
            ({"group_csv": "x.csv", "val_fraction": 0.1}, "--group-csv needs --group-column"),
        ],
    )
    def test_options_that_make_no_sense(self, options: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            BuildOptions("in", "out", **options)  # type: ignore[arg-type]


def test_summary_names_shards_and_causes(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "images/001.jpg").unlink()
    assert build_main([str(photos / "pairs.tsv"), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "39 samples" in printed
    assert "train-00000.tar" in printed
    assert "missing_file" in printed
    assert "images/001.jpg" in printed


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["build", "x", "--outt", "y"], 2, "farl.data build: unrecognized option --outt; did you mean --out?"),
        (["build", "missing.tsv", "--out", "y"], 1, "farl.data: no such file or directory: missing.tsv"),
    ],
)
def test_errors_are_one_line(tmp_path: Path, arguments: list[str], code: int, line: str) -> None:
    command = [sys.executable, "-m", "farl.data", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (code, line)


@pytest.mark.skipif(not FARL_DATA, reason="FARL_DATA is not set: no real photographs")
def test_real_photographs_split_by_person(tmp_path: Path) -> None:
    faces = Path(FARL_DATA or "") / "faces"
    options = {
        "max_samples": 50,
        "val_fraction": 0.3,
        "group_column": "person",
        "group_csv": str(faces / "attributes.csv"),
    }
    report = run(faces / "pairs.tsv", tmp_path / "out", **options)
    assert (report.samples, report.skipped) == (50, {})
    person = {row["image"]: row["person"] for row in csv.DictReader((faces / "attributes.csv").open())}
    people = []
    for name in ("train", "val"):
        members = shard(tmp_path / f"out/{name}-00000.tar")
        images = [member for member in members if member.endswith(".jpg")]
        assert all(members[image] == (faces / image).read_bytes() for image in images)
        people.append({person[image] for image in images})
    assert not people[0] & people[1]
