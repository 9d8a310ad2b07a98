"""One process of training, as a user starts it, watched from outside: when its first update came, and its speed."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from farl.report.curves import read_metrics

Record = dict[str, Any]

POLL_SECONDS = 0.05
TOLD_SECONDS = 15.0
# For the last checkpoint, once a process is told to stop.
GRACE_SECONDS = 30.0
TAIL_LINES = 12
# Lines of the start that are kept with their times: they say what it was spent on.
START_LINES = 12


@dataclass
class Finished:
    """What came of a process.

    Attributes:
        code: exit status; None if it had to be killed.
        seconds: from its start to its end. first_update: to the log line of its first update, None if none came.
        stopped: it was told to leave before its end, because time was up.
        said: [seconds, line] of its first lines. tail: its last lines.
        records, evaluations: its log, as `farl.report.read_metrics` reads it.
    """

    command: list[str]
    code: int | None = None
    seconds: float = 0.0
    first_update: float | None = None
    stopped: bool = False
    said: list[tuple[float, str]] = field(default_factory=list)
    tail: list[str] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    evaluations: list[Record] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return self.code != 0


def watch(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    folder: Path,
    end: float = float("inf"),
    run_dir: Path | None = None,
    say: Callable[[str], None] = print,
) -> Finished:
    """Run a command to its end, or tell it to leave (SIGTERM, at which training saves) at the moment `end`.

    Args:
        folder: where it runs.
        end: seconds since 1970.
        run_dir: of a training, whose log is followed; None for another command.
        say: is told now and then how far it is.
    """
    found = Finished(list(command))
    log = _Follower(run_dir / "metrics.jsonl") if run_dir else None
    begun = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        # A group of its own: under torchrun there are more processes than this one.
        start_new_session=True,
    )
    assert process.stdout is not None
    lines: list[tuple[float, str]] = []
    reader = threading.Thread(target=_read, args=(process.stdout, lines, begun), daemon=True)
    reader.start()
    told = begun
    try:
        while process.poll() is None:
            now = time.monotonic()
            if log is not None and log.read() and found.first_update is None:
                found.first_update = now - begun
            if time.time() > end and not found.stopped:
                found.stopped = True
                process.terminate()
                end = time.time() + GRACE_SECONDS
            elif time.time() > end:
                break
            if now - told > TOLD_SECONDS:
                told = now
                say(_told(log, lines))
            time.sleep(POLL_SECONDS)
    finally:
        found.code = process.poll()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    found.seconds = time.monotonic() - begun
    if log is not None and log.read() and found.first_update is None:
        found.first_update = found.seconds
    reader.join(timeout=2)
    found.said = [(round(seconds, 2), line) for seconds, line in lines[:START_LINES]]
    found.tail = [line for _, line in lines[-TAIL_LINES:]]
    if run_dir is not None:
        found.records, found.evaluations = read_metrics(run_dir / "metrics.jsonl")
    return found


class _Follower:
    """Reads what a growing log has come to hold."""

    def __init__(self, path: Path) -> None:
        self._path, self._at = path, 0
        self.last: Record | None = None

    def read(self) -> bool:
        """Whether there is a whole line by now."""
        with contextlib.suppress(OSError), self._path.open("rb") as stream:
            stream.seek(self._at)
            whole, newline, _ = stream.read().rpartition(b"\n")
            self._at += len(whole) + len(newline)
            for line in whole.splitlines():
                record = json.loads(line)
                self.last = record if "loss" in record else self.last
        return self.last is not None


def _read(stream: IO[str], lines: list[tuple[float, str]], begun: float) -> None:
    for line in stream:
        if line.strip():
            lines.append((time.monotonic() - begun, line.rstrip()[:300]))


def _told(log: _Follower | None, lines: list[tuple[float, str]]) -> str:
    if log is not None and log.last is not None:
        return f"update {log.last['step']}, loss {log.last['loss']:.4f}, {log.last['pairs_per_second']:.0f} pairs/s"
    return lines[-1][1][-100:] if lines else "starting"


def steady(records: Sequence[Record], batch: int) -> dict[str, float] | None:
    """Rate and waiting once a run is under way: over its log lines but the first quarter of its updates.

    Args:
        records: lines of the log, ascending; each counts from the line before it.
        batch: pairs an update.

    Returns:
        pairs_per_second, data_wait_fraction (of the time), seconds_per_update, updates counted; None where too few
        lines are left.
    """
    spans = [
        (record, record["step"] - before["step"])
        for before, record in itertools.pairwise(records)
        if before["step"] >= max(2, records[-1]["step"] // 4)
    ]
    if not spans:
        return None
    seconds = [updates * batch / record["pairs_per_second"] for record, updates in spans]
    waited = sum(record["data_wait_fraction"] * t for (record, _), t in zip(spans, seconds, strict=True))
    updates = sum(number for _, number in spans)
    return {
        "pairs_per_second": updates * batch / sum(seconds),
        "data_wait_fraction": waited / sum(seconds),
        "seconds_per_update": sum(seconds) / updates,
        "updates": updates,
    }
