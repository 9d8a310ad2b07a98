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
# A signal that another process of the run got: no first one here, so that one of our own is not taken for a second.
_elsewhere: str | None = None


def install() -> None:
    """Note the first of `SIGNALS`; leave at once on a second one. Call from the main thread."""
    for number in SIGNALS:
        signal.signal(number, _handle)


def requested() -> str | None:
    """Name of the signal that asked this process, or another one of the run, to stop, or None."""
    return _first[0] if _first else _elsewhere


def heard_elsewhere(name: str) -> None:
    """Note that another process of the run was asked to stop by signal `name`."""
    global _elsewhere
    _elsewhere = name


def reset() -> None:
    """Forget a request (for tests and for programs that train more than once)."""
    global _first, _elsewhere
    _first = _elsewhere = None


def _handle(number: int, frame: FrameType | None) -> None:
    global _first
    now = time.monotonic()
    if _first is None:
        _first = (signal.Signals(number).name, now)
    elif now - _first[1] > ECHO_SECONDS:
        os._exit(128 + number)
