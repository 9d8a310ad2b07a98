"""Turns are taken fairly, ratios are of the same round, and the replayed clock gives back what was measured."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from bench import interleaved
from bench.interleaved import FIRST_BATCHES, Ratio, Replay, take_turns


def test_each_round_starts_everyone_afresh_and_closes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    now, events = [0.0], list[str]()
    monkeypatch.setattr(interleaved.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(interleaved.gc, "collect", lambda: 0)  # a second each, in a process with everything loaded

    def contender(name: str, first: float, later: float) -> Callable[[], Generator[int, None, None]]:
        def start() -> Generator[int, None, None]:
            events.append(f"start {name}")
            try:
                for number in range(100):
                    now[0] += first if number < FIRST_BATCHES else later
                    yield number
            finally:
                events.append(f"end {name}")

        return start

    times = take_turns({"a": contender("a", 9.0, 1.0), "b": contender("b", 5.0, 2.0)}, 3, rounds=3)
    # The first batches, which hold the start of the workers, are in nobody's time.
    assert times == {"a": [1.0] * 3, "b": [2.0] * 3}
    order = [event.split()[1] for event in events if event.startswith("start")]
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert all(events[i] == f"end {events[i - 1].split()[1]}" for i in range(1, len(events), 2))


def test_ratios_are_taken_round_by_round() -> None:
    ratio = Ratio.of([2.0, 8.0, 3.0], [1.0, 2.0, 3.0])
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 1.0, 4.0)
    assert str(ratio) == "2.00 (1.00 to 4.00)"


def test_the_clock_replays_what_was_measured() -> None:
    clock = Replay()
    run = clock.load([0.5, 2.0])
    found = []
    for _ in range(2):
        before = clock()
        run()
        found.append(clock() - before)
    assert found == [0.5, 2.0]


def test_a_contender_that_makes_other_pictures_gets_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("simplejpeg")
    from bench import test_loader
    from bench.loader_contenders import ours
    from bench.photographs import PhotographSet

    def inverted(*arguments: Any) -> Generator[Any, None, None]:
        for images, captions in ours(*arguments):
            yield 255 - images, captions

    def absent(*arguments: Any) -> Generator[Any, None, None]:
        raise ImportError("no such peer")

    contenders = {"farl_engine": ours, "same": ours, "inverted": inverted, "absent": absent, "farl, DALI": absent}
    monkeypatch.setattr(test_loader, "CONTENDERS", contenders)
    monkeypatch.setattr(test_loader, "take_turns", lambda starts, *_, **__: {name: [1.0] for name in starts})
    contest = test_loader.Contest(PhotographSet("made", 32, (60, 48)), tmp_path)
    assert set(contest.times) == {"farl_engine", "same"}
    assert "other pictures" in contest.reasons["inverted"]
    assert contest.reasons["absent"] == contest.reasons["farl, DALI"] == "ImportError: no such peer"
    monkeypatch.delenv("FARL_DATA", raising=False)
    real = test_loader.Contest(PhotographSet("real", 32, folder="faces/images"), tmp_path)
    assert not real.times and "no real photographs" in real.reasons["farl_engine"]


def test_what_is_looked_at_on_a_gpu_works_with_dali_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    from bench import decoding

    images = decoding.encoded((80, 64), 8)
    stream = decoding.decoded_batches(decoding.decoder_of("cpu", threads=1), images, 4)
    assert [next(stream) for _ in range(3)] == [4, 4, 4]
    stream.close()
    said = decoding.recovery(tmp_path, "cpu", count=72, batch=8)
    assert "9 full batches of 8" in said and "not_an_image" in said and "truncated" in said
    shards = decoding.photograph_shards(tmp_path, (80, 64), 70)
    shares = decoding.waited(shards, "cpu", 0.001, batch=8, steps=4)
    assert 0 <= shares["wait"] <= 1 and shares["device_decode"] > 0
    monkeypatch.setattr(decoding, "SIZES", {"80 px": (80, 64)})
    assert decoding.memory_course(tmp_path, "cpu", batches=10, batch=8) == [0] * 10
    damaged = bytearray(images[1])
    damaged[len(damaged) // 2] ^= 0xFF
    found = decoding.disagreements([("sound", images[0]), ("damaged", bytes(damaged))], "cpu")
    assert found["refused"] == found["taken"] == [] and len(found["differences"]) == 2
    assert found["differences"][0] < 0.5
