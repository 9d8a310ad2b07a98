"""How far a long command is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TextIO

from farl.cli import process_rank


class Progress:
    """A bar (tqdm) where stderr is a terminal, else one plain line every `interval` seconds; only rank 0 shows it.

    Use as a context manager and call `update(n)`.
    """

    def __init__(
        self,
        total: int | None,
        description: str,
        *,
        unit: str = "samples",
        interval: float = 10.0,
        stream: TextIO | None = None,
    ) -> None:
        self.total, self.description, self.unit, self.interval = total, description, unit, interval
        self.count = self._shown = 0
        self._stream = sys.stderr if stream is None else stream
        self._silent = process_rank() != 0
        self._start = self._last = time.monotonic()
        self._bar: Any = None
        if not self._silent and self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=description, unit=f" {unit}", file=self._stream, dynamic_ncols=True)

    def update(self, count: int = 1) -> None:
        """Count `count` more; shows it where it is time to."""
        self.count += count
        if self._bar is not None:
            self._bar.update(count)
        elif not self._silent and time.monotonic() - self._last >= self.interval:
            self._last = time.monotonic()
            self._line()

    def close(self) -> None:
        """End the bar, or write the last line."""
        if self._bar is not None:
            self._bar.close()
        elif not self._silent and self._start < self._last and self._shown < self.count:
            self._line()  # after a job that was too short for any line there is none at its end either
        self._silent, self._bar = True, None

    def _line(self) -> None:
        self._shown = self.count
        rate = self.count / max(time.monotonic() - self._start, 1e-9)
        of_total = f"/{self.total:,} ({100 * self.count / max(self.total, 1):.0f} %)" if self.total is not None else ""
        print(f"{self.description}: {self.count:,}{of_total} {self.unit}, {rate:,.0f}/s", file=self._stream, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()
