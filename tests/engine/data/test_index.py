from __future__ import annotations

import io
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farl_engine.data import ShardIndex, array_file, shard_files


def cache_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.farl-index"))


def contents(index: ShardIndex) -> list[tuple[str, bytes, bytes]]:
    return [(index.key(i), *index.read(i)) for i in range(len(index))]


def test_ids_are_positions_in_the_sorted_shards(tmp_path, make_shards):
    paths = make_shards([3, 1, 2])
    index = ShardIndex.build(list(reversed(paths)))
    assert len(index) == 6
    assert [index.key(i) for i in range(6)] == [f"{i:06d}" for i in range(6)]
    assert [index.shard_of(i) for i in range(6)] == [0, 0, 0, 1, 2, 2]
    assert index.shard_names == [path.name for path in paths]
    assert [index.read(i)[1] for i in range(6)] == [f"caption {i}".encode() for i in range(6)]
    assert index.problems == {} and index.excluded == 0
    for i in (-1, 6):
        with pytest.raises(IndexError):
            index.read(i)


KEY = st.text("abcü雪_-0123", min_size=1, max_size=60)


@settings(max_examples=30, deadline=None)
@given(
    shards=st.lists(
        st.dictionaries(KEY, st.tuples(st.binary(min_size=1, max_size=900), st.text(min_size=1, max_size=300))),
        min_size=1,
        max_size=3,
    ),
    format=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    seed=st.integers(0, 1000),
)
def test_what_was_written_is_read(tmp_path_factory, shards, format, seed):
    folder = tmp_path_factory.mktemp("round")
    rng = np.random.default_rng(seed)
    expected = []
    for number, shard in enumerate(shards):
        members = [
            (f"{key}.{ext}", data)
            for key, pair in shard.items()
            for ext, data in zip(("jpg", "txt"), pair, strict=True)
        ]
        order = rng.permutation(len(members))
        first_seen = list(dict.fromkeys(members[i][0].rsplit(".", 1)[0] for i in order))
        expected += [(key, shard[key][0], shard[key][1].encode()) for key in first_seen]
        with tarfile.open(folder / f"s{number}.tar", "w", format=format) as tar:
            for i in order:
                name, data = members[i]
                data = data.encode() if isinstance(data, str) else data
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    if not expected:
        with pytest.raises(ValueError, match="no samples in"):
            ShardIndex.build(folder)
        return
    fresh = ShardIndex.build(folder)
    kept = ShardIndex.build(folder)
    assert contents(fresh) == contents(kept) == expected
    assert fresh.fingerprint == kept.fingerprint
    shutil.rmtree(folder)


def test_the_index_is_kept_beside_the_shards(tmp_path, make_shards, monkeypatch):
    paths = make_shards([2, 3])
    index = ShardIndex.build(paths)
    (cache,) = cache_files(tmp_path)
    assert cache.name.startswith("train-")
    assert cache.stat().st_mode & 0o777 == 0o644

    def no_scan(path):
        raise AssertionError("scanned although an index is kept")

    monkeypatch.setattr("farl_engine.data.index_scan.scan_shard", no_scan)
    again = ShardIndex.build(str(tmp_path / "*.tar"))
    assert contents(again) == contents(index)
    # Other shards of the folder have an index of their own.
    monkeypatch.undo()
    assert len(ShardIndex.build(paths[:1])) == 2
    assert len(cache_files(tmp_path)) == 2


def test_a_changed_shard_is_scanned_again(tmp_path, make_shards, tools):
    paths = make_shards([2, 3])
    before = ShardIndex.build(paths)
    tools[2](paths[0], [("x.jpg", b"1"), ("x.txt", b"c")])
    after = ShardIndex.build(paths)
    assert len(after) == 4 and after.key(0) == "x" and after.fingerprint != before.fingerprint
    # Same size, new time: the bytes may have moved.
    tools[2](paths[0], [("y.jpg", b"1"), ("y.txt", b"c")])
    os.utime(paths[0], ns=(1, 1))
    assert ShardIndex.build(paths).key(0) == "y"


@pytest.mark.parametrize("place", [0, 9, 30, 400, -1, "cut", "empty", "huge header", "array"])
def test_a_damaged_index_is_rebuilt(tmp_path, make_shards, caplog, place):
    paths = make_shards([2, 3])
    index = ShardIndex.build(paths)
    (cache,) = cache_files(tmp_path)
    content = bytearray(cache.read_bytes())
    if place == "cut":
        content = content[:-70]
    elif place == "empty":
        content = bytearray()
    elif place == "huge header":
        content[8:16] = b"\xff" * 8
    elif place == "array":
        content[content.index(b"000000000001")] ^= 0x10
    else:
        content[place] ^= 0x10
    # The last byte may be padding, which no check needs to cover; then the index is simply used.
    # A new file: `index` reads from the old one.
    cache.unlink()
    cache.write_bytes(content)
    again = ShardIndex.build(paths)
    assert contents(again) == contents(index) and again.fingerprint == index.fingerprint
    if place != -1:
        assert "cannot be used" in caplog.text
        caplog.clear()
        ShardIndex.build(paths)
        assert "cannot be used" not in caplog.text


def test_a_pickle_in_the_index_is_never_run(tmp_path, make_shards):
    import pickle

    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "attacked",))

    paths = make_shards([2])
    ShardIndex.build(paths)
    (cache,) = cache_files(tmp_path)
    cache.write_bytes(pickle.dumps(Attack()))
    assert len(ShardIndex.build(paths)) == 2
    assert not (tmp_path / "attacked").exists()


def test_the_fingerprint_is_of_the_data_alone(tmp_path, make_shards, tools):
    paths = make_shards([2, 3])
    index = ShardIndex.build(paths)
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for path in paths:
        shutil.copy(path, copy / path.name.replace("train", "moved"))
    assert ShardIndex.build(copy).fingerprint == index.fingerprint
    tools[2](copy / "more.tar", [("x.jpg", b"1"), ("x.txt", b"c")])
    assert ShardIndex.build(copy).fingerprint != index.fingerprint


def test_checkpoints_of_earlier_versions_find_their_data(tmp_path, tools, caplog):
    """They hold this fingerprint; beside the shards lies an index of another version, which is replaced in silence."""
    tools[2](
        tmp_path / "s-0.tar",
        [("a/é.jpg", b"12345"), ("a/é.txt", b"words"), ("b.png", b"1" * 700), ("b.json", b'{"caption": "x"}')],
    )
    tools[2](tmp_path / "s-1.tar", [("c.jpg", b"1"), ("c.txt", b"c"), ("d.jpg", b"")])
    ShardIndex.build(tmp_path)
    (cache,) = cache_files(tmp_path)
    meta, arrays = array_file.read(cache)
    array_file.write(cache, {**meta, "version": 1, "fingerprint": "old"}, arrays)
    assert ShardIndex.build(tmp_path).fingerprint == "3d4c587b7520635b5499237a8de29004"
    assert not caplog.text and cache_files(tmp_path) == [cache]


def test_a_folder_that_cannot_be_written_is_no_failure(tmp_path, make_shards, caplog, monkeypatch):
    paths = make_shards([2])

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    # Tests often run as root, for whom no folder is read-only.
    monkeypatch.setattr("farl_engine.data.array_file.tempfile.mkstemp", refuse)
    assert len(ShardIndex.build(paths)) == 2
    assert "not kept" in caplog.text and not cache_files(tmp_path)


def test_a_shard_that_cannot_be_read_once_is_read_the_next_time(tmp_path, make_shards, monkeypatch):
    paths = make_shards([2, 3])
    real = os.open

    def fail(path, *args, **kwargs):
        if path == paths[1]:
            raise OSError(5, "Input/output error", str(path))
        return real(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("farl_engine.data.shards.os.open", fail)
        index = ShardIndex.build(paths)
        assert len(index) == 2 and index.problems == {"unreadable_shard": 1}
    assert not cache_files(tmp_path)
    assert len(ShardIndex.build(paths)) == 5


def test_several_ranks_may_build_at_once(tmp_path, make_shards):
    paths = make_shards([20, 20, 20], side=8)
    barrier = threading.Barrier(6)

    def build(_: int) -> str:
        barrier.wait()
        return ShardIndex.build(paths).fingerprint

    with ThreadPoolExecutor(6) as pool:
        assert len(set(pool.map(build, range(6)))) == 1
    assert [path.suffix for path in tmp_path.iterdir() if path.suffix != ".tar"] == [".farl-index"]
    assert len(ShardIndex.build(paths)) == 60


def test_problems_are_counted_by_cause_and_shard(tmp_path, make_shards, tools, caplog):
    make_shards([3])
    # 512 bytes a header and 512 the contents: cut right after the second image.
    cut = tools[2](tmp_path / "train-0001.tar", [(f"{i}.{ext}", b"1") for i in range(3) for ext in ("jpg", "txt")])
    os.truncate(cut, 2048 + 1024)
    (tmp_path / "zero.tar").touch()
    # A sample split over two tars counts as missing in both.
    tools[2](tmp_path / "half-a.tar", [("s.jpg", b"1")])
    tools[2](tmp_path / "half-b.tar", [("s.txt", b"c"), ("t.jpg", b"1"), ("t.txt", b"c"), ("t.txt", b"c")])
    with caplog.at_level(logging.WARNING):
        index = ShardIndex.build(tmp_path)
    for _ in range(2):
        assert index.problems.pop("missing_caption") == 2
        assert index.problems == {"truncated_shard": 1, "empty_shard": 1, "missing_image": 1, "duplicate_key": 1}
        assert index.problems_by_shard["half-b.tar"] == {"missing_image": 1, "duplicate_key": 1}
        assert index.excluded_by_shard["half-b.tar"] == 2 and index.excluded_by_shard["half-a.tar"] == 1
        assert "zero.tar" in index.problems_by_shard and "train-0000.tar" not in index.problems_by_shard
        assert index.excluded == sum(index.excluded_by_shard.values())
        index = ShardIndex.build(tmp_path)
    assert "train-0001.tar" in caplog.text and "zero.tar" in caplog.text


def test_shards_without_samples_are_refused_with_the_reason(tmp_path, tools):
    tools[2](tmp_path / "a.tar", [("photo.v2.jpg", b"1"), ("x.jpg", b"1")])
    with pytest.raises(ValueError, match=r"no samples in 1 shards.*missing_caption 1, unknown_extension 1"):
        ShardIndex.build(tmp_path)


def test_json_captions(tmp_path, tools):
    captions = {"a": b'{"caption": "\\u00fc"}', "b": b"[1]", "c": b"{", "d": b'{"caption": 3}', "e": b"[" * 100_000}
    members = [(f"{key}.{ext}", data) for key in captions for ext, data in (("jpg", b"1"), ("json", captions[key]))]
    tools[2](tmp_path / "a.tar", members)
    index = ShardIndex.build(tmp_path)
    assert [index.read(i)[1] for i in range(5)] == ["ü".encode(), b"", b"", b"", b""]


def test_image_and_caption_far_apart(tmp_path, tools):
    tools[2](tmp_path / "a.tar", [("a.jpg", b"image"), ("a.mask.png", bytes(50_000)), ("a.txt", b"words")])
    assert ShardIndex.build(tmp_path).read(0) == (b"image", b"words")


def test_concatenated_indexes(tmp_path, make_shards):
    first = ShardIndex.build(make_shards([2, 1], name="a"))
    second = ShardIndex.build(make_shards([1, 3], name="b"))
    both = ShardIndex.concatenate([second, first])
    assert contents(both) == contents(second) + contents(first)
    assert [both.shard_names[both.shard_of(i)] for i in (0, 1, 4, 6)] == [
        "b-0000.tar",
        "b-0001.tar",
        "a-0000.tar",
        "a-0001.tar",
    ]
    assert both.fingerprint not in (first.fingerprint, second.fingerprint)
    assert both.parts == [second, first] and first.parts == [first]
    # Together they keep as many files open as one alone.
    assert first._files.max_open == second._files.max_open == shard_files.ShardFiles([]).max_open // 2
    for i in (-1, 7):
        with pytest.raises(IndexError):
            both.read(i)


def test_problems_of_concatenated_indexes(tmp_path, make_shards, tools):
    good = ShardIndex.build(make_shards([2, 1]))
    tools[2](tmp_path / "bad.tar", [("a.jpg", b"1"), ("b.jpg", b"1"), ("b.txt", b"c")])
    both = ShardIndex.concatenate([good, ShardIndex.build(tmp_path / "bad.tar")])
    assert both.problems == {"missing_caption": 1} and both.excluded_by_shard == {"bad.tar": 1} and both.excluded == 1
    # One shard in two sources of a mix: its samples count twice, and so do those that it lacks.
    twice = ShardIndex.concatenate([ShardIndex.build(tmp_path / "bad.tar") for _ in range(2)])
    assert len(twice) == 2 and twice.problems == {"missing_caption": 2} and twice.excluded == 2


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_reads_from_many_threads_with_few_open_files(tmp_path, make_shards):
    index = ShardIndex.build(make_shards([4] * 12, side=8))
    before = open_files()
    index._files = shard_files.ShardFiles(index.shard_paths, max_open=2)
    expected = [index.read(i) for i in range(48)]

    def read(i: int) -> bool:
        return index.read(i % 48) == expected[i % 48]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(3000)))
    assert len(index._files._open) <= 2 and open_files() <= before + 2


def test_open_files_end_with_the_index(tmp_path, make_shards):
    before = open_files()
    index = ShardIndex.build(make_shards([1] * 5))
    for i in range(5):
        index.read(i)
    index.close()
    assert index.read(0)[1] == b"caption 0"
    del index
    assert open_files() <= before


def test_a_shard_that_vanishes_is_retried_and_then_given_up(tmp_path, make_shards, monkeypatch):
    paths = make_shards([2, 2])
    index = ShardIndex.build(paths)
    sleeps: list[float] = []
    monkeypatch.setattr(shard_files.time, "sleep", sleeps.append)
    paths[1].unlink()
    with pytest.raises(OSError, match=r"train-0001\.tar"):
        index.read(2)
    assert len(sleeps) == 3
    with pytest.raises(OSError, match="moments ago"):
        index.read(3)
    assert len(sleeps) == 3
    assert index.read(0)[1] == b"caption 0"
    # Later it is tried once more, without patience.
    now = shard_files.time.monotonic()
    monkeypatch.setattr(shard_files.time, "monotonic", lambda: now + 40)
    with pytest.raises(FileNotFoundError):
        index.read(3)
    assert len(sleeps) == 3


def test_a_shard_that_vanishes_while_it_is_open_stays_readable(tmp_path, make_shards):
    paths = make_shards([2, 2])
    index = ShardIndex.build(paths)
    index.read(2)
    paths[1].unlink()
    assert index.read(3)[1] == b"caption 3"


def test_a_slow_open_does_not_hold_up_other_shards(make_shards, monkeypatch):
    paths = make_shards([1, 1], side=8)
    index = ShardIndex.build(paths)
    opening, go_on = threading.Event(), threading.Event()
    real = os.open

    def slow(path, *args, **kwargs):
        if path == paths[1]:
            opening.set()
            assert go_on.wait(10)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(shard_files.os, "open", slow)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(index.read, 1) for _ in range(2)]
        assert opening.wait(10)
        assert index.read(0)[1] == b"caption 0"
        go_on.set()
        assert [future.result()[1] for future in waiting] == [b"caption 1"] * 2
    assert len(index._files._open) == 2


def test_as_many_files_stay_open_as_the_limit_allows(monkeypatch):
    for limit, allowed in ((1024, 256), (1 << 20, 16_384), (20, 16), (shard_files.resource.RLIM_INFINITY, 16_384)):
        monkeypatch.setattr(shard_files.resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert shard_files.ShardFiles([]).max_open == allowed


def test_a_shard_that_comes_back_is_read(tmp_path, make_shards, monkeypatch):
    paths = make_shards([2])
    index = ShardIndex.build(paths)
    hidden = paths[0].rename(tmp_path / "hidden")
    monkeypatch.setattr(shard_files.time, "sleep", lambda _: hidden.exists() and hidden.rename(paths[0]))
    assert index.read(1)[1] == b"caption 1"
    # Cut short under an open descriptor: reopened, and an error rather than half an image.
    monkeypatch.setattr(shard_files.time, "sleep", lambda _: None)
    os.truncate(paths[0], 1000)
    with pytest.raises(OSError, match="only 0 of"):
        index.read(1)


def test_index_and_order_need_no_torch():
    code = (
        "import sys, farl_engine.data as d; d.ShardIndex, d.SampleOrder, d.CropPlan; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
