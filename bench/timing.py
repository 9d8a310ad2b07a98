"""How a call is timed: on a GPU as one replay of a CUDA graph of many launches, on a CPU as a plain loop.

Calls rotate among several sets of inputs that together do not fit in the cache.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# One benchmarked call lasts this long, so that its synchronisation (about 10 us) does not show.
CALL_SECONDS = 3e-3
MEASURE_SECONDS = 0.12
MAX_LAUNCHES, MAX_SETS = 400, 24
# A call that takes this long needs no warming up beyond its check.
SLOW_SECONDS = 0.2


def l2_bytes() -> int:
    """Size of the GPU's last-level cache; 0 on a CPU."""
    return torch.cuda.get_device_properties(0).L2_cache_size if CUDA else 0


def set_count(bytes_of_one: int) -> int:
    """How many sets of inputs of `bytes_of_one` to rotate among: four times the cache in all."""
    if not CUDA:
        return 2
    return max(1, min(MAX_SETS, math.ceil(4 * l2_bytes() / max(1, bytes_of_one))))


@dataclass
class Timed:
    """What the benchmark calls: `launches` calls of the contender, then a synchronisation.

    Attributes:
        captured: whether it is one replay of a CUDA graph; else the calls are made one by one.
        rounds: how often to measure it.
        refresh: replays the graph and returns what its first launch made; None without a graph.
        failure: why there is no graph.
    """

    run: Callable[[], object]
    launches: int
    captured: bool
    rounds: int
    refresh: Callable[[], Any] | None = None
    failure: str | None = None

    def __call__(self) -> None:
        self.run()
        if CUDA:
            torch.cuda.synchronize()


def prepare(
    calls: list[Callable[[], Any]],
    *,
    capture: bool = True,
    rounds: int | None = None,
    given: tuple[torch.Tensor, ...] = (),
) -> Timed:
    """Warm up and make a `Timed` that goes through `calls`, one for each set of inputs, again and again.

    On a GPU it must run on the stream of :func:`side_stream`, on which graphs are captured. `given` are the tensors
    that the first call reads: they are not overwritten if it returns one of them.
    """
    seconds = _warm_up(calls)
    if not CUDA:
        return Timed(lambda: [call() for call in calls], len(calls), False, rounds or (5 if seconds < 0.5 else 3))
    launches = launch_count(seconds, len(calls))
    failure = "not asked for"
    if capture:
        try:
            _without_waiting(calls[0])
            timed = _captured(calls, launches, given)
            # Launch gaps of eager calls are gone: the time of a replay says how many launches are wanted.
            seconds = _event_seconds(timed.run) / launches
            if launches * seconds < CALL_SECONDS / 2 and launches < MAX_LAUNCHES:
                timed = _captured(calls, launch_count(seconds, len(calls)), given)
            timed.rounds = rounds or round_count(timed.launches * seconds)
            return timed
        except Exception as error:
            failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            torch.cuda.synchronize()
    ordered = list(itertools.islice(itertools.cycle(calls), launches))
    chosen = rounds or round_count(launches * seconds)
    return Timed(lambda: [call() for call in ordered], launches, False, chosen, failure=failure)


def launch_count(seconds: float, sets: int) -> int:
    """How many calls of `seconds` make one benchmarked call: a multiple of the number of sets of inputs."""
    wanted = max(sets, min(MAX_LAUNCHES, round(CALL_SECONDS / seconds)))
    return wanted - wanted % sets


def round_count(seconds: float) -> int:
    """How often to measure a benchmarked call of `seconds`."""
    return max(7 if seconds < 0.3 else 3, min(30, round(MEASURE_SECONDS / seconds)))


def side_stream() -> Any:
    """Context of the stream on which everything of a contest runs: graphs cannot be captured on the default one."""
    stream = _stream()
    stream.wait_stream(torch.cuda.current_stream())
    return torch.cuda.stream(stream)


@functools.cache
def _stream() -> torch.cuda.Stream:
    # One for all: PyTorch keeps freed memory and cuBLAS its workspace apart for each stream.
    return torch.cuda.Stream()


def _warm_up(calls: list[Callable[[], Any]]) -> float:
    """Call everything at least once; returns the seconds of one call, roughly."""
    if not CUDA:
        calls[0]()
        start = time.perf_counter()
        calls[0]()
        return time.perf_counter() - start
    first = _event_seconds(calls[0])
    if first > SLOW_SECONDS and len(calls) == 1:
        return first
    for call in calls:
        call()
    return statistics.median(_event_seconds(call) for call in (calls * 3)[:3])


def _event_seconds(call: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return max(1e-6, start.elapsed_time(end) * 1e-3)


def _without_waiting(call: Callable[[], Any]) -> None:
    """Call it; RuntimeError if it waits for the device, which cannot be captured.

    To find that out by capturing would leave PyTorch's random numbers and its allocator in capture for good.
    """
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _captured(calls: list[Callable[[], Any]], launches: int, given: tuple[torch.Tensor, ...]) -> Timed:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    first: Any = None
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        first = calls[0]()
        for call in itertools.islice(itertools.cycle(calls), 1, launches):
            call()
    inputs = {x.data_ptr() for x in given}

    def refresh() -> Any:
        for x in tensors(first):
            if x.is_floating_point() and x.data_ptr() not in inputs:
                x.detach().fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        return first

    return Timed(graph.replay, launches, True, 0, refresh)


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors in a tensor, or in nested tuples and lists of them."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [x for part in value for x in tensors(part)]
    return []
