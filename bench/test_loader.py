"""Pictures a second from tar shards to batches: our loader against the field's, two workers each.

Threads here, processes there. Before any time is taken, all must give the same pictures for the central crop.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import bad_samples
from bench.contest import FACTS, NotMeasuredError, leave_out
from bench.deadline import out_of_time
from bench.interleaved import ROUNDS, Ratio, Replay, take_turns
from bench.loader_contenders import BATCH, CONTENDERS, OUTPUT, PLAN, WORKERS, as_bytes
from bench.photographs import SETS, PhotographSet
from bench.timing import CUDA
from farl_engine.data import CENTER, CpuDecoder, ShardIndex

BATCHES = 6
COMPARED = 32
# Mean absolute difference of one picture, in steps of 1/255: between decoders, and of reduced decoding to full.
LIMIT, REDUCED_LIMIT = 0.5, 2.0
OP, OP_BAD = "loader", "loader with 1 % bad samples"
CLOCK = Replay()


def shape_of(name: str) -> str:
    return f"photographs {name}, to {OUTPUT} px, batch {BATCH}, {WORKERS} workers"


class Contest:
    """All contenders over one set of photographs, checked and timed in turns when it is first asked for."""

    def __init__(self, photographs: PhotographSet, folder: Path) -> None:
        self.reasons: dict[str, str] = {}
        self.times: dict[str, list[float]] = {}
        try:
            if out_of_time():
                raise NotMeasuredError("out of time")
            shards = photographs.shards(folder)
        except (NotMeasuredError, ValueError) as error:
            self.reasons = dict.fromkeys(CONTENDERS, str(error))
            return
        check_reduced_decoding(shards)
        expected = pictures(CONTENDERS["farl_engine"], shards)
        for name, contender in CONTENDERS.items():
            try:
                difference = largest_difference(expected, pictures(contender, shards))
                if difference >= LIMIT:
                    raise NotMeasuredError(f"other pictures: mean difference {difference:.2f}/255, allowed {LIMIT}")
            except NotMeasuredError as error:
                self.reasons[name] = str(error)
            except Exception as error:
                # What all are compared with must work; of the others, DALI's among them, the reason is written down.
                if name == "farl_engine":
                    raise
                self.reasons[name] = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:200]}"
        starts = {
            name: partial(contender, shards, PLAN) for name, contender in CONTENDERS.items() if name not in self.reasons
        }
        self.times = take_turns(starts, BATCHES, finish=torch.cuda.synchronize if CUDA else lambda: None)


def pictures(contender: Any, shards: list[Path]) -> dict[str, np.ndarray[Any, Any]]:
    """Caption -> central crop, until each of the first samples came."""
    found: dict[str, np.ndarray[Any, Any]] = {}
    wanted = {f"photograph number {i}" for i in range(COMPARED)}
    with contextlib.closing(contender(shards, CENTER)) as batches:
        while not wanted <= found.keys():
            images, captions = next(batches)
            found.update(zip(captions, as_bytes(images), strict=True))
    return {caption: found[caption] for caption in wanted}


def largest_difference(expected: dict[str, np.ndarray[Any, Any]], got: dict[str, np.ndarray[Any, Any]]) -> float:
    return max(float(np.abs(picture.astype(int) - got[caption]).mean()) for caption, picture in expected.items())


def check_reduced_decoding(shards: list[Path]) -> None:
    """What is timed decodes large JPEGs at reduced size: compare that with full decoding, for the same boxes."""
    index = ShardIndex.build(shards)
    ids = np.arange(min(COMPARED, len(index)))
    reduced, full = CpuDecoder(OUTPUT), CpuDecoder(OUTPUT, reduce=False)
    for i, parameters in zip(ids, PLAN.parameters(0, ids, np.zeros_like(ids)), strict=True):
        image = index.read(int(i))[0]
        one, other = (decoder.decode(image, PLAN, parameters)[0].astype(int) for decoder in (reduced, full))
        assert np.abs(one - other).mean() <= REDUCED_LIMIT


@pytest.fixture(scope="module", params=SETS, ids=lambda photographs: photographs.name)
def contest(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Contest]:
    """Name of the set, and the contest over it."""
    with one_thread():
        return request.param.name, Contest(request.param, tmp_path_factory.mktemp("photographs"))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch's own threads would take the cores from the workers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("name", CONTENDERS)
def test_loader(benchmark: Any, contest: tuple[str, Contest], name: str) -> None:
    photographs, result = contest
    labels = {"op": OP, "shape": shape_of(photographs), "mode": "both", "contender": name}
    record(benchmark, labels, result.times, result.reasons, "farl_engine")


def record(
    benchmark: Any,
    labels: dict[str, str],
    times: dict[str, list[float]],
    reasons: dict[str, str],
    compared: str,
    batch: int = BATCH,
) -> None:
    """Hands a contender's rounds to pytest-benchmark, or leaves it out with the reason."""
    name = labels["contender"]
    benchmark.group = f"{labels['op']} | {labels['shape']}"
    benchmark.extra_info |= labels
    if name in reasons:
        leave_out(labels, reasons[name])
    benchmark.pedantic(CLOCK.load(times[name]), rounds=len(times[name]) if benchmark.enabled else 1)
    if benchmark.enabled:
        stats = benchmark.stats.stats
        ratio = Ratio.of(times[name], times[compared])
        benchmark.extra_info |= {
            "seconds": stats.median,
            "spread_seconds": stats.iqr,
            "timed": f"{ROUNDS} rounds in turns",
            "pictures_per_second": batch / stats.median,
            "times_ours": [ratio.median, ratio.low, ratio.high],
        }


@pytest.fixture(scope="module")
def bad_contest(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[float]], float]:
    """Rounds of our loader over a clean set and over the same with 1 % bad samples, and the share of extra decodes."""
    clean, bad = bad_samples.write_sets(tmp_path_factory.mktemp("bad"))
    with one_thread():
        extra = bad_samples.one_epoch(bad).total() / bad_samples.SAMPLES
        starts = {"clean": partial(bad_samples.endless, clean), "1 % bad": partial(bad_samples.endless, bad)}
        return take_turns(starts, bad_samples.BATCHES), extra


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("name", ["clean", "1 % bad"])
def test_bad_samples_cost_little(benchmark: Any, bad_contest: tuple[dict[str, list[float]], float], name: str) -> None:
    times, extra = bad_contest
    shape = f"photographs made, 250 x 250, to {OUTPUT} px, batch {bad_samples.BATCH}, {WORKERS} workers"
    labels = {"op": OP_BAD, "shape": shape, "mode": "both", "contender": f"farl_engine, {name}"}
    named = {f"farl_engine, {key}": seconds for key, seconds in times.items()}
    record(benchmark, labels, named, {}, "farl_engine, clean", bad_samples.BATCH)
    if name != "clean":
        ratio = Ratio.of(times["clean"], times[name])
        text = f"Throughput with 1 % bad samples over that without: {ratio}; {extra:.1%} extra decodes."
        FACTS.append({"op": OP_BAD, "text": text})
