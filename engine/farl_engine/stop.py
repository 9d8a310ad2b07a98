"""Leaving cleanly on SIGTERM, SIGINT and SIGUSR1.

The handler only notes that the signal came; the loop reads the note at the next step, all ranks agree on it, save and
leave with exit code 0. Install it before torch is imported: the import takes seconds in which a signal would kill.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

# A terminal sends Ctrl-C to torchrun and to its ranks, and torchrun passes it on: a rank then hears one keystroke
# twice within moments. Only a signal later than this counts as the second one.
ECHO_SECONDS = 1.0

_first: tuple[str, float] | None = None


def install() -> None:
    """Note the first of `SIGNALS`; leave at once on a second one. Call from the main thread."""
    for number in SIGNALS:
        signal.signal(number, _handle)


def requested() -> str | None:
    """Name of the signal that asked this process to stop, or None."""
    return _first[0] if _first else None


def reset() -> None:
    """Forget a request (for tests and for programs that train more than once)."""
    global _first
    _first = None


def _handle(number: int, frame: FrameType | None) -> None:
    global _first
    now = time.monotonic()
    if _first is None:
        _first = (signal.Signals(number).name, now)
    elif now - _first[1] > ECHO_SECONDS:
        os._exit(128 + number)
