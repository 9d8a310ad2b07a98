from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from farl_engine.data import ShardWriter, write_shards
from farl_engine.data.shards import expand_paths, scan_shard, split_key
from farl_engine.data.tar_members import walk_members


def members(path: Path) -> list[tuple[bytes, bytes]]:
    fd = os.open(path, os.O_RDONLY)
    try:
        return [(m.name, os.pread(fd, m.size, m.offset)) for m in walk_members(fd)]
    finally:
        os.close(fd)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@settings(max_examples=25, deadline=None)
@given(
    contents=st.lists(
        st.tuples(st.text("abü.-_ 雪", min_size=1, max_size=40), st.integers(0, 60), st.binary(max_size=1500)),
        max_size=6,
    )
)
def test_members_are_those_that_tarfile_sees(tmp_path_factory, format, contents):
    # Long names take the ustar prefix, a GNU L record or a pax record, as the format has it.
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    with tarfile.open(path, "w", format=format) as tar:
        for i, (name, folders, content) in enumerate(contents):
            depth = min(folders, 20) if format == tarfile.USTAR_FORMAT else folders
            info = tarfile.TarInfo("d/" * depth + f"{i}{name}"[:30])
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with tarfile.open(path) as tar:
        expected = [(m.name.encode(), tar.extractfile(m).read()) for m in tar if m.isreg()]
    assert members(path) == expected


def test_links_devices_and_folders_are_passed_over(tmp_path, tools):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in [
            ("a.jpg", tarfile.SYMTYPE),
            ("b.jpg", tarfile.LNKTYPE),
            ("c.jpg", tarfile.CHRTYPE),
            ("d.jpg", tarfile.FIFOTYPE),
            ("e.jpg", tarfile.DIRTYPE),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            # Such members have no data, even where a writer states a size.
            info.size = 700
            tar.addfile(info)
        info = tarfile.TarInfo("f.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    assert members(path) == [(b"f.jpg", b"abc")]


def test_a_size_beyond_octal_digits_is_read():
    info = tarfile.TarInfo("big.jpg")
    info.size = 10 * 2**30
    from farl_engine.data.tar_members import _checked_size

    assert _checked_size(info.tobuf(tarfile.GNU_FORMAT), 0) == 10 * 2**30


@settings(max_examples=300, deadline=None)
@given(st.text("ab./_-ü", max_size=14))
def test_keys_follow_webdataset(name):
    key, extension = base_plus_ext(name)
    ours = split_key(name.encode())
    if key is None:
        assert ours is None
    elif ours is None:
        # webdataset takes a hidden file's folder for its key.
        assert key.endswith("/")
    else:
        assert ours == (key.encode(), extension.lower().encode())


def scan(tmp_path: Path, tools, contents: list[tuple[str, bytes]]):
    return scan_shard(tools[2](tmp_path / "a.tar", contents))


def test_samples_of_an_odd_shard(tmp_path, tools):
    result = scan(
        tmp_path,
        tools,
        [
            ("d.x/good.jpg", b"1"),
            ("apart.png", b"2"),
            ("d.x/good.txt", b"c"),
            ("only-image.jpg", b"3"),
            ("only-text.txt", b"c"),
            ("twice.jpg", b"first"),
            ("twice.jpg", b"second"),
            ("twice.txt", b"c"),
            ("empty.jpg", b""),
            ("empty.txt", b"c"),
            ("no-words.jpg", b"4"),
            ("no-words.txt", b""),
            ("photo.v2.jpg", b"5"),
            ("photo.v2.txt", b"c"),
            ("._apart.png", b"6"),
            ("UPPER.JPG", b"7"),
            ("UPPER.TXT", b"c"),
            ("with-json.webp", b"8"),
            ("with-json.json", b'{"caption": "j"}'),
            ("both.jpg", b"9"),
            ("both.json", b'{"caption": "j"}'),
            ("both.txt", b"t"),
            ("both.mask.png", b"m"),
            ("apart.txt", b"c"),
        ],
    )
    assert result.keys == [b"d.x/good", b"apart", b"twice", b"UPPER", b"with-json", b"both"]
    assert result.flags.tolist() == [0, 0, 0, 0, 1, 0]
    assert result.problems == {
        "missing_caption": 2,
        "missing_image": 1,
        "duplicate_key": 1,
        "empty_image": 1,
        "unknown_extension": 1,
    }


def shard_bytes(tmp_path: Path, tools, count: int = 4) -> bytes:
    contents = [(f"{i}.{e}", bytes(700) if e == "jpg" else b"caption") for i in range(count) for e in ("jpg", "txt")]
    return tools[2](tmp_path / "whole.tar", contents).read_bytes()


@pytest.mark.parametrize(
    ("cut", "keys", "problems"),
    [
        # A sample is 512 + 1024 + 512 + 512 bytes.
        (2560 * 2 + 100, 2, {"truncated_shard": 1}),
        (2560 * 2 + 512 + 300, 2, {"truncated_shard": 1}),
        (2560 * 2 + 512 + 1024, 2, {"truncated_shard": 1, "missing_caption": 1}),
        (2560 * 4, 4, {"truncated_shard": 1}),
        (2560 * 4 + 512, 4, {}),
        (0, 0, {"empty_shard": 1}),
        (300, 0, {"truncated_shard": 1}),
    ],
)
def test_a_truncated_tar_keeps_its_readable_part(tmp_path, tools, caplog, cut, keys, problems):
    path = tmp_path / "cut.tar"
    path.write_bytes(shard_bytes(tmp_path, tools)[:cut])
    result = scan_shard(path)
    assert len(result.keys) == keys
    assert result.problems == problems
    assert ("cut.tar" in caplog.text) == bool(problems)


def test_damage_in_the_middle_keeps_what_lies_before(tmp_path, tools):
    path = tmp_path / "a.tar"
    content = bytearray(shard_bytes(tmp_path, tools))
    content[2560 * 2 + 5] ^= 1
    path.write_bytes(content)
    result = scan_shard(path)
    assert result.keys == [b"0", b"1"] and result.problems == {"corrupt_shard": 1}


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"<html>" * 300, "not_a_tar"),
        (b"\xff" * 600, "not_a_tar"),
        (b"\x1f\x8b" + bytes(range(256)) * 6, "compressed_shard"),
    ],
)
def test_files_that_are_no_tars(tmp_path, content, cause):
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    result = scan_shard(path)
    assert result.keys == [] and result.problems == {cause: 1}


def test_a_missing_shard_is_a_problem_not_an_error(tmp_path):
    assert scan_shard(tmp_path / "none.tar").problems == {"unreadable_shard": 1}


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2560 * 3), st.binary(min_size=1, max_size=40))
def test_hostile_bytes_never_raise(tmp_path_factory, position, garbage):
    base = tmp_path_factory.getbasetemp() / "hostile.tar"
    if not base.exists():
        with tarfile.open(base, "w", format=tarfile.PAX_FORMAT) as tar:
            for name in ("a" * 120 + ".jpg", "ü.txt", "c.jpg"):
                info = tarfile.TarInfo(name)
                info.size = 5
                tar.addfile(info, io.BytesIO(b"12345"))
    content = bytearray(base.read_bytes())
    content[position : position + len(garbage)] = garbage
    path = base.with_name("hostile-now.tar")
    path.write_bytes(content)
    scan_shard(path)


def test_patterns(tmp_path, make_shards):
    make_shards([1, 1, 1])
    expected = [tmp_path / f"train-{i:04d}.tar" for i in range(3)]
    assert expand_paths(str(tmp_path / "train-*.tar")) == expected
    assert expand_paths(tmp_path) == expected
    assert expand_paths(f"{tmp_path}/train-{{0000..0001}}.tar") == expected[:2]
    assert expand_paths([expected[2], expected[0], str(expected[2])]) == [expected[0], expected[2]]
    with pytest.raises(ValueError, match="no shard matches"):
        expand_paths(str(tmp_path / "test-*.tar"))
    with pytest.raises(ValueError, match="train-0003"):
        expand_paths(f"{tmp_path}/train-{{0002..0003}}.tar")
    with pytest.raises(ValueError, match=r"the range \{0002\.\.0000\} in .* is empty"):
        expand_paths(f"{tmp_path}/train-{{0002..0000}}.tar")
    with pytest.raises(ValueError, match="no shards given"):
        expand_paths([])


def samples(count: int) -> list[dict[str, object]]:
    return [
        {
            "key": f"{i:05d}",
            "image": bytes([i]) * 9,
            "image_ext": "png",
            "caption": f"ü {i}",
            "extra": {"mask.png": b"m"},
        }
        for i in range(count)
    ]


def test_written_shards_read_back_and_are_the_same_bytes(tmp_path):
    paths = write_shards(samples(5), tmp_path / "out" / "train-%03d.tar", 2)
    assert [path.name for path in paths] == ["train-000.tar", "train-001.tar", "train-002.tar"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [path.name for path in paths]
    assert [scan_shard(path).keys for path in paths] == [[b"00000", b"00001"], [b"00002", b"00003"], [b"00004"]]
    assert (b"00004.mask.png", b"m") in members(paths[2])
    again = write_shards(samples(5), tmp_path / "again" / "train-%03d.tar", 2)
    assert [a.read_bytes() for a in again] == [p.read_bytes() for p in paths]


def test_an_interrupted_writer_leaves_no_half_shard(tmp_path):
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path / "t-%d.tar", 2) as writer:
        for i in range(3):
            writer.write(str(i), {"jpg": b"1", "txt": "c"})
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["t-0.tar"]


@pytest.mark.parametrize("samples_per_shard", [1, 10])
def test_a_full_disk_leaves_no_half_shard(tmp_path, monkeypatch, samples_per_shard):
    opened = []

    def open_full(self, *args, **kwargs):
        self.touch()
        opened.append(open("/dev/full", "wb"))  # noqa: PTH123, SIM115
        return opened[-1]

    monkeypatch.setattr(Path, "open", open_full)
    # The shard is full at the second write, or ends with the block.
    with pytest.raises(OSError, match="No space left"), ShardWriter(tmp_path / "t-%d.tar", samples_per_shard) as writer:
        for i in range(2):
            writer.write(str(i), {"jpg": b"1", "txt": "c"})
    assert not list(tmp_path.iterdir()) and opened[0].closed


@pytest.mark.parametrize("key", ["a.b", "", "d/.x"])
def test_keys_that_would_not_read_back_are_refused(tmp_path, key):
    with ShardWriter(tmp_path / "t-%d.tar") as writer, pytest.raises(ValueError, match="key must"):
        writer.write(key, {"jpg": b"1", "txt": "c"})


@pytest.mark.parametrize("pattern", ["train.tar", "t-%s.tar", "t-%d-%d.tar"])
def test_wrong_patterns_are_refused(tmp_path, pattern):
    with pytest.raises(ValueError, match="one field like %06d"):
        ShardWriter(tmp_path / pattern)
