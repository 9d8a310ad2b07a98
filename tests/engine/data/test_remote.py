"""Copying shards from servers that fail, change, end early, or are no servers at all."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from farl_engine.data import remote
from farl_engine.data.remote import (
    RemoteShardError,
    StoppedError,
    Version,
    ask,
    download,
    expand_remote,
    is_remote,
    shown,
)
from farl_engine.data.shard_cache import ShardCache

CONTENT = bytes(range(256)) * 4000


@pytest.fixture
def server(flaky_server):
    flaky_server.files["a.tar"] = CONTENT
    return flaky_server


def fetched(url: str) -> tuple[bytes, Version]:
    file = io.BytesIO(b"left from a try before" * 100_000)
    version = download(url, file)
    return file.getvalue(), version


def test_what_is_remote():
    for pattern in ("https://host/a.tar", "s3://b/{0..3}.tar", "hf://datasets/a/b/*.tar", "pipe:cat a.tar", "gs://b/a"):
        assert is_remote(pattern)
    for pattern in ("a.tar", "/a/b.tar", "a:b.tar", "C:/a.tar", "a/pipe:b.tar", "./s3:/a"):
        assert not is_remote(pattern)


def test_a_shard_comes_whole_with_its_size_and_tag(server):
    assert ask(server.url("a.tar")) == Version(len(CONTENT), '"1"')
    assert fetched(server.url("a.tar")) == (CONTENT, Version(len(CONTENT), '"1"'))


@pytest.mark.parametrize("fault", ["503", "500", "429", "408", "cut", "hang up"])
def test_failures_that_pass_are_tried_again(server, fault):
    server.faults["a.tar"] = [fault, fault]
    counted: list[int] = []
    file = io.BytesIO()
    download(server.url("a.tar"), file, on_bytes=counted.append)
    assert file.getvalue() == CONTENT
    assert sum(counted) == len(CONTENT) and server.requests == ["GET a.tar"] * 3


@pytest.mark.parametrize("fault", ["503", "cut"])
def test_tries_end(server, fault):
    server.faults["a.tar"] = [fault] * 50
    said = {"503": "the server says 503 Service Unavailable", "cut": r"it ended after 512,000 of 1,024,000 bytes"}[
        fault
    ]
    with pytest.raises(RemoteShardError, match=rf"http://.*/a\.tar cannot be fetched, tried 6 times: {said}"):
        fetched(server.url("a.tar"))
    assert len(server.requests) == 6


def test_pauses_grow_and_heed_the_server(server, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.5)
    pauses: list[float] = []

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            pauses.append(timeout or 0.0)
            return False

    server.faults["a.tar"] = ["503"] * 3 + ["503 after 40"] + ["503 after 4000"] * 5
    with pytest.raises(RemoteShardError):
        download(server.url("a.tar"), io.BytesIO(), Stop())
    assert all(0.5 * 2**i * 0.5 <= pause <= 0.5 * 2**i * 1.5 for i, pause in enumerate(pauses[:3]))
    assert pauses[3:] == [40, 60]


@pytest.mark.parametrize(("status", "said"), [("404", "404 Not Found"), ("403", "403 Forbidden"), ("410", "410 Gone")])
def test_final_answers_are_not_asked_for_again(server, status, said):
    server.faults["a.tar"] = [status] * 9
    with pytest.raises(RemoteShardError, match=rf"a\.tar cannot be fetched: the server says {said}"):
        fetched(server.url("a.tar"))
    assert len(server.requests) == 1


def test_a_server_without_head_or_length(server):
    server.faults["a.tar"] = ["no HEAD"]
    assert ask(server.url("a.tar")).size == len(CONTENT)
    server.faults["a.tar"] = ["no length", "no length"]
    assert ask(server.url("a.tar")).size is None
    assert fetched(server.url("a.tar"))[0] == CONTENT


def test_nobody_listens(server, monkeypatch):
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    server.server_close()
    with pytest.raises(RemoteShardError, match=r"tried 2 times: .*[Rr]efused"):
        ask(server.url("a.tar"))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://h/a.tar?sig=SECRET/x y", "https://h/a.tar?..."),
        ("ftp://me:SECRET@h/a.tar", "ftp://me:...@h/a.tar"),
        ("s3://b/a.tar?versionId=1", "s3://b/a.tar?versionId=1"),
        ("abfs://box@account/a.tar", "abfs://box@account/a.tar"),
        ("pipe:curl 'https://me:SECRET@h/a?k=SECRET' -s", "pipe:curl 'https://me:...@h/a?...' -s"),
    ],
)
def test_what_is_shown_of_an_address(tmp_path, url, said):
    assert shown(url) == said
    assert "SECRET" not in str(ShardCache(str(tmp_path)).path_of(url))


def test_a_key_in_an_address_is_not_shown(server):
    host = server.url("").removeprefix("http://")
    for url, said in (
        (server.url("none.tar?signature=SECRET"), r"none\.tar\?\.\.\. cannot be fetched: the server says 404"),
        (server.url("a b.tar?signature=SECRET"), r"a b\.tar\?\.\.\. is no valid address: write a space as %20"),
        (f"http://me:SECRET@{host}a.tar", r"http://me:\.\.\.@.*/a\.tar holds a login: leave that to `pipe:curl"),
    ):
        with pytest.raises(RemoteShardError, match=said) as caught:
            ask(url)
        assert "SECRET" not in str(caught.value)
    assert server.requests == ["HEAD none.tar?signature=SECRET"]


def test_a_download_stops_when_told(server):
    stop = threading.Event()
    stop.set()
    with pytest.raises(StoppedError):
        download(server.url("a.tar"), io.BytesIO(), stop)


def test_a_full_disk_is_not_the_servers_fault(server):
    with open("/dev/full", "wb") as full, pytest.raises(OSError, match="No space left"):  # noqa: PTH123
        full.truncate = lambda: None  # type: ignore[method-assign]
        download(server.url("a.tar"), full)
    assert len(server.requests) == 1


@pytest.fixture
def memory() -> Iterator[object]:
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    for i in range(3):
        system.pipe(f"/bucket/a-{i}.tar", CONTENT + bytes([i]))
    yield system
    system.rm("/bucket", recursive=True)


def test_other_schemes_go_through_fsspec(memory, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.001)
    monkeypatch.setattr(remote, "_CHUNK", 100_000)
    content, version = fetched("memory://bucket/a-1.tar")
    assert content == CONTENT + b"\1" and version.size == len(content) and version.tag
    assert expand_remote("memory://bucket/a-[01].tar") == ["memory:///bucket/a-0.tar", "memory:///bucket/a-1.tar"]
    assert len(expand_remote("memory://bucket/")) == 3
    with pytest.raises(RemoteShardError, match=r"memory://bucket/none\.tar cannot be fetched: there is no such file"):
        ask("memory://bucket/none.tar")
    with pytest.raises(RemoteShardError, match=r"no shard matches memory://bucket/x\*"):
        expand_remote("memory://bucket/x*")
    real, failing = type(memory).open, ["reset", "reset"]

    def flaky(self, path, *args, **kwargs):
        if failing:
            raise OSError(failing.pop())
        return real(self, path, *args, **kwargs)

    monkeypatch.setattr(type(memory), "open", flaky)
    assert fetched("memory://bucket/a-2.tar")[0] == CONTENT + b"\2" and not failing


def test_a_missing_package_is_named(monkeypatch):
    for name in ("fsspec", "s3fs"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(RemoteShardError, match=r"pip install 'farl-engine\[remote\]'"):
                ask("s3://bucket/a.tar")
    with pytest.raises(RemoteShardError, match=r"nothing reads sss:// here; use http, https, s3, gs or hf"):
        ask("sss://bucket/a.tar")


def test_fsspec_is_not_imported_for_nothing():
    code = "import sys, farl_engine.data.shard_cache; assert not {'fsspec', 'torch'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_range_in_a_url():
    assert expand_remote("https://h/{08..10}.tar?x={1..1}") == [f"https://h/{i}.tar?x=1" for i in ("08", "09", "10")]
    assert expand_remote("pipe:cat *-{0..1}.tar") == ["pipe:cat *-0.tar", "pipe:cat *-1.tar"]
    for url in ("https://h/*.tar", "http://h/folder/"):
        with pytest.raises(RemoteShardError, match="write a range such as"):
            expand_remote(url)


def test_a_pipe_is_a_command_without_a_shell(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.001)
    (tmp_path / "a b.tar").write_bytes(CONTENT)
    assert fetched(f"pipe:cat '{tmp_path}/a b.tar'") == (CONTENT, Version(len(CONTENT), None))
    content, _ = fetched(f"pipe:echo ; touch {tmp_path}/attacked $(touch {tmp_path}/attacked)")
    assert content.startswith(b"; touch") and not (tmp_path / "attacked").exists()
    assert ask("pipe:cat x") == Version(None, None)
    with pytest.raises(RemoteShardError, match=r"tried 6 times: the command ended with code 1: cat: .*No such file"):
        fetched(f"pipe:cat {tmp_path}/none")
    with pytest.raises(RemoteShardError, match="there is no command 'no-such-command'"):
        fetched("pipe:no-such-command x")
    flag = tmp_path / "came"
    script = f"cat '{tmp_path}/a b.tar'; test -e {flag} || {{ touch {flag}; exit 3; }}"
    assert fetched(f'pipe:sh -c "{script}"')[0] == CONTENT
