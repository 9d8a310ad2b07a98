"""How far a long command is, for a person and for a log file."""

from __future__ import annotations

import io

import pytest

from farl import progress
from farl.progress import Progress


def test_plain_lines_at_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with Progress(2000, "checking", interval=10, stream=stream) as bar:
        for _ in range(4):
            now[0] += 6
            bar.update(500)
    assert stream.getvalue().splitlines() == [
        "checking: 1,000/2,000 (50 %) samples, 83/s",
        "checking: 2,000/2,000 (100 %) samples, 83/s",
    ]


def test_a_short_job_needs_no_line_and_other_ranks_none_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    with Progress(None, "quick", stream=stream) as bar:
        bar.update()
    monkeypatch.setenv("RANK", "1")
    with Progress(None, "silent", interval=0, stream=stream) as bar:
        bar.update()
    assert stream.getvalue() == ""


def test_a_bar_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Progress(3, "drawing", stream=stream) as bar:
        bar.update(3)
    assert "drawing: 100%" in stream.getvalue()
