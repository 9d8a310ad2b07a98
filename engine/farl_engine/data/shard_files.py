"""Thread-safe positional reads from many files, with a bounded number open and bounded patience for a failing one."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

_MAX_OPEN = 256
_RETRY_DELAYS = (0.05, 0.2, 0.8)
# After all retries failed, a file is not tried again for this long: its samples fail at once, not a second each.
_GIVE_UP_SECONDS = 30.0


class ShardFiles:
    """Reads from `paths` by number; a file that fails (EIO, ESTALE, gone, cut short) is reopened and retried."""

    def __init__(self, paths: Sequence[Path], max_open: int = _MAX_OPEN) -> None:
        self.paths = list(paths)
        self._max_open = max_open
        self._lock = threading.Lock()
        # shard -> [fd, readers]; least recently used first.
        self._open: OrderedDict[int, list[int]] = OrderedDict()
        self._failed_until: dict[int, float] = {}

    def pread(self, shard: int, size: int, offset: int) -> bytes:
        """Exactly `size` bytes at `offset` of a file.

        Raises:
            OSError: the file still fails after the retries, or failed so within the last 30 s.
        """
        if self._failed_until and time.monotonic() < self._failed_until.get(shard, 0.0):
            raise OSError(f"{self.paths[shard]} failed moments ago")
        for delay in (*_RETRY_DELAYS, None):
            try:
                return self._read_once(shard, size, offset)
            except OSError:
                if delay is None:
                    self._failed_until[shard] = time.monotonic() + _GIVE_UP_SECONDS
                    raise
                time.sleep(delay)
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Closes all files; ones being read close when their reader is done."""
        with self._lock:
            for shard in list(self._open):
                self._drop(shard)

    def __del__(self) -> None:
        self.close()

    def _read_once(self, shard: int, size: int, offset: int) -> bytes:
        with self._lock:
            entry = self._open.get(shard)
            if entry is None:
                entry = self._open[shard] = [os.open(self.paths[shard], os.O_RDONLY), 0]
                for other in list(self._open)[: max(0, len(self._open) - self._max_open)]:
                    self._drop(other)
            self._open.move_to_end(shard)
            entry[1] += 1
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
                if entry[1] == 0 and self._open.get(shard) is not entry:
                    os.close(entry[0])

    def _drop(self, shard: int) -> None:
        """Forgets a file, with the lock held; it is closed once nobody reads from it, lest its number be reused."""
        fd, readers = self._open.pop(shard)
        if readers == 0:
            os.close(fd)
