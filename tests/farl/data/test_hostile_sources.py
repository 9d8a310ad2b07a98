"""Folders, tables and tars made to hurt: what `farl.data build` reads, and what it passes on into new shards."""

from __future__ import annotations

import importlib
import io
import os
import tarfile
import time
from pathlib import Path

import pytest
from PIL import Image

from farl.data import build as build_module
from farl.data import tars
from farl.data.build import BuildOptions, Report, build
from farl.tokenizer import ClipTokenizer
from farl_engine.data import ShardIndex
from farl_engine.data.samples import decode_caption


@pytest.fixture(scope="module")
def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def run(source: Path, out: Path, **options: object) -> Report:
    return build(BuildOptions(str(source), str(out), **options))  # type: ignore[arg-type]


def contents(out: Path) -> dict[str, bytes]:
    members = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            members |= {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    return members


def test_harmful_names_do_not_pass_into_new_shards(tmp_path: Path, jpeg: bytes) -> None:
    harmful = ["../../up", "/absolute", "a/../b", "C:\\x", "new\nline", "\x1b[31m", "__key__", "a//b"]
    harmless = ["a/b", "汉字 😀", "$(touch x)", "b__"]
    names = harmful + harmless + ["./dotted"]
    write_tar(tmp_path / "in" / "a.tar", {f"{n}.{e}": c for n in names for e, c in (("jpg", jpeg), ("txt", b"c"))})
    report = run(tmp_path / "in", tmp_path / "out")
    assert report.samples == len(names) and not report.skipped
    written = {name.rpartition(".")[0] for name in contents(tmp_path / "out")}
    assert len(written) == len(names) and written >= {*harmless, "dotted"} and not written & set(harmful)
    with tarfile.open(next((tmp_path / "out").glob("*.tar"))) as tar:
        # Python's own judge of what is safe to unpack.
        tar.extractall(tmp_path / "unpacked", filter="data")
    assert all(name.isprintable() and ".." not in name.split("/") for name in written)
    assert len(ShardIndex.build(tmp_path / "out")) == len(names)


def test_members_that_webdataset_keeps_for_itself_are_left_out(tmp_path: Path, jpeg: bytes) -> None:
    members = {
        "a.jpg": jpeg,
        "a.txt": b"c",
        "a.__key__": b"evil",
        "a.__url__": b"evil",
        "a.npz": b"kept",
        "a.pkl": b"kept",
    }
    run(write_tar(tmp_path / "a.tar", members), tmp_path / "out")
    assert set(contents(tmp_path / "out")) == {"a.jpg", "a.txt", "a.npz", "a.pkl"}


@pytest.mark.parametrize("meta", [b"[" * 1_000_000, b'{"a":' * 80_000, b"9" * 100_000, b"\xff", b"[]", b"null"])
def test_metadata_that_is_none(tmp_path: Path, jpeg: bytes, meta: bytes) -> None:
    members = {"a.jpg": jpeg, "a.txt": b"c", "a.json": meta, "b.jpg": jpeg, "b.json": b'{"caption": "x\\ud800"}'}
    report = run(write_tar(tmp_path / "a.tar", members), tmp_path / "out")
    assert report.samples == 2 and contents(tmp_path / "out")["b.txt"] == b"x?"


def test_members_of_any_size_do_not_fill_the_memory(
    tmp_path: Path, jpeg: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tars, "MAX_IMAGE_BYTES", 5000)
    members = {"a.jpg": jpeg, "a.txt": b"c", "b.jpg": jpeg + bytes(5000), "b.txt": b"c"}
    report = run(write_tar(tmp_path / "a.tar", members), tmp_path / "out")
    assert report.samples == 1 and report.skipped == {"oversized": 1}


def test_files_of_any_size_do_not_fill_the_memory(tmp_path: Path, jpeg: bytes) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("good", "image", "text"):
        (folder / f"{name}.jpg").write_bytes(jpeg)
        (folder / f"{name}.txt").write_bytes(b"c")
    for name in ("image.jpg", "text.txt"):
        # Sparse: a terabyte that takes no room on the disk.
        os.truncate(folder / name, 1 << 40)
    report = run(folder, tmp_path / "out")
    assert report.samples == 1 and report.skipped == {"oversized": 1, "missing_caption": 1}


def test_links_fifos_and_other_folders_are_not_read(tmp_path: Path, jpeg: bytes) -> None:
    folder, secret = tmp_path / "in", tmp_path / "secret.jpg"
    folder.mkdir()
    secret.write_bytes(jpeg)
    (folder / "link.jpg").symlink_to(secret)
    (folder / "loop.jpg").symlink_to("loop.jpg")
    os.mkfifo(folder / "fifo.jpg")
    (folder / "good.jpg").write_bytes(jpeg)
    rows = [
        "link.jpg",
        "loop.jpg",
        "fifo.jpg",
        "../secret.jpg",
        str(secret),
        "pipe:cat x",
        "http://x/y.jpg",
        "a\0b",
        "good.jpg",
    ]
    (folder / "t.tsv").write_text("image\tcaption\n" + "".join(f"{name}\tc\n" for name in rows))
    report = run(folder / "t.tsv", tmp_path / "out")
    assert report.samples == 1 and report.skipped["outside_root"] == 3
    assert sum(report.skipped.values()) == len(rows) - 1


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-8-sig"])
@pytest.mark.parametrize("suffix", ["tsv", "csv"])
def test_tables_and_captions_of_other_encodings(tmp_path: Path, jpeg: bytes, encoding: str, suffix: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(jpeg)
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    comma = "\t" if suffix == "tsv" else ","
    (folder / f"t.{suffix}").write_bytes(f"{mark}image{comma}caption\na.jpg{comma}Ä 😀 שלום\n".encode(encoding))
    run(folder / f"t.{suffix}", tmp_path / "table")
    assert contents(tmp_path / "table")["a.txt"].decode() == "Ä 😀 שלום"
    (folder / f"t.{suffix}").unlink()
    (folder / "a.txt").write_bytes(f"{mark}Ä 😀\n".encode(encoding))
    run(folder, tmp_path / "folder")
    assert decode_caption(contents(tmp_path / "folder")["a.txt"]) == ("Ä 😀", False)


def test_a_damaged_parquet_file_is_a_known_error(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = {"image": [f"{n}.jpg" for n in range(500)], "caption": [f"c {n}" for n in range(500)]}
    parquet.write_table(importlib.import_module("pyarrow").table(table), tmp_path / "t.parquet")
    whole = (tmp_path / "t.parquet").read_bytes()
    for damage in (whole[:-20], whole[:100], b"", whole[:40] + bytes(200) + whole[240:]):
        (tmp_path / "t.parquet").write_bytes(damage)
        with pytest.raises((ValueError, OSError)):
            run(tmp_path / "t.parquet", tmp_path / "out")


def test_what_is_thrown_out_is_shown_on_one_line(tmp_path: Path, jpeg: bytes) -> None:
    write_tar(tmp_path / "a.tar", {"a.jpg": jpeg, "a.txt": b"c", "x\ny\x1b[2J.jpg": jpeg})
    report = run(tmp_path / "a.tar", tmp_path / "out")
    shown = build_module.summary(report, "out")
    assert "\x1b" not in shown and shown.count("\n") == len(shown.splitlines()) - 1 == 2


@pytest.fixture(scope="module")
def tokenizer() -> ClipTokenizer:
    return ClipTokenizer()


@pytest.mark.parametrize("unit", ["a", "word ", "😀", "\u202eאב", "&amp;", "Ã©", "\u0301", "<", " \u200b", "9"])
def test_a_megabyte_of_caption_is_bounded_work(tokenizer: ClipTokenizer, unit: str) -> None:
    content = (unit * (1_000_000 // len(unit.encode()))).encode()
    start = time.thread_time()
    ids = tokenizer.encode(decode_caption(content)[0])
    assert time.thread_time() - start < 0.5
    assert 2 <= len(ids) <= 77
