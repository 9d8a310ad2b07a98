"""The stage with a made-up batch decoder: what is refused, what is in flight, and what comes out."""

from __future__ import annotations

from collections import Counter, deque
from typing import NamedTuple

import numpy as np
import pytest
import torch

from farl_engine.data import decode_stage
from farl_engine.data.decode_stage import DecodeStage


class Item(NamedTuple):
    value: int
    pixels: int = 1


class FakeSession:
    """Writes each item's value; refuses runs that hold a value in `bad`."""

    max_runs = 3

    def __init__(self, bad: set[int]) -> None:
        self.bad = bad
        self.runs: list[list[int]] = []
        self.in_flight: deque[list[int]] = deque()
        self.most_in_flight = 0
        self.closed = False

    def empty(self, count, *, pin):
        return torch.full((count,), -1), None

    def submit(self, run):
        self.runs.append([item.value for item in run])
        self.in_flight.append(self.runs[-1])
        self.most_in_flight = max(self.most_in_flight, len(self.in_flight))

    def collect(self, rows, images, tokens):
        values = self.in_flight.popleft()
        if self.bad & set(values):
            return False
        images[list(rows)] = torch.tensor(values)
        return True

    def close(self):
        self.closed = True


class Job:
    """Rows of the given values; `refuse` gives -2."""

    def __init__(self, step: int, values: dict[int, int], pixels: int = 1) -> None:
        self.step = step
        self.encoded = {row: Item(value, pixels) for row, value in values.items()}
        self.images = self.token_images = None
        self.refused: list[int] = []
        self.completed = 0

    def begin(self, session):
        self.images, self.token_images = session.empty(len(self.encoded), pin=False)

    def refuse(self, row, note):
        self.refused.append(row)
        self.images[row] = -2

    def complete(self, session, note):
        assert -1 not in self.images.tolist()
        self.completed += 1


def ignore(stage: str, item: int) -> None:
    pass


def run(stage: DecodeStage, jobs: list[Job]) -> list[Job]:
    done = [passed for job in jobs for passed in stage.put(job, ignore)]
    while stage.busy:
        done += stage.advance(ignore)
    return done


@pytest.mark.parametrize("bad", [set(), {0}, {63}, {5, 6, 40}, set(range(64))])
def test_a_refused_image_costs_itself_alone(bad):
    session = FakeSession(bad)
    job = Job(0, {row: row for row in range(64)})
    assert run(DecodeStage(session), [job]) == [job] and job.completed == 1
    assert job.images.tolist() == [-2 if value in bad else value for value in range(64)]
    assert sorted(job.refused) == sorted(bad)
    times = Counter(value for values in session.runs for value in values)
    # Whole, in pieces of 8, and alone.
    assert set(times.values()) == ({1} if not bad else {3} if len(bad) == 64 else {2, 3})


def test_work_on_refusals_is_bounded():
    session = FakeSession({100})
    run(DecodeStage(session), [Job(0, {row: row for row in range(512)})])
    assert sum(map(len, session.runs)) == 512 + 512 + 64 + 8


def test_batches_are_cut_by_pixels_and_kept_apart(monkeypatch):
    monkeypatch.setattr(decode_stage, "MAX_RUN_PIXELS", 100)
    session = FakeSession({17})
    jobs = [Job(step, {row: 10 * step + row for row in range(10)}, pixels=30) for step in range(4)]
    jobs.append(Job(4, {0: 40}, pixels=1000))
    done = run(DecodeStage(session), jobs)
    assert sorted(job.step for job in done) == [0, 1, 2, 3, 4] and all(job.completed == 1 for job in jobs)
    assert jobs[1].refused == [7] and jobs[4].images.tolist() == [40]
    for job in (jobs[0], jobs[2], jobs[3]):
        assert job.images.tolist() == list(range(10 * job.step, 10 * job.step + 10))
    assert max(map(len, session.runs)) == 3 and session.most_in_flight == 3


def test_a_batch_with_nothing_to_decode_passes():
    stage = DecodeStage(FakeSession(set()))
    job = Job(3, {})
    assert stage.put(job, ignore) == [job] and job.completed == 1 and not stage.busy


def test_rows_keep_their_places():
    session = FakeSession(set())
    job = Job(0, {4: 40, 1: 10, 3: 30, 0: 0, 2: 20})
    run(DecodeStage(session), [job])
    assert job.images.tolist() == [0, 10, 20, 30, 40] and np.array_equal(session.runs, [[0, 10, 20, 30, 40]])


def test_closing_closes_the_decoder():
    session = FakeSession(set())
    stage = DecodeStage(session)
    stage.put(Job(0, {0: 1}), ignore)
    stage.close()
    assert session.closed and not stage.busy
