"""Tars and captions made to hurt: bounded work, one stated outcome each, and nothing in them is unpacked or run."""

from __future__ import annotations

import codecs
import io
import json
import logging
import os
import pickle
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from farl_engine.data import BadDataError, CpuDecoder, CropPlan, Loader, SampleOrder, ShardIndex, shards
from farl_engine.data.bad_data import BadSampleLedger
from farl_engine.data.samples import MAX_CAPTION_CHARACTERS, decode_caption
from farl_engine.data.shards import scan_shard


@pytest.fixture
def jpeg(tools) -> bytes:
    return tools[0](tools[1](30, 30))


def pair(key: str, image: bytes, caption: bytes = b"c") -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", image), (f"{key}.txt", caption)]


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def read_all(index: ShardIndex, threads: int = 1) -> dict[str, str]:
    """Key -> caption of one epoch through the loader."""
    order = SampleOrder(len(index), len(index), seed=0)
    with Loader(index, order, decoder=CpuDecoder(8), plan=CropPlan(), seed=0, threads=threads, end_step=1) as loader:
        (batch,) = loader
        assert loader.bad_samples == {}
    return dict(zip(map(index.key, batch.used_ids.tolist()), batch.captions, strict=True))


CAPTIONS = {
    "utf-8": ("Ä 😀 ok".encode(), "Ä 😀 ok", False),
    "bom": (codecs.BOM_UTF8 + b"bom", "bom", False),
    "utf-16": ("Ä 😀\n".encode("utf-16"), "Ä 😀", False),
    "utf-16 be": (codecs.BOM_UTF16_BE + "Ä 😀".encode("utf-16-be"), "Ä 😀", False),
    "utf-16 cut": ("Ä 😀".encode("utf-16")[:-1], "Ä \ufffd", True),
    "latin-1": (b"caf\xe9 noir", "caf\ufffd noir", True),
    "nul": (b"a\0b\0", "a b", True),
    "lone surrogate": (b"x\xed\xa0\x80y", "x\ufffd\ufffd\ufffdy", True),
    "right to left": ("שלום \u202eabc".encode(), "שלום \u202eabc", False),
    "family": ("👨\u200d👩\u200d👧".encode(), "👨\u200d👩\u200d👧", False),
    "blanks": (b" \n\t\xc2\xa0\0", "", True),
    "long": (b"word " * 200_000, ("word " * MAX_CAPTION_CHARACTERS)[:MAX_CAPTION_CHARACTERS].rstrip(), False),
    "long emoji": (("a" + "😀" * 250_000).encode(), "a" + "😀" * (MAX_CAPTION_CHARACTERS - 1), False),
    "long utf-16": (("\n" + "ab" * 500_000).encode("utf-16"), "ab" * (MAX_CAPTION_CHARACTERS // 2), False),
}


@pytest.mark.parametrize(("content", "text", "repaired"), CAPTIONS.values(), ids=CAPTIONS.keys())
def test_captions_of_any_encoding(content, text, repaired):
    assert decode_caption(content) == (text, repaired)
    text.encode()


def test_sizes_of_members_are_bounded(tmp_path, tools, jpeg, monkeypatch):
    monkeypatch.setattr(shards, "MAX_IMAGE_BYTES", 5000)
    monkeypatch.setattr(shards, "MAX_JSON_BYTES", 3000)
    meta = json.dumps({"caption": "j"}).encode()
    members = [
        *pair("book", jpeg, b"b" * 5_000_000),
        *pair("huge", jpeg + bytes(5001)),
        ("small-json.jpg", jpeg),
        ("small-json.json", meta),
        ("large-json.jpg", jpeg),
        ("large-json.json", meta + b" " * 3000),
        ("text-too.jpg", jpeg),
        ("text-too.json", meta + b" " * 3000),
        ("text-too.txt", b"t"),
    ]
    index = ShardIndex.build(tools[2](tmp_path / "a.tar", members))
    assert index.problems == {"oversized_image": 1, "missing_caption": 1} and index.excluded == 2
    assert len(index.read(0)[1]) == shards.MAX_TEXT_BYTES
    assert read_all(index) == {"book": "b" * MAX_CAPTION_CHARACTERS, "small-json": "j", "text-too": "t"}


NOT_A_CAPTION = {
    "deep": b"[" * 1_000_000,
    "deep objects": b'{"caption":' * 80_000,
    "number": b'{"caption": ' + b"9" * 100_000 + b"}",
    "list": b'{"caption": ["a"]}',
    "none": b'{"caption": null}',
    "no object": b'"caption"',
    "bytes": b"\xff\xfe\xfd",
    "nan": b'{"caption": NaN}',
}


def test_json_that_is_no_caption_is_a_missing_one(tmp_path, tools, jpeg):
    members = [
        member for key, meta in NOT_A_CAPTION.items() for member in ((f"{key}.jpg", jpeg), (f"{key}.json", meta))
    ]
    surrogate = [("s.jpg", jpeg), ("s.json", b'{"caption": "a\\ud83d"}'), ("u.jpg", jpeg)]
    surrogate.append(("u.json", json.dumps({"caption": "ü"}, ensure_ascii=False).encode("utf-16")))
    index = ShardIndex.build(tools[2](tmp_path / "a.tar", members + surrogate))
    captions = {index.key(i): index.read(i)[1] for i in range(len(index))}
    assert {key: captions.get(key, b"") for key in NOT_A_CAPTION} == dict.fromkeys(NOT_A_CAPTION, b"")
    assert captions["s"] == b"a?" and captions["u"].decode() == "ü"


NAMES = [
    "../../up",
    "/absolute",
    "a/../b",
    "C:\\x",
    "~/x",
    "$(touch x)",
    "|touch x",
    "-rf",
    "new\nline",
    "\x1b[31mred",
    "汉字 😀",
]


def test_no_name_reaches_the_disk(tmp_path, tools, jpeg, caplog):
    """The engine reads bytes at offsets: a member's name is a label, whatever it says."""
    folder = tmp_path / "deep" / "er"
    folder.mkdir(parents=True)
    tools[2](folder / "a.tar", [member for name in NAMES for member in pair(name, jpeg)])
    before = tree(tmp_path)
    index = ShardIndex.build(folder, cache=False)
    assert set(read_all(index)) == set(NAMES)
    assert tree(tmp_path) == before


def test_bad_names_cannot_forge_log_lines(caplog):
    ledger = BadSampleLedger(0.0)
    with caplog.at_level(logging.WARNING):
        ledger.add(1, [("corrupt", "a\nshard", "key x\n2026-01-01 all is well\x1b[2J\u202e" + "y" * 100_000)])
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.isprintable() and len(line) < 1000 and "key x\\n2026" in line
    with pytest.raises(BadDataError) as caught:
        ledger.check()
    assert str(caught.value).isprintable()


def test_links_and_devices_are_no_samples(tmp_path, jpeg):
    secret = tmp_path / "secret.txt"
    secret.write_bytes(b"secret")
    kinds = {"sym": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "dev": tarfile.CHRTYPE, "fifo": tarfile.FIFOTYPE}
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in kinds.items():
            info = tarfile.TarInfo(f"{name}.jpg")
            info.size = len(jpeg)
            tar.addfile(info, io.BytesIO(jpeg))
            info = tarfile.TarInfo(f"{name}.txt")
            info.type, info.linkname = kind, str(secret)
            tar.addfile(info)
        info = tarfile.TarInfo("last.jpg")
        info.size = len(jpeg)
        tar.addfile(info, io.BytesIO(jpeg))
    result = scan_shard(tmp_path / "a.tar")
    assert result.keys == [] and result.problems == {"missing_caption": 5}


def test_pickles_and_programs_in_a_shard_are_only_bytes(tmp_path, tools, jpeg):
    marker = tmp_path / "run"

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (marker,)

    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Evil()))
    harm = {
        "pyd": pickle.dumps(Evil()),
        "pkl": pickle.dumps(Evil()),
        "pth": archive.getvalue(),
        "npy": pickle.dumps(Evil()),
    }
    harm |= {
        "sh": f"touch {marker}".encode(),
        "py": f"open({str(marker)!r}, 'w')".encode(),
        "__init__": b"x",
        "cls": b"1",
    }
    members = [(f"a.{extension}", content) for extension, content in harm.items()]
    members += [*pair("a", jpeg), ("b.jpg", pickle.dumps(Evil())), ("b.txt", pickle.dumps(Evil()))]
    index = ShardIndex.build(tools[2](tmp_path / "a.tar", members))
    order = SampleOrder(2, 2, seed=0)
    with Loader(index, order, decoder=CpuDecoder(8), plan=CropPlan(), seed=0, threads=0, end_step=1) as loader:
        (batch,) = loader
    assert set(batch.captions) == {"c"} and loader.bad_samples.keys() == {"not_an_image"}
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", ["pipe:touch {}", "pipe:cat /dev/null; touch {}", "|touch {}", "$(touch {})", "`touch {}`"]
)
def test_no_shell_behind_a_shard_name(tmp_path, name):
    marker = tmp_path / "run"
    with pytest.raises(ValueError, match="touch"):
        ShardIndex.build(name.format(marker))
    # The same as the name of a file is a name, and no command.
    (tmp_path / "pipe:x.tar").write_bytes(bytes(1024))
    assert [path.name for path in shards.expand_paths(tmp_path)] == ["pipe:x.tar"]
    assert not marker.exists()


def test_tars_in_tars_folders_and_dots(tmp_path, tools, jpeg):
    inner = tools[2](tmp_path / "inner.tar", pair("inside", jpeg)).read_bytes()
    members = [("x.tar", inner), ("a/b/c/one.jpg", jpeg), ("a/b/c/one.txt", b"1"), ("a/b.d/two.x.jpg", jpeg)]
    members += [("a/b.d/two.txt", b"2"), ("a/b.d/two.jpg", jpeg), ("./three.jpg", jpeg), ("./three.txt", b"3")]
    result = scan_shard(tools[2](tmp_path / "a.tar", members))
    assert result.keys == [b"a/b/c/one", b"a/b.d/two", b"./three"]
    assert result.problems == {"unknown_extension": 1}


def test_a_sample_split_over_two_tars_counts_as_two_halves(tmp_path, tools, jpeg):
    tools[2](tmp_path / "0.tar", [*pair("a", jpeg), ("b.jpg", jpeg)])
    tools[2](tmp_path / "1.tar", [("b.txt", b"c"), *pair("d", jpeg)])
    index = ShardIndex.build(tmp_path, cache=False)
    assert [index.key(i) for i in range(len(index))] == ["a", "d"]
    assert index.problems == {"missing_caption": 1, "missing_image": 1}
    assert index.excluded_by_shard == {"0.tar": 1, "1.tar": 1}


def test_garbage_between_members(tmp_path, tools, jpeg, caplog):
    path = tools[2](tmp_path / "a.tar", pair("a", jpeg))
    two = tools[2](tmp_path / "b.tar", pair("b", jpeg)).read_bytes()
    members = path.read_bytes().rstrip(b"\0")
    members += bytes(-len(members) % 512)
    path.write_bytes(members + b"\xde\xad" * 256 + two)
    result = scan_shard(path)
    assert result.keys == [b"a"] and result.problems == {"corrupt_shard": 1}
    assert len(caplog.records) == 1 and "a.tar" in caplog.text


@pytest.mark.parametrize(
    ("claims", "cause"),
    [
        ({"comment": "x" * (3 << 20)}, "corrupt_shard"),
        ({"size": str(2**62)}, "truncated_shard"),
        ({"path": "k.jpg", "size": "-1"}, "corrupt_shard"),
    ],
    ids=["record of megabytes", "member beyond the tar", "negative size"],
)
def test_pax_headers_may_claim_anything(tmp_path, jpeg, claims, cause):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, headers in (("a.jpg", {}), ("a.txt", {}), ("b.jpg", claims), ("b.txt", {})):
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(jpeg), headers
            tar.addfile(info, io.BytesIO(jpeg))
    result = scan_shard(tmp_path / "a.tar")
    assert result.keys == [b"a"] and result.problems == {cause: 1}


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar command")
@pytest.mark.parametrize("format", ["gnu", "pax"])
def test_sparse_files_are_passed_over(tmp_path, jpeg, format):
    """Also those of so many holes that their map needs blocks of its own."""
    for name, content in pair("a", jpeg) + pair("z", jpeg):
        (tmp_path / name).write_bytes(content)
    with (tmp_path / "holes.jpg").open("wb") as file:
        for hole in range(40):
            file.seek(hole * 200_000)
            file.write(b"data")
    names = ["a.jpg", "a.txt", "holes.jpg", "z.jpg", "z.txt"]
    subprocess.run(["tar", "--sparse", f"--format={format}", "-cf", "s.tar", *names], cwd=tmp_path, check=True)
    result = scan_shard(tmp_path / "s.tar")
    assert result.keys == [b"a", b"z"]
    assert set(result.problems) <= {"missing_caption"}


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_tars_get_one_clear_line(tmp_path, mode, jpeg, caplog):
    with tarfile.open(tmp_path / "a.tar", mode) as tar:
        info = tarfile.TarInfo("a.jpg")
        info.size = len(jpeg)
        tar.addfile(info, io.BytesIO(jpeg))
    with pytest.raises(ValueError, match="compressed_shard") as caught:
        ShardIndex.build(tmp_path / "a.tar")
    assert "\n" not in str(caught.value)
    (record,) = caplog.records
    assert "unpack to plain .tar" in record.getMessage()


def test_shards_that_are_links_or_closed(tmp_path, tools, jpeg, monkeypatch, caplog):
    """A link to a tar is that tar; one to nothing, or a tar that may not be opened, is left out and named."""
    (tmp_path / "in").mkdir()
    for name in ("a", "closed"):
        tools[2](tmp_path / "in" / f"{name}.tar", pair(name, jpeg))
    (tmp_path / "in" / "link.tar").symlink_to(tools[2](tmp_path / "target", pair("linked", jpeg)))
    (tmp_path / "in" / "nothing.tar").symlink_to(tmp_path / "nowhere.tar")
    open_file = os.open

    def refuse(path, *rest, **options):
        if str(path).endswith("closed.tar"):
            raise PermissionError(13, "Permission denied", str(path))
        return open_file(path, *rest, **options)

    # Root may open anything, so the file's mode would not do.
    monkeypatch.setattr(os, "open", refuse)
    index = ShardIndex.build(tmp_path / "in", cache=False)
    assert [index.key(i) for i in range(len(index))] == ["a", "linked"]
    assert index.problems == {"unreadable_shard": 2}
    assert "closed.tar" in caplog.text and "nothing.tar" in caplog.text
