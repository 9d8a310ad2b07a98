"""Decoding on a GPU with DALI: images a second by size and share of the hardware engine, and how it behaves.

Decoding alone, from memory; the loaders' contest is in test_loader.py. The rates are timed in turns.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import decoding
from bench.contest import FACTS, NotMeasuredError, clean_up, leave_out, need, need_gpu
from bench.deadline import out_of_time
from bench.interleaved import Ratio, Replay, take_turns
from bench.loader_contenders import OUTPUT

OP = "decoding with DALI"
BATCH, BATCHES, ROUNDS = 256, 8, 5
CHECKS = "behaviour"
# What one H200 is to be fed (pairs a second), for the share of time waited.
PAIRS_PER_SECOND = 2_800
# How much more GPU memory may be in use at the end than after a tenth of the batches.
MEMORY_GROWTH = 0.01
CLOCK = Replay()


def ready() -> None:
    """NotMeasuredError where this cannot be run."""
    if out_of_time():
        raise NotMeasuredError("out of time")
    need_gpu()
    need("nvidia.dali")


def decoded(load: float, images: list[bytes]) -> Generator[int, None, None]:
    return decoding.decoded_batches(decoding.decoder_of("cuda", load), images, BATCH)


@pytest.fixture(scope="module", params=decoding.SIZES)
def rates(request: pytest.FixtureRequest) -> tuple[str, dict[float, list[float]], str]:
    """Name of a size, seconds a batch by load, and where there are none the reason."""
    try:
        ready()
        images = decoding.encoded(decoding.SIZES[request.param], 2 * BATCH)
        starts = {str(load): partial(decoded, load, images) for load in decoding.LOADS}
        times = take_turns(starts, BATCHES, rounds=ROUNDS, finish=torch.cuda.synchronize)
        return request.param, {float(load): seconds for load, seconds in times.items()}, ""
    # ValueError: DALI is there, but does not work on this GPU.
    except (NotMeasuredError, ValueError) as error:
        return request.param, {}, str(error)


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("load", decoding.LOADS)
def test_rate(benchmark: Any, rates: tuple[str, dict[float, list[float]], str], load: float) -> None:
    size, times, reason = rates
    width, height = decoding.SIZES[size]
    shape = f"made photographs, {width} x {height}, to {OUTPUT} px, batch {BATCH}, from memory"
    labels = {"op": OP, "shape": shape, "mode": "both", "contender": f"farl_engine, hw_decoder_load {load:g}"}
    benchmark.group = f"{OP} | {shape}"
    benchmark.extra_info |= labels
    if not times:
        leave_out(labels, reason)
    benchmark.pedantic(CLOCK.load(times[load]), rounds=len(times[load]) if benchmark.enabled else 1)
    if benchmark.enabled:
        stats, ratio = benchmark.stats.stats, Ratio.of(times[load], times[0.65])
        benchmark.extra_info |= {
            "seconds": stats.median,
            "spread_seconds": stats.iqr,
            "timed": f"{ROUNDS} rounds in turns",
            "pictures_per_second": BATCH / stats.median,
            "times_ours": [ratio.median, ratio.low, ratio.high],
        }


def check(benchmark: Any, name: str, run: Callable[[], str | tuple[str, Any]]) -> None:
    """Run a check once and note what it says; there is no time of it."""
    labels = {"op": OP, "shape": CHECKS, "mode": "both", "contender": name}
    try:
        ready()
        said = benchmark.pedantic(run, rounds=1)
        text, data = said if isinstance(said, tuple) else (said, None)
        FACTS.append({"op": OP, "text": text} | ({"data": data} if data is not None else {}))
    except NotMeasuredError as error:
        leave_out(labels, str(error))
    finally:
        clean_up(name)


def test_bad_images_cost_one_sample_each(benchmark: Any, tmp_path: Path) -> None:
    check(benchmark, "bad images", lambda: decoding.recovery(tmp_path, "cuda"))


def test_memory_stays_flat(benchmark: Any, tmp_path: Path) -> None:
    def run() -> tuple[str, Any]:
        used = decoding.memory_course(tmp_path, "cuda")
        assert used[-1] <= (1 + MEMORY_GROWTH) * used[0], f"GPU memory grows: {used}"
        first, last = (f"{used[at] / 2**20:,.0f} MiB" for at in (0, -1))
        return f"GPU memory over 1,000 batches: {first} after 100, {last} at the end.", used

    check(benchmark, "memory", run)


@pytest.mark.parametrize("size", decoding.SIZES)
def test_time_waited(benchmark: Any, tmp_path: Path, size: str) -> None:
    def run() -> tuple[str, Any]:
        shards = decoding.photograph_shards(tmp_path, decoding.SIZES[size], 512)
        shares = decoding.waited(shards, "cuda", BATCH / PAIRS_PER_SECOND, batch=BATCH, steps=60)
        text = (
            f"Steps of {BATCH} pairs at {PAIRS_PER_SECOND:,} pairs/s wait {shares['wait']:.1%} of the time at {size}."
        )
        return text, shares

    check(benchmark, f"time waited, {size}", run)


def test_disagreements_with_the_cpu_decoder(benchmark: Any, tmp_path: Path) -> None:
    def run() -> tuple[str, Any]:
        what, images = decoding.carried_photographs(tmp_path)
        found = decoding.disagreements(images, "cuda")
        differences = found["differences"] or [0.0]
        told = {
            "refused by DALI": found["refused"],
            "bad for the CPU decoder alone": found["taken"],
            f"other pictures (mean difference above {decoding.OTHER_PICTURE:g}/255)": [n for n, _ in found["other"]],
        }
        lists = "; ".join(f"{name}: {', '.join(names[:20]) or 'none'}" for name, names in told.items())
        mean, most = sum(differences) / len(differences), max(differences)
        text = (
            f"On {len(images)} {what}, DALI and the CPU decoder differ by {mean:.2f}/255 (largest {most:.2f}); {lists}."
        )
        return text, found

    check(benchmark, "disagreements", run)
