"""Made-up shards: images by Pillow, tars by the standard library, faults by hand."""

from __future__ import annotations

import io
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from farl_engine.data import remote

Members = Iterable[tuple[str, bytes]]


def encode(image: Image.Image, format: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colour, different for each seed, with no symmetry."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def write_tar(path: Path, members: Members, format: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., list[Path]]:
    """make_shards([3, 5, 2]) writes that many ordinary samples into three shards."""

    def make(sizes: list[int], side: int = 40, name: str = "train") -> list[Path]:
        paths, number = [], 0
        for shard, size in enumerate(sizes):
            members = []
            for _ in range(size):
                members.append((f"{number:06d}.jpg", encode(picture(side, side + 8, number))))
                members.append((f"{number:06d}.txt", f"caption {number}".encode()))
                number += 1
            paths.append(write_tar(tmp_path / f"{name}-{shard:04d}.tar", members))
        return paths

    return make


@pytest.fixture
def tools() -> tuple[Callable[..., bytes], Callable[..., Image.Image], Callable[..., Path]]:
    """The helpers above for tests to use: encode, picture, write_tar."""
    return encode, picture, write_tar


@pytest.fixture(name="encode")
def _encode() -> Callable[..., bytes]:
    return encode


@pytest.fixture(name="picture")
def _picture() -> Callable[..., Image.Image]:
    return picture


class FlakyServer(ThreadingHTTPServer):
    """Serves `files` (path -> bytes); `faults` maps a path to what its next requests meet instead."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = {}
        self.tags: dict[str, str] = {}
        self.requests: list[str] = []
        # "hold" sends half of a file, says so, and waits.
        self.half_sent, self.go_on = threading.Event(), threading.Event()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"


class _Handler(BaseHTTPRequestHandler):
    server: FlakyServer

    def do_GET(self) -> None:
        path = self.path.strip("/")
        self.server.requests.append(f"{self.command} {path}")
        faults = self.server.faults.get(path, [])
        fault = faults.pop(0) if faults else ""
        if fault[:3].isdigit():
            self.send_response(int(fault[:3]))
            if "after" in fault:
                self.send_header("Retry-After", fault.split()[-1])
            self.end_headers()
            return
        if fault == "hang up":
            self.connection.close()
            return
        content = self.server.files.get(path.partition("?")[0])
        if content is None or (fault == "no HEAD" and self.command == "HEAD"):
            self.send_error(404 if content is None else 405)
            return
        self.send_response(200)
        if fault != "no length":
            self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", self.server.tags.get(path, '"1"'))
        self.end_headers()
        if self.command == "GET":
            half = len(content) // 2
            self.wfile.write(content[:half])
            if fault == "hold":
                self.server.half_sent.set()
                self.server.go_on.wait(10)
            if fault != "cut":
                self.wfile.write(content[half:])

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def flaky_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyServer]:
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.001)
    with FlakyServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
