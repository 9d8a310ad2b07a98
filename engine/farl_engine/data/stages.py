"""Which stage of the loader the step waits for, from the loader's times."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STAGES = ("read", "decode", "text", "device_decode")
# A step that waits for data less than this share of the time does not wait for data.
WAITS = 0.02

ADVICE = {
    "step": "the loader keeps up",
    "read": "faster storage, --shard-cache for remote shards, or more --threads",
    "decode": "more --threads while cores are free, --decoder dali on a GPU, or smaller images",
    "text": "more --threads while cores are free",
    "device_decode": "smaller images, or --decoder cpu where cores are free",
}


def stage_shares(times: Mapping[str, float], seconds: float) -> dict[str, float]:
    """How busy the loader was over an interval.

    Args:
        times: of `Loader.stage_times`. seconds: how long the interval was.

    Returns:
        "read", "decode" and "text" as shares of all loader threads' time (of the step's own time without threads),
        "device_decode" and "wait" as shares of the interval, and "queue_depth", the mean number of batches that were
        ready when the step asked for one. All 0 for an interval of no length.
    """
    per_thread = seconds * max(times["threads"], 1)
    lengths = {"read": per_thread, "decode": per_thread, "text": per_thread, "device_decode": seconds}
    shares = {stage: times[stage] / length if length else 0.0 for stage, length in lengths.items()}
    wait = times["wait_for_batch"] / seconds if seconds else 0.0
    return shares | {"wait": wait, "queue_depth": times["mean_queue_depth"]}


def bottleneck(shares: Mapping[str, float]) -> str:
    """The name of what holds training up: "step" where data hardly waits, else one of `STAGES`.

    The threads work one after the other on a sample, so the stage that takes most of their time is the one to speed
    up; the device decodes beside them, and is the one where it is busier than they are.
    """
    if shares["wait"] < WAITS:
        return "step"
    in_threads = ("read", "decode", "text")
    if shares["device_decode"] > sum(shares[stage] for stage in in_threads):
        return "device_decode"
    return max(in_threads, key=lambda stage: shares[stage])


def loader_figures(times: Mapping[str, float], seconds: float) -> dict[str, Any]:
    """The shares, rounded, with the bottleneck's name: what a line of the log holds under "loader"."""
    shares = stage_shares(times, seconds)
    return {name: round(value, 4) for name, value in shares.items()} | {"bottleneck": bottleneck(shares)}
