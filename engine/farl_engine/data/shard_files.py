"""Thread-safe positional reads from many files, with a bounded number open and bounded patience for a failing one."""

from __future__ import annotations

import os
import resource
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

_RETRY_DELAYS = (0.05, 0.2, 0.8)
# After all retries failed, a file is not tried again for this long: its samples fail at once, not a second each.
_GIVE_UP_SECONDS = 30.0


class ShardFiles:
    """Reads from `paths` by number; a file that fails (EIO, ESTALE, gone, cut short) is reopened and retried.

    A global shuffle touches all files at once, so as many as the process may open (a quarter of its limit) stay open;
    of more, the least recently used are closed. A file that is deleted stays readable as long as it is open.
    """

    def __init__(self, paths: Sequence[Path], max_open: int | None = None) -> None:
        self.paths = list(paths)
        self.max_open = _open_files_allowed() if max_open is None else max_open
        self._lock = threading.Lock()
        # shard -> [fd, readers]; least recently used first. No system call is made with the lock held.
        self._open: OrderedDict[int, list[int]] = OrderedDict()
        self._failed_until: dict[int, float] = {}

    def pread(self, shard: int, size: int, offset: int) -> bytes:
        """Exactly `size` bytes at `offset` of a file.

        Raises:
            OSError: the file still fails after the retries, or failed so within the last 30 s.
        """
        delays: tuple[float, ...] = _RETRY_DELAYS
        if self._failed_until and (until := self._failed_until.get(shard)) is not None:
            if time.monotonic() < until:
                raise OSError(f"{self.paths[shard]} failed moments ago")
            # It had its patience: one try every 30 s, without a pause.
            delays = ()
        for delay in (*delays, None):
            try:
                data = self._read_once(shard, size, offset)
            except OSError:
                if delay is None:
                    self._failed_until[shard] = time.monotonic() + _GIVE_UP_SECONDS
                    raise
                time.sleep(delay)
            else:
                if self._failed_until:
                    self._failed_until.pop(shard, None)
                return data
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Closes all files; ones being read close when their reader is done."""
        with self._lock:
            unused = [fd for shard in list(self._open) if (fd := self._drop(shard)) is not None]
        _close(unused)

    def __del__(self) -> None:
        self.close()

    def _read_once(self, shard: int, size: int, offset: int) -> bytes:
        entry = self._acquire(shard)
        try:
            data = os.pread(entry[0], size, offset)
            if len(data) != size:
                raise OSError(f"{self.paths[shard]}: only {len(data)} of {size} bytes at {offset} are there")
            return data
        except OSError:
            with self._lock:
                # Another thread may have dropped and reopened it meanwhile.
                if self._open.get(shard) is entry:
                    self._drop(shard)
            raise
        finally:
            with self._lock:
                entry[1] -= 1
                unused = entry[1] == 0 and self._open.get(shard) is not entry
            if unused:
                os.close(entry[0])

    def _acquire(self, shard: int) -> list[int]:
        """The file's entry with this thread among its readers."""
        with self._lock:
            entry = self._open.get(shard)
            if entry is not None:
                self._open.move_to_end(shard)
                entry[1] += 1
                return entry
        fd = os.open(self.paths[shard], os.O_RDONLY)
        unused: list[int] = []
        with self._lock:
            entry = self._open.get(shard)
            if entry is not None:
                # Another thread opened it at the same time.
                unused.append(fd)
            else:
                entry = self._open[shard] = [fd, 0]
            self._open.move_to_end(shard)
            entry[1] += 1
            while len(self._open) > max(1, self.max_open):
                if (oldest := self._drop(next(iter(self._open)))) is not None:
                    unused.append(oldest)
        _close(unused)
        return entry

    def _drop(self, shard: int) -> int | None:
        """Forgets a file, with the lock held. Returns its descriptor to be closed, or None where somebody still reads
        from it, who closes it then, lest its number be reused."""
        fd, readers = self._open.pop(shard)
        return fd if readers == 0 else None


def _open_files_allowed() -> int:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 16_384 if limit == resource.RLIM_INFINITY else max(16, min(16_384, limit // 4))


def _close(descriptors: Sequence[int]) -> None:
    for fd in descriptors:
        os.close(fd)
