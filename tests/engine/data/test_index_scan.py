"""A scan goes on where it was interrupted, and takes from other indexes what it can."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from farl_engine.data import SampleOrder, ShardIndex, index_scan


class Bar:
    """What a command passes as `progress`."""

    def __init__(self, total: int, description: str, *, unit: str) -> None:
        self.facts, self.steps, self.closed = (total, description, unit), [], False
        bars.append(self)

    def update(self, count: int = 1) -> None:
        self.steps.append(count)

    def close(self) -> None:
        self.closed = True


bars: list[Bar] = []


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that were scanned."""
    names: list[str] = []
    real = index_scan.scan

    def scan(path: Path) -> Any:
        names.append(path.name)
        return real(path)

    monkeypatch.setattr(index_scan, "scan", scan)
    return names


def contents(index: ShardIndex) -> list[tuple[str, bytes, bytes]]:
    return [(index.key(i), *index.read(i)) for i in range(len(index))]


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob(".*.part-*"))


def test_a_set_that_grew_is_scanned_where_it_is_new(tmp_path, make_shards, tools, scanned):
    make_shards([2, 3, 1], side=8)
    ShardIndex.build(tmp_path)
    # New shards before, between and behind the known ones, and a known one that changed.
    for name in ("a", "train-0000b", "z"):
        tools[2](tmp_path / f"{name}.tar", [(f"{name}.jpg", b"1"), (f"{name}.txt", name.encode())])
    tools[2](tmp_path / "train-0002.tar", [("new.jpg", b"12"), ("new.txt", b"c")])
    scanned.clear()
    grown = ShardIndex.build(tmp_path)
    assert sorted(scanned) == ["a.tar", "train-0000b.tar", "train-0002.tar", "z.tar"]
    fresh = ShardIndex.build(tmp_path, cache=False)
    assert contents(grown) == contents(fresh) and grown.fingerprint == fresh.fingerprint
    scanned.clear()
    assert ShardIndex.build(tmp_path).fingerprint == fresh.fingerprint and not scanned


@pytest.mark.parametrize("keep_seconds", [0.0, 1000.0])
def test_an_interrupted_scan_goes_on(tmp_path, make_shards, monkeypatch, scanned, keep_seconds):
    paths = make_shards([1, 2, 1, 2, 1, 2], side=8)
    monkeypatch.setattr(index_scan, "_KEEP_SECONDS", keep_seconds)
    monkeypatch.setattr(index_scan, "_THREADS", 1)
    real = index_scan.scan

    def interrupted(path: Path) -> Any:
        if path == paths[4]:
            raise KeyboardInterrupt
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(index_scan, "scan", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ShardIndex.build(tmp_path)
    assert parts(tmp_path) and not list(tmp_path.glob("*.farl-index"))
    scanned.clear()
    bars.clear()
    index = ShardIndex.build(tmp_path, progress=Bar)
    assert scanned == ["train-0004.tar", "train-0005.tar"]
    assert contents(index) == contents(ShardIndex.build(tmp_path, cache=False))
    assert not parts(tmp_path)
    (bar,) = bars
    assert bar.facts == (6, "index", "shards") and bar.steps == [4, 1, 1] and bar.closed


def test_a_damaged_part_is_scanned_again(tmp_path, make_shards, monkeypatch, scanned):
    paths = make_shards([2, 3], side=8)
    paths[1].rename(tmp_path / "hidden")
    monkeypatch.setattr(index_scan, "remove_parts", lambda path: None)
    with monkeypatch.context() as patch:
        patch.setattr(index_scan, "_KEEP_SECONDS", 0.0)
        ShardIndex.build(tmp_path)
    for path in (*parts(tmp_path), *tmp_path.glob("*.farl-index")):
        path.write_bytes(path.read_bytes()[:-9] + b"123456789"[: path.stat().st_size % 9 + 1])
    (tmp_path / "hidden").rename(paths[1])
    scanned.clear()
    assert len(ShardIndex.build(tmp_path)) == 5
    assert sorted(scanned) == ["train-0000.tar", "train-0001.tar"]


def test_only_the_shard_that_could_not_be_read_is_tried_again(tmp_path, make_shards, monkeypatch, scanned):
    paths = make_shards([2, 3, 1], side=8)
    real = index_scan.scan_shard

    def unreadable(path: Path) -> Any:
        return real(tmp_path / "none.tar" if path == paths[1] else path)

    with monkeypatch.context() as patch:
        patch.setattr(index_scan, "scan_shard", unreadable)
        for _ in range(2):
            scanned.clear()
            assert ShardIndex.build(tmp_path).problems == {"unreadable_shard": 1}
        assert scanned == ["train-0001.tar"]
    assert len(ShardIndex.build(tmp_path)) == 6
    assert not parts(tmp_path)


def test_shards_are_scanned_side_by_side(tmp_path, make_shards, monkeypatch):
    make_shards([1] * 4, side=8)
    together = threading.Barrier(4, timeout=10)
    real = index_scan.scan

    def scan(path: Path) -> Any:
        together.wait()
        return real(path)

    monkeypatch.setattr(index_scan, "scan", scan)
    assert len(ShardIndex.build(tmp_path)) == 4


def test_a_shard_beyond_two_tebibytes_is_refused(tmp_path, monkeypatch):
    import numpy as np

    from farl_engine.data.shards import ShardScan

    one = np.array([1 << 41])
    monkeypatch.setattr(
        index_scan, "scan_shard", lambda path: ShardScan([b"k"], one, one, one, one, one.astype(np.uint8))
    )
    with pytest.raises(ValueError, match=r"x\.tar is larger than 2 TiB: split it"):
        index_scan.scan(tmp_path / "x.tar")


def test_parts_of_an_index_with_brackets_in_its_name_are_removed(tmp_path):
    for name in ("[ab]", "a"):
        (tmp_path / f".{name}.farl-index.part-1").touch()
    index_scan.remove_parts(tmp_path / "[ab].farl-index")
    assert [path.name for path in parts(tmp_path)] == [".a.farl-index.part-1"]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shards=st.sampled_from([1, 3, 7]),
    awkward=st.lists(st.integers(0, 9), min_size=7, max_size=7),
    global_batch=st.integers(1, 23),
    seed=st.integers(0, 2**32),
)
def test_each_sample_of_any_shards_comes_once_an_epoch(tmp_path_factory, tools, shards, awkward, global_batch, seed):
    folder = tmp_path_factory.mktemp("epoch")
    sizes = [awkward[0] + 1, *awkward[1:shards]]
    expected = []
    for number, size in enumerate(sizes):
        keys = [f"{number}-{i}" for i in range(size)]
        expected += keys
        tools[2](folder / f"{number}.tar", [(f"{key}.{ext}", b"1") for key in keys for ext in ("jpg", "txt")])
    index = ShardIndex.build(folder)
    assert len(index.shard_names) == shards
    order = SampleOrder(len(index), global_batch, seed)
    steps = -(-2 * len(index) // global_batch)
    keys = [index.key(i) for step in range(steps) for i in order.ids(step)]
    for epoch in range(2):
        assert sorted(keys[epoch * len(index) : (epoch + 1) * len(index)]) == sorted(expected)
