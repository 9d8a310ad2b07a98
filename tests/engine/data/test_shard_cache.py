"""Copies of remote shards: whole or not there, counted, evicted when nobody needs them, shared by processes."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from farl_engine.data import ShardIndex, shard_cache
from farl_engine.data.remote import RemoteShardError
from farl_engine.data.shard_cache import ShardCache

FETCH = "import sys; from farl_engine.data.shard_cache import ShardCache; c = ShardCache(sys.argv[1]); "


def contents(index: ShardIndex) -> list[tuple[str, bytes, bytes]]:
    return [(index.key(i), *index.read(i)) for i in range(len(index))]


def files(folder: Path, pattern: str = "*.tar") -> list[str]:
    return sorted(path.name for path in folder.rglob(pattern))


@pytest.fixture
def served(flaky_server, make_shards):
    """Three shards on a server; 12,288 bytes or so each."""
    for path in make_shards([4, 3, 4]):
        flaky_server.files[path.name] = path.read_bytes()
    return flaky_server


def test_remote_shards_are_read_like_local_ones(served, tmp_path, make_shards):
    pattern = served.url("train-{0000..0002}.tar")
    cache = ShardCache(str(tmp_path / "cache"))
    index = ShardIndex.build(pattern, shard_cache=cache)
    local = ShardIndex.build(tmp_path / "train-*.tar")
    assert contents(index) == contents(local) and index.fingerprint == local.fingerprint
    assert index.shard_names == local.shard_names
    assert Counter(served.requests) == {f"{m} train-000{i}.tar": 1 for i in range(3) for m in ("GET", "HEAD")}
    assert len(list((tmp_path / "cache").glob("*.farl-index"))) == 1
    # Local and remote shards in one set; the order is that of the names, whoever serves them.
    both = ShardIndex.build([pattern, tmp_path / "train-0001.tar"], shard_cache=cache)
    assert len(both) == 14 and both.shard_names[0].endswith("train-0001.tar")


def test_a_later_start_needs_no_network(served, tmp_path, monkeypatch):
    pattern = served.url("train-{0000..0002}.tar")
    before = ShardIndex.build(pattern, shard_cache=ShardCache(f"{tmp_path}/cache"))
    served.requests.clear()
    monkeypatch.setattr("farl_engine.data.index_scan.scan", None)
    again = ShardIndex.build(pattern, shard_cache=ShardCache(f"{tmp_path}/cache"))
    assert contents(again) == contents(before) and not served.requests


def test_sets_of_the_same_names_have_indexes_of_their_own(served, tmp_path):
    cache = ShardCache(f"{tmp_path}/cache")
    served.files["b/train-0000.tar"] = served.files["train-0001.tar"]
    urls = [served.url("train-0000.tar"), served.url("b/train-0000.tar")]
    assert [len(ShardIndex.build(url, shard_cache=cache)) for url in urls] == [4, 3]
    assert len(ShardIndex.build(urls, shard_cache=cache)) == 7
    assert len(files(tmp_path / "cache", "*.farl-index")) == 3


def test_without_a_cache_remote_shards_are_refused(served):
    with pytest.raises(ValueError, match=r"train-0000\.tar is not on this machine: name a folder .* --shard-cache"):
        ShardIndex.build(served.url("train-0000.tar"))


def test_a_failed_start_keeps_what_it_has(served, tmp_path):
    served.faults["train-0001.tar"] = ["", "404"]
    cache = ShardCache(f"{tmp_path}/cache")
    with pytest.raises(RemoteShardError, match=r"train-0001\.tar cannot be fetched: the server says 404 Not Found"):
        ShardIndex.build(served.url("train-{0000..0002}.tar"), shard_cache=cache)
    assert not files(tmp_path / "cache", "*.part")
    kept = files(tmp_path / "cache")
    served.requests.clear()
    assert len(ShardIndex.build(served.url("train-{0000..0002}.tar"), shard_cache=cache)) == 11
    assert len(served.requests) == 2 * (3 - len(kept))


def test_a_missing_shard_is_known_before_anything_is_copied(served, tmp_path):
    with pytest.raises(RemoteShardError, match=r"train-0003\.tar"):
        ShardCache(f"{tmp_path}/cache").fetch([served.url(f"train-000{i}.tar") for i in range(4)])
    assert not any(request.startswith("GET") for request in served.requests)


def test_a_set_that_does_not_fit_is_refused_before_anything_is_copied(served, tmp_path):
    with pytest.raises(ValueError, match=r"the shards need 51\.2 KB, but the shard cache .* may hold 20\.0 KB: "):
        ShardIndex.build(served.url("train-{0000..0002}.tar"), shard_cache=ShardCache(f"{tmp_path}/cache:20KB"))
    assert not any(request.startswith("GET") for request in served.requests)
    assert not files(tmp_path / "cache")


def test_a_full_disk_is_seen_before_anything_is_copied(served, tmp_path, monkeypatch):
    usage = shard_cache.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shard_cache.shutil, "disk_usage", lambda _: usage._replace(free=usage.total // 20 + 5000))
    with pytest.raises(RemoteShardError, match=r"may hold 5\.0 KB"):
        ShardCache(f"{tmp_path}/cache:1TB").fetch([served.url("train-0000.tar")])


def size_of(served, *numbers: int) -> int:
    return sum(len(served.files[f"train-000{i}.tar"]) for i in numbers)


def test_the_least_recently_used_is_evicted_and_none_in_use(served, tmp_path):
    urls = [served.url(f"train-000{i}.tar") for i in range(3)]
    room = f"{tmp_path}/cache:{size_of(served, 0, 1, 2) / 1000 - 1}KB"
    first = ShardCache(room)
    first.fetch(urls[:2])
    for number, path in enumerate(first.fetch(urls[:2]).values()):
        # Used long ago, the second one longer.
        os.utime(path.with_name(path.name + ".json"), (1000 - number, 1000 - number))
    with pytest.raises(RemoteShardError, match="in use by other runs"):
        ShardCache(room).fetch(urls[2:])
    first.close()
    second = ShardCache(room)
    second.fetch(urls[2:])
    assert files(tmp_path / "cache") == ["train-0000.tar", "train-0002.tar"]
    # The one in use stays, the other gives way, although it was used later.
    os.utime(second.path_of(urls[0]).with_name("train-0000.tar.json"))
    os.utime(second.path_of(urls[2]).with_name("train-0002.tar.json"), (1, 1))
    ShardCache(room).fetch(urls[1:2])
    assert files(tmp_path / "cache") == ["train-0001.tar", "train-0002.tar"]


def test_what_is_there_is_not_evicted_while_the_rest_is_asked_for(served, tmp_path, monkeypatch):
    urls = [served.url(f"train-000{i}.tar") for i in range(3)]
    room = f"{tmp_path}/cache:{size_of(served, 0, 1, 2) / 1000 - 1}KB"
    ShardCache(room).fetch(urls[:1])
    real = shard_cache.remote.ask

    def ask(url, stop):
        with monkeypatch.context() as patch:
            patch.setattr(shard_cache.remote, "ask", real)
            with pytest.raises(RemoteShardError, match="in use by other runs"):
                ShardCache(room).fetch(urls[1:])
        return real(url, stop)

    monkeypatch.setattr(shard_cache.remote, "ask", ask)
    ShardCache(room).fetch(urls[:2])
    assert files(tmp_path / "cache") == ["train-0000.tar", "train-0001.tar"]


def test_a_leftover_that_is_removed_before_it_is_locked_is_made_again(served, tmp_path, monkeypatch):
    cache = ShardCache(f"{tmp_path}/cache")
    part, removed = shard_cache._part_path(cache.path_of(served.url("train-0000.tar"))), []
    real = shard_cache._try_lock

    def lock(file):
        if part.exists() and not removed:
            removed.append(part.unlink())
        return real(file)

    monkeypatch.setattr(shard_cache, "_try_lock", lock)
    (path,) = cache.fetch([served.url("train-0000.tar")]).values()
    assert removed and path.read_bytes() == served.files["train-0000.tar"]


def test_a_shard_that_changed_is_scanned_again_and_said_so(served, tmp_path, caplog, tools):
    url = served.url("train-0000.tar")
    cache = ShardCache(f"{tmp_path}/cache")
    before = ShardIndex.build(url, shard_cache=cache)
    cache.path_of(url).unlink()
    other = tools[2](tmp_path / "other.tar", [("x.jpg", b"1"), ("x.txt", b"c")])
    served.files["train-0000.tar"], served.tags["train-0000.tar"] = other.read_bytes(), '"2"'
    with caplog.at_level(logging.WARNING):
        after = ShardIndex.build(url, shard_cache=cache)
    assert "train-0000.tar has changed since it was last fetched" in caplog.text
    assert after.key(0) == "x" and after.fingerprint != before.fingerprint


def test_a_shard_that_was_cut_by_hand_is_fetched_again(served, tmp_path):
    url = served.url("train-0000.tar")
    cache = ShardCache(f"{tmp_path}/cache")
    (path,) = cache.fetch([url]).values()
    whole = path.read_bytes()
    os.truncate(path, 512)
    cache.fetch([url])
    assert path.read_bytes() == whole


def test_a_copy_that_vanishes_is_a_bad_shard_not_a_crash(served, tmp_path, monkeypatch):
    index = ShardIndex.build(served.url("train-{0000..0002}.tar"), shard_cache=ShardCache(f"{tmp_path}/cache"))
    monkeypatch.setattr("farl_engine.data.shard_files.time.sleep", lambda _: None)
    index.shard_paths[1].unlink()
    with pytest.raises(OSError, match=r"train-0001\.tar"):
        index.read(4)
    assert index.read(0)[1] == b"caption 0"


def test_threads_and_processes_copy_each_shard_once(served, tmp_path):
    for i in range(12):
        served.files[f"many-{i}.tar"] = bytes([i]) * 20_000
    urls = [served.url(f"many-{i}.tar") for i in range(12)]
    place = f"{tmp_path}/cache:300KB"
    command = [sys.executable, "-c", FETCH + "c.fetch(sys.argv[2:])", place, *urls]
    others = [subprocess.Popen(command) for _ in range(2)]
    with ThreadPoolExecutor(4) as pool:
        caches = [ShardCache(place) for _ in range(4)]
        for paths in pool.map(lambda cache: cache.fetch(urls), caches):
            assert [path.read_bytes()[:1] for path in paths.values()] == [bytes([i]) for i in range(12)]
    assert [process.wait() for process in others] == [0, 0]
    gets = Counter(request for request in served.requests if request.startswith("GET"))
    assert gets == {f"GET many-{i}.tar": 1 for i in range(12)}
    assert not files(tmp_path / "cache", "*.part")


def test_runs_that_take_turns_never_exceed_the_size(served, tmp_path):
    """Eight runs after one another want five shards each of a cache that holds seven; two may be alive at once."""
    for i in range(12):
        served.files[f"many-{i}.tar"] = bytes([i]) * 10_000
    place, largest = f"{tmp_path}/cache:105KB", []

    def run(number: int) -> bool:
        cache = ShardCache(place)
        try:
            paths = cache.fetch([served.url(f"many-{(number * 3 + i) % 12}.tar") for i in range(5)])
        except RemoteShardError as error:
            assert "in use by other runs" in str(error)
            return False
        assert all(path.stat().st_size == 10_000 for path in paths.values())
        largest.append(sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.tar")))
        cache.close()
        return True

    with ThreadPoolExecutor(2) as pool:
        done = sum(pool.map(run, range(8)))
    assert done >= 4 and max(largest) <= 105_000


def test_a_killed_download_leaves_nothing_that_is_used(served, tmp_path):
    served.faults["train-0000.tar"] = ["", "hold"]
    url, place = served.url("train-0000.tar"), f"{tmp_path}/cache"
    process = subprocess.Popen([sys.executable, "-c", FETCH + "c.fetch(sys.argv[2:])", place, url])
    assert served.half_sent.wait(10)
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    served.go_on.set()
    assert files(tmp_path / "cache", ".*.part") == [".train-0000.tar.part"] and not files(tmp_path / "cache")
    assert len(files(tmp_path / "cache" / ".leases", "*.json")) == 1
    # Somebody else tidies up, whatever they want themselves.
    ShardCache(place).fetch([served.url("train-0001.tar")])
    assert not files(tmp_path / "cache", ".*.part")
    assert files(tmp_path / "cache") == ["train-0001.tar"]
    assert len(files(tmp_path / "cache" / ".leases", "*.json")) <= 1
    (path,) = ShardCache(place).fetch([url]).values()
    assert path.read_bytes() == served.files["train-0000.tar"]


def test_a_waiting_process_takes_over_from_one_that_dies(served, tmp_path):
    served.faults["train-0000.tar"] = ["", "hold"]
    url, place = served.url("train-0000.tar"), f"{tmp_path}/cache"
    process = subprocess.Popen([sys.executable, "-c", FETCH + "c.fetch(sys.argv[2:])", place, url])
    assert served.half_sent.wait(10)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ShardCache(place).fetch, [url])
        time.sleep(0.3)
        assert not waiting.done()
        process.kill()
        process.wait()
        (path,) = waiting.result(10).values()
    served.go_on.set()
    assert path.read_bytes() == served.files["train-0000.tar"]


def test_pipes(served, tmp_path, make_shards):
    shard = tmp_path / "train-0001.tar"
    cache = ShardCache(f"{tmp_path}/cache:{len(shard.read_bytes()) / 1000 + 1}KB")
    index = ShardIndex.build(f"pipe:cat {shard}", shard_cache=cache)
    assert contents(index) == contents(ShardIndex.build(shard))
    # The size of a command's output shows only at its end.
    with pytest.raises(RemoteShardError, match="may hold"):
        cache.fetch([f"pipe:cat {tmp_path}/train-0000.tar"])
    assert len(files(tmp_path / "cache")) == 1 and not files(tmp_path / "cache", ".*.part")


def test_sizes_that_show_late_do_not_count_the_folder_each_time(served, tmp_path, monkeypatch):
    for i in range(12):
        served.files[f"many-{i}.tar"] = bytes(10_000)
    served.faults |= {f"many-{i}.tar": ["no length"] * 2 for i in range(12)}
    urls = [served.url(f"many-{i}.tar") for i in range(12)]
    counted, real = [], ShardCache._stored
    monkeypatch.setattr(ShardCache, "_stored", lambda self: counted.append(1) or real(self))
    first = ShardCache(f"{tmp_path}/cache:2MB")
    first.fetch(urls)
    assert len(counted) == 2 and first._needs == {first._name(path): 10_000 for path in map(first.path_of, urls)}
    # What is there counts for others too, although the lease does not say how large it is.
    with pytest.raises(RemoteShardError, match=r"may hold 130\.0 KB, 120\.0 KB of it in use by other runs"):
        ShardCache(f"{tmp_path}/cache:130KB").fetch([served.url("train-0000.tar")])
    # A cache that is too small is filled up to its size.
    served.faults |= {f"many-{i}.tar": ["no length"] * 2 for i in range(12)}
    with pytest.raises(RemoteShardError, match="may hold"):
        ShardCache(f"{tmp_path}/small:60KB").fetch(urls)
    assert 2 <= len(files(tmp_path / "small")) <= 6


def test_a_wait_for_bytes_can_be_left(served, tmp_path):
    """A bar is told of every moment in which nothing came, so that it can heed a stop signal."""
    served.faults["train-0000.tar"] = ["", "hold"]

    class Bar:
        def __init__(self, total: int, description: str, *, unit: str) -> None:
            pass

        def update(self, count: int = 1) -> None:
            if served.half_sent.is_set():
                served.go_on.set()
                raise SystemExit(0)

        def close(self) -> None:
            pass

    with pytest.raises(SystemExit):
        ShardCache(f"{tmp_path}/cache").fetch([served.url("train-0000.tar")], Bar)


def test_places_in_the_cache(tmp_path):
    cache = ShardCache(str(tmp_path))
    urls = [
        *("https://h/a/x.tar", "https://h/b/x.tar", "https://g/a/x.tar", "http://h/a/x.tar", "https://h/a/x.tar?v=2"),
        *("https://h/a/..", "https://h/a/%2e%2e", "s3://bucket/x y.tar", "s3://bucket/x_y.tar", "https://h/a/.x.tar"),
        *("pipe:cat a/x.tar", "pipe:cat b/x.tar", "https://h/a/" + "n" * 300 + ".tar", "https://h/a/", "hf://x.tar"),
        "https://h/../../../../etc/passwd",
    ]
    paths = [cache.path_of(url) for url in urls]
    assert len(set(paths)) == len(urls)
    for path in paths:
        assert path.parent.parent == tmp_path and path.suffix == ".tar" and not path.name.startswith((".", "-"))
        assert ".." not in path.parts and len(path.name) < 130
    assert paths[0].name == "x.tar" and paths[0].parent.name.startswith("h-a-")


@pytest.mark.parametrize(
    ("place", "folder", "size"),
    [
        ("d", "d", None),
        ("d:500GB", "d", 500 * 10**9),
        ("d:1.5tb", "d", 1_500_000_000_000),
        ("a:b/d:7", "a:b/d:7", None),
    ],
)
def test_a_place_with_and_without_a_size(tmp_path, monkeypatch, place, folder, size):
    monkeypatch.chdir(tmp_path)
    cache = ShardCache(place)
    assert (cache.folder, cache.size) == (tmp_path / folder, size)


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"the shard cache .*/file/x cannot be used: .*; name a local disk"):
        ShardCache(f"{tmp_path}/file/x")
