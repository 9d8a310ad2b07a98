"""The bottleneck is named by where the loader's time went."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from farl_engine.data import CropPlan, Loader, SampleOrder, ShardIndex
from farl_engine.data.stages import ADVICE, STAGES, bottleneck, loader_figures, stage_shares


def times_of(**seconds: float) -> dict[str, float]:
    names = (*STAGES, "wait_for_batch", "queue_depth", "mean_queue_depth")
    return dict.fromkeys(names, 0.0) | {"threads": 4.0} | seconds


def test_shares_are_of_all_threads_and_of_the_interval() -> None:
    times = times_of(read=2, decode=30, text=4, device_decode=5, wait_for_batch=1, queue_depth=3, mean_queue_depth=1.5)
    shares = stage_shares(times, 10.0)
    assert shares == {
        "read": 0.05, "decode": 0.75, "text": 0.1, "device_decode": 0.5, "wait": 0.1, "queue_depth": 1.5
    }  # fmt: skip
    assert stage_shares(times | {"threads": 0.0}, 10.0)["decode"] == 3.0  # made in the step's own time
    assert set(stage_shares(times_of(), 0.0).values()) == {0.0}


@pytest.mark.parametrize(
    ("seconds", "name"),
    [
        ({"decode": 39, "wait_for_batch": 0.19}, "step"),
        ({"decode": 39, "wait_for_batch": 0.21}, "decode"),
        ({"read": 20, "decode": 19, "wait_for_batch": 5}, "read"),
        ({"text": 30, "decode": 9, "wait_for_batch": 5}, "text"),
        # Threads busy for a quarter of the time, the device for nearly all of it.
        ({"read": 8, "decode": 2, "device_decode": 9.5, "wait_for_batch": 5}, "device_decode"),
        ({"read": 38, "decode": 1, "device_decode": 9.5, "wait_for_batch": 5}, "read"),
    ],
)
def test_bottleneck(seconds: dict[str, float], name: str) -> None:
    shares = stage_shares(times_of(**seconds), 10.0)
    assert bottleneck(shares) == name
    assert ADVICE[name]
    assert loader_figures(times_of(**seconds), 10.0)["bottleneck"] == name


class _SlowDecoder:
    """Sleeps instead of decoding."""

    image_size, token_size = 4, None

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def decode_into(self, data: bytes, plan: CropPlan, parameters: Any, image: Any, tokens: Any) -> None:
        time.sleep(self.seconds)
        image[...] = np.uint8(0)


@pytest.mark.parametrize(("decode", "step", "name"), [(0.01, 0.0, "decode"), (0.0, 0.1, "step")])
def test_a_loaders_own_times_name_it(make_shards: Any, decode: float, step: float, name: str) -> None:
    shards: list[Path] = make_shards([16], side=8)
    index = ShardIndex.build(shards)
    order = SampleOrder(len(index), 8, seed=0)
    with Loader(index, order, decoder=_SlowDecoder(decode), plan=CropPlan(), seed=0) as loader:
        batches = iter(loader)
        next(batches)
        loader.stage_times()
        begun = time.monotonic()
        for _ in itertools.islice(batches, 4):
            time.sleep(step)
        figures = loader_figures(loader.stage_times(), time.monotonic() - begun)
    assert figures["bottleneck"] == name, figures
    assert (figures["queue_depth"] > 1) == (name == "step")
