"""Copies of remote shards in a bounded folder, shared by any number of processes.

A shuffle over all samples touches every shard within a few steps, so shards are copied whole before a run reads them;
a cache that is smaller than the set is refused rather than filled anew at every step. What lies in the folder:

- `HOST-FOLDER-<hash>/NAME.tar`: a complete shard; it appears under this name in one go, after all of it is on disk.
- `.../NAME.tar.json`: its URL, size and tag; stays when the shard is evicted. Its modification time is the last use.
- `.../.NAME.tar.part`: a download, locked (flock) by the process that writes it. Unlocked ones are leftovers.
- `.leases/*.json`: the shards that a process needs, locked as long as it lives. They are never evicted.
- `.lock`: locked while somebody counts, evicts or signs a lease.
- `*.farl-index`: the indexes of the sets, so that later starts need no network.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeVar

from farl_engine.data import remote
from farl_engine.data.index_scan import Bar, BarMaker, show_progress
from farl_engine.data.remote import PIPE, RemoteShardError, StoppedError, Version, shown

T = TypeVar("T")

_THREADS = 16
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_WITH_SIZE = re.compile(r"(.+):(\d+(?:\.\d+)?)\s*([KMGT]B)", re.IGNORECASE)
# Kept free on the disk, as a share of it.
_RESERVE = 0.05
_POLL_SECONDS = 0.2

logger = logging.getLogger("farl_engine.data")


class ShardCache:
    """A folder of shards, used up to a size.

    Args:
        place: "DIR", or "DIR:SIZE" with a size such as 500GB (decimal KB, MB, GB or TB). Without one the folder may
            fill its disk up to 95 %.

    Raises:
        ValueError: the folder cannot be made or locked.
    """

    def __init__(self, place: str) -> None:
        match = _WITH_SIZE.fullmatch(place)
        self.folder = Path(match[1] if match else place).absolute()
        self.size = int(float(match[2]) * _UNITS[match[3].upper()]) if match else None
        # path in the folder -> bytes, of all shards that this process needs.
        self._needs: dict[str, int] = {}
        # Bytes for shards whose size shows only when they are here, before the folder is looked through again.
        self._spare = 0
        self._lease: IO[str] | None = None
        self._lease_path: Path | None = None
        self._mutex = threading.Lock()
        try:
            (self.folder / ".leases").mkdir(parents=True, exist_ok=True)
            with self._locked():
                pass
        except OSError as error:
            raise ValueError(f"the shard cache {self.folder} cannot be used: {error}; name a local disk") from None

    def path_of(self, url: str) -> Path:
        """Where the copy of a shard lies."""
        # Of a web address, its query is no part of the name.
        address = url.partition("?")[0] if url.startswith(("http://", "https://")) else url
        parent, _, name = (PIPE, "", url) if url.startswith(PIPE) else address.rpartition("/")
        safe = re.sub(r"[^\w=-]|^(?=[.-])", "_", shown(name).removesuffix(".tar"), flags=re.ASCII)[-100:].lstrip("-")
        if f"{safe}.tar" != name or address != url:
            safe = f"{safe or 'shard'}-{_digest(url.removeprefix(f'{parent}/'))}"
        host, _, rest = shown(f"{parent}/").partition("://")[2].partition("/") if "://" in parent else (parent, "", "")
        label = f"{host}-{rest.rstrip('/').rpartition('/')[2]}"
        label = re.sub(r"[^\w-]", "_", label, flags=re.ASCII)[:60].strip("_-")
        return self.folder / f"{label}-{_digest(parent)}" / f"{safe}.tar"

    def fetch(self, urls: Sequence[str], progress: bool | BarMaker = False) -> dict[str, Path]:
        """Copies what is missing and returns where each shard lies; they stay there until `close`.

        Other processes may do the same at the same time: each shard is copied once. What is complete is kept whatever
        happens; without anything missing the network is not touched.

        Raises:
            RemoteShardError: a shard that cannot be had, or a cache that is too small for the set.
            OSError: the folder cannot be written.
        """
        paths = {url: self.path_of(url) for url in urls}
        complete = {path: size for path in paths.values() if (size := _complete_size(path)) is not None}
        # First, lest another process evict them while this one asks for the others.
        self._reserve(complete)
        missing = [url for url, path in paths.items() if _complete_size(path) is None]
        for path in complete:
            with contextlib.suppress(OSError):
                os.utime(_record_path(path))
        if missing:
            stop = threading.Event()
            sizes: dict[Path, int] = {}
            with show_progress(progress, len(missing), "ask for shards", "shards") as bar:
                counted = _Counter(bar)
                for url, version in _in_threads(lambda url: remote.ask(url, stop), missing, stop, counted.show):
                    sizes[paths[url]] = version.size or 0
                    counted.add(1)
                counted.show()
            self._reserve(sizes)
            with show_progress(progress, max(1, sum(sizes.values()) // 10**6), "fetch shards", "MB") as bar:
                counted = _Counter(bar, per=10**6)
                get = lambda url: self._get(url, paths[url], stop, counted.add)
                for _ in _in_threads(get, missing, stop, counted.show):
                    pass
        return paths

    def close(self) -> None:
        """Lets others evict the shards of this process."""
        if self._lease is not None and self._lease_path is not None:
            self._lease_path.unlink(missing_ok=True)
            self._lease.close()
        self._lease = self._lease_path = None
        self._needs = {}

    def _get(self, url: str, path: Path, stop: threading.Event, on_bytes: Callable[[int], None]) -> None:
        path.parent.mkdir(exist_ok=True)
        with self._claimed(path, stop) as file:
            if file is None:
                return
            version = remote.download(url, file, stop, on_bytes)
            assert version.size is not None
            self._account(path, version.size)
            os.fsync(file.fileno())
            _write_record(path, url, version)
            _part_path(path).replace(path)

    @contextlib.contextmanager
    def _claimed(self, path: Path, stop: threading.Event) -> Iterator[IO[bytes] | None]:
        """The shard's `.part` file, locked; None once another process has completed the shard."""
        part = _part_path(path)
        while True:
            # Not truncated here: it may be another process's.
            file = os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
            with file:
                if not _try_lock(file):
                    if stop.wait(_POLL_SECONDS):
                        raise StoppedError
                    continue
                # It may have been renamed or removed between opening and locking.
                ours = _same_file(part, file)
                if _complete_size(path) is not None:
                    if ours:
                        part.unlink(missing_ok=True)
                    yield None
                    return
                if ours:
                    try:
                        yield file
                    except BaseException:
                        part.unlink(missing_ok=True)
                        raise
                    return

    def _account(self, path: Path, size: int) -> None:
        """Signs for what came: the size of a command's output is known only then, and a file may have changed since it
        was asked for. Looking through the folder each time would be quadratic in the shards."""
        name = self._name(path)
        with self._mutex:
            more = size - self._needs.get(name, 0)
            if more <= self._spare:
                self._spare -= max(more, 0)
                self._needs[name] = size
                return
        self._reserve({path: size})

    def _reserve(self, sizes: dict[Path, int]) -> None:
        """Signs for shards, and evicts others where they would not fit.

        Raises:
            RemoteShardError: they cannot fit.
        """
        with self._mutex, self._locked():
            needs = self._needs | {self._name(path): size for path, size in sizes.items()}
            stored = self._stored()
            leased = self._leased_by_others()
            room = shutil.disk_usage(self.folder)
            held = sum(size for size, _ in stored.values())
            limit = held + room.free - int(room.total * _RESERVE)
            if self.size is not None:
                limit = min(limit, self.size)
            wanted = leased | needs
            # Of a shard whose size was not known, the lease may say less than is there.
            wanted |= {name: max(wanted[name], stored[name][0]) for name in wanted.keys() & stored.keys()}
            if sum(wanted.values()) > limit:
                others = sum(wanted[name] for name in leased.keys() - needs.keys())
                in_use = f", {_readable(others)} of it in use by other runs" if others else ""
                raise RemoteShardError(
                    f"the shards need {_readable(sum(needs.values()))}, but the shard cache {self.folder} may hold "
                    f"{_readable(limit)}{in_use}: a shuffle over all samples needs all of them at hand; allow more "
                    "(DIR:SIZE), take a larger disk, or name fewer shards"
                )
            total = sum(wanted.values()) + sum(size for name, (size, _) in stored.items() if name not in wanted)
            for name in sorted(stored.keys() - wanted.keys(), key=lambda name: stored[name][1]):
                if total <= limit:
                    break
                (self.folder / name).unlink(missing_ok=True)
                total -= stored[name][0]
            self._needs = needs
            # A part of it, because other processes may have some of their own.
            self._spare = (limit - total) // 4
            self._sign()

    def _stored(self) -> dict[str, tuple[int, float]]:
        """Name -> bytes and time of last use of each complete shard. Removes what dead processes left half."""
        found = {}
        for part in self.folder.glob("*/.*.part"):
            with contextlib.suppress(OSError), part.open("r+b") as file:
                if _try_lock(file) and _same_file(part, file):
                    part.unlink()
        for path in self.folder.glob("*/*.tar"):
            # Shards may be removed by hand at any time.
            with contextlib.suppress(OSError):
                stat = path.stat()
                record = _record_path(path)
                used = record.stat().st_mtime if record.exists() else 0.0
                found[self._name(path)] = (stat.st_size, used)
        return found

    def _leased_by_others(self) -> dict[str, int]:
        leased: dict[str, int] = {}
        for path in (self.folder / ".leases").glob("*.json"):
            if path == self._lease_path:
                continue
            with contextlib.suppress(FileNotFoundError), path.open("r+") as file:
                if _try_lock(file):
                    # Its process is dead.
                    path.unlink()
                else:
                    leased.update(json.load(file))
        return leased

    def _sign(self) -> None:
        if self._lease is None:
            fd, name = tempfile.mkstemp(suffix=".json", dir=self.folder / ".leases")
            self._lease, self._lease_path = os.fdopen(fd, "w+"), Path(name)
            fcntl.flock(self._lease, fcntl.LOCK_EX)
        self._lease.seek(0)
        self._lease.truncate()
        json.dump(self._needs, self._lease)
        self._lease.flush()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / ".lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()


class _Counter:
    """Counts bytes or shards from many threads, and moves a bar by whole units of `per` from one."""

    def __init__(self, bar: Bar | None, per: int = 1) -> None:
        self._bar, self._per = bar, per
        self._lock = threading.Lock()
        self._count = self._shown = 0

    def add(self, count: int) -> None:
        with self._lock:
            self._count += count

    def show(self) -> None:
        # What a failed try had fetched is taken back; the bar waits until it is there again. Nothing new is shown too:
        # the bar's maker may look for a stop signal then, while nothing arrives.
        new = max(self._count // self._per - self._shown, 0)
        self._shown += new
        if self._bar is not None:
            self._bar.update(new)


def _in_threads(
    function: Callable[[str], T], urls: Sequence[str], stop: threading.Event, tick: Callable[[], None] | None = None
) -> Iterator[tuple[str, T]]:
    """(url, result) as they are done; a failure, or an end of the iteration, stops the others. `tick` is called now
    and then."""
    pool = ThreadPoolExecutor(min(_THREADS, len(urls)), thread_name_prefix="farl-fetch")
    waiting = iter(urls)
    running: dict[Future[T], str] = {}
    try:
        running.update({pool.submit(function, url): url for url in islice(waiting, _THREADS)})
        while running:
            done, _ = wait(running, _POLL_SECONDS, FIRST_COMPLETED)
            if tick is not None:
                tick()
            for future in done:
                url, result = running.pop(future), future.result()
                running.update({pool.submit(function, url): url for url in islice(waiting, 1)})
                yield url, result
    except BaseException:
        stop.set()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _complete_size(path: Path) -> int | None:
    """Bytes of a shard of which all is there, else None."""
    try:
        record = json.loads(_record_path(path).read_bytes())
        size = path.stat().st_size
    except (OSError, ValueError):
        return None
    return size if record["size"] == size else None


def _write_record(path: Path, url: str, version: Version) -> None:
    record_path = _record_path(path)
    with contextlib.suppress(OSError, ValueError, LookupError):
        before = json.loads(record_path.read_bytes())
        if (before["size"], before["tag"]) != (version.size, version.tag):
            logger.warning("%s has changed since it was last fetched", shown(url))
    record = {"url": shown(url), "size": version.size, "tag": version.tag}
    temporary = record_path.with_name(f".{record_path.name}.tmp")
    temporary.write_text(json.dumps(record))
    temporary.replace(record_path)


def _record_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _part_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _try_lock(file: IO[Any]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _same_file(path: Path, file: IO[Any]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=4).hexdigest()


def _readable(size: int) -> str:
    unit = max((unit for unit in _UNITS if size >= _UNITS[unit]), key=lambda unit: _UNITS[unit], default="KB")
    return f"{size / _UNITS[unit]:.1f} {unit}"
