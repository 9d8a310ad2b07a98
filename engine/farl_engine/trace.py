"""Where the time of recorded updates went, read from a trace that torch.profiler exported.

The trace is Chrome's: events with a start and a duration in microseconds. An update is a window ("ProfilerStep#k"), a
part of it a range named `PART + name` on the same thread. Work of the backward pass belongs to the part whose forward
pass made it: autograd numbers the nodes of a graph in the order in which they are made, and the trace has that number
both at the op that made a node and at the node's own run.
"""

from __future__ import annotations

import bisect
import heapq
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

PART = "part: "
# The profiler's own wait at the end, so that the last window holds all its work.
DRAIN = "profiler: wait for the device"
# Parts that need no range: the rest of an update, and device time that is no part's work.
OTHER = "other"
DATA_WAIT = "data wait"
DEVICE_IDLE = "device idle"
OTHER_THREADS = "other threads"

_WINDOW = "ProfilerStep#"
_NODE = "autograd::engine::evaluate_function: "
# These nodes belong to parameters, and run the hooks that send gradients to the other processes.
_LEAF = "AccumulateGrad"
_NUMBER, _MAKING_THREAD = "Sequence number", "Fwd thread id"
_DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
_CALLS = ("cuda_runtime", "cuda_driver")
_SYNCS = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cuStreamSynchronize"}
_MICROSECOND = 1e-6

Event = dict[str, Any]


@dataclass(frozen=True)
class PartTime:
    """Seconds that an update spends on one part.

    Over all parts `forward` and `backward` add up to the whole update. Without a device they are times of the host.
    With one they are times in which the device was at work on the part, and `host` is what it took to start that work.
    """

    forward: float
    backward: float
    host: float

    @property
    def seconds(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class OpTime:
    """One kind of op in an update: calls, seconds of the host without the ops inside, seconds of its own kernels."""

    name: str
    calls: float
    host: float
    device: float


@dataclass(frozen=True)
class KernelTime:
    """One kind of kernel in an update; of two that run side by side both count in full."""

    name: str
    calls: float
    seconds: float


@dataclass(frozen=True)
class DeviceTime:
    """The device in an update: seconds at work and idle, kernels, and calls in which the host waited for it."""

    busy: float
    idle: float
    launches: float
    host_syncs: dict[str, float]
    kernels: list[KernelTime]


@dataclass(frozen=True)
class Breakdown:
    """The mean of `updates` recorded updates; `parts` in the order of their first time, ops longest first."""

    updates: int
    seconds: float
    parts: dict[str, PartTime]
    ops: list[OpTime]
    device: DeviceTime | None


class Label(NamedTuple):
    """What a moment is spent on."""

    part: str
    backward: bool = False


class Interval(NamedTuple):
    start: float
    end: float
    label: Label
    rank: int = 0


class Timeline:
    """Every moment with one label: of the intervals over it that of the highest rank, then the one begun last."""

    def __init__(self, intervals: Iterable[Interval]) -> None:
        self.pieces: list[Interval] = []
        waiting = sorted(enumerate(intervals), key=lambda item: (item[1].start, item[0]))
        moments = sorted({moment for _, i in waiting for moment in (i.start, i.end)})
        active: list[tuple[int, float, int, Interval]] = []
        begun = 0
        for start, end in pairwise(moments):
            while begun < len(waiting) and waiting[begun][1].start <= start:
                order, interval = waiting[begun]
                heapq.heappush(active, (-interval.rank, -interval.start, -order, interval))
                begun += 1
            while active and active[0][3].end <= start:
                heapq.heappop(active)
            if active:
                self.pieces.append(Interval(start, end, active[0][3].label))
        self._starts = [piece.start for piece in self.pieces]

    def at(self, moment: float) -> Label | None:
        """The label of a moment, None where no interval is."""
        index = bisect.bisect_right(self._starts, moment) - 1
        return self.pieces[index].label if index >= 0 and moment < self.pieces[index].end else None

    def totals(self) -> dict[Label, float]:
        """The length of each label, in the order of their first moments."""
        found: dict[Label, float] = {}
        for start, end, label, _ in self.pieces:
            found[label] = found.get(label, 0.0) + end - start
        return found


def read_trace(events: Iterable[Event], updates: int) -> Breakdown:
    """Share out the time of the first `updates` windows of a trace's events.

    Raises:
        ValueError: there are not that many windows.
    """
    whole = sorted((e for e in events if e.get("ph") == "X"), key=lambda e: (e["ts"], -e["dur"]))
    windows = [e for e in whole if e.get("cat") == "user_annotation" and e["name"].startswith(_WINDOW)][:updates]
    if not windows or len(windows) < updates:
        raise ValueError(f"the trace has {len(windows)} updates, {updates} were asked for")
    begin, end, thread = windows[0]["ts"], _end(windows[-1]), windows[0]["tid"]

    inside = [e for e in whole if begin <= e["ts"] < end]
    ranges = [e for e in inside if e.get("cat") == "user_annotation" and e["tid"] == thread]
    ops = [e for e in inside if e.get("cat") == "cpu_op"]
    named = [Interval(begin, end, Label(OTHER))]
    for event in ranges:
        if event["name"].startswith(PART) or event["name"] == DRAIN:
            named.append(Interval(event["ts"], _end(event), Label(event["name"].removeprefix(PART))))
    nodes = list(_nodes_of_parts(ops, thread, Timeline(named)))
    threads = {thread, *(event["tid"] for event, _ in nodes)}
    host = Timeline([*named, *(Interval(event["ts"], _end(event), label) for event, label in nodes)])

    host_totals = host.totals()
    drained = host_totals.pop(Label(DRAIN), 0.0)
    work = [e for e in whole if e.get("cat") in _DEVICE_WORK and e["ts"] < end and _end(e) > begin]
    calls = {_argument(e, "correlation"): e for e in whole if e.get("cat") in _CALLS}
    totals, device = host_totals, None
    if work:
        totals = _device_totals(work, calls, threads, host, begin, end)
        kept = [e for e in calls.values() if begin <= e["ts"] < end and e["tid"] in threads]
        waits = Counter(e["name"] for e in kept if e["name"] in _SYNCS and host.at(e["ts"]) != Label(DRAIN))
        device = _device_time(work, totals, waits, updates)
    scale = _MICROSECOND / updates
    parts = {
        name: PartTime(
            totals.get(Label(name), 0.0) * scale,
            totals.get(Label(name, backward=True), 0.0) * scale,
            sum(host_totals.get(Label(name, backward), 0.0) for backward in (False, True)) * scale,
        )
        for name in dict.fromkeys(label.part for label in (*host_totals, *totals))
    }
    own_ops = [e for e in ops if e["tid"] in threads]
    length = end - begin - (0.0 if work else drained)
    return Breakdown(updates, length * scale, parts, _op_times(own_ops, work, calls, updates), device)


def _nodes_of_parts(ops: list[Event], thread: int, forward: Timeline) -> Iterator[tuple[Event, Label]]:
    """Runs of backward nodes that some part's forward pass made, with the label of their time."""
    makers: dict[int, float] = {}
    for event in ops:
        if event["tid"] == thread and not _argument(event, _MAKING_THREAD) and _argument(event, _NUMBER) is not None:
            # Ops that make no node carry the number of the next one: the last op with a number is the node's.
            makers[_argument(event, _NUMBER)] = event["ts"]
    numbers = sorted(makers)
    for event in ops:
        number = _argument(event, _NUMBER)
        if not event["name"].startswith(_NODE) or _LEAF in event["name"] or number is None:
            continue
        index = bisect.bisect_right(numbers, number) - 1
        label = forward.at(makers[numbers[index]]) if index >= 0 else None
        if label is not None and label.part != OTHER:
            yield event, Label(label.part, backward=True)


def _device_totals(
    work: list[Event], calls: dict[Any, Event], threads: set[int], host: Timeline, begin: float, end: float
) -> dict[Label, float]:
    """Microseconds of the device: each moment is that of the part which started what runs then.

    Where several things run at once the moment is a computation's before an exchange's, and that before a copy's and
    those of other threads: what runs beside the computation costs nothing.
    """
    intervals = [Interval(begin, end, Label(DEVICE_IDLE), rank=-1)]
    for event in work:
        call = calls.get(_argument(event, "correlation"))
        label, rank = Label(OTHER_THREADS), 0
        if call is not None and call["tid"] in threads:
            label = host.at(call["ts"]) or Label(OTHER)
            rank = 2 if event["cat"] == "kernel" else 0
            rank -= "nccl" in event["name"].lower()
        intervals.append(Interval(max(begin, event["ts"]), min(end, _end(event)), label, rank))
    timeline = Timeline(intervals)
    totals = timeline.totals()
    # A device that is idle while the host waits for a batch waits for it too.
    waits = [piece for piece in host.pieces if piece.label.part == DATA_WAIT]
    idle = [piece for piece in timeline.pieces if piece.label.part == DEVICE_IDLE]
    starved = sum(max(0.0, min(a.end, b.end) - max(a.start, b.start)) for a in waits for b in idle)
    if waits:
        totals[Label(DATA_WAIT)] = totals.get(Label(DATA_WAIT), 0.0) + starved
        totals[Label(DEVICE_IDLE)] = totals.get(Label(DEVICE_IDLE), 0.0) - starved
    return totals


def _device_time(work: list[Event], totals: dict[Label, float], waits: Counter[str], updates: int) -> DeviceTime:
    scale = _MICROSECOND / updates
    # What a copy takes of the data wait is small, and the device does nothing else then.
    idle = totals.get(Label(DEVICE_IDLE), 0.0) + totals.get(Label(DATA_WAIT), 0.0)
    by_name: dict[str, list[float]] = {}
    for event in work:
        by_name.setdefault(event["name"], []).append(event["dur"])
    kernels = [KernelTime(name, len(times) / updates, sum(times) * scale) for name, times in by_name.items()]
    return DeviceTime(
        busy=(sum(totals.values()) - idle) * scale,
        idle=idle * scale,
        launches=sum(event["cat"] == "kernel" for event in work) / updates,
        host_syncs={name: count / updates for name, count in waits.items()},
        kernels=sorted(kernels, key=lambda kernel: -kernel.seconds),
    )


def _op_times(ops: list[Event], work: list[Event], calls: dict[Any, Event], updates: int) -> list[OpTime]:
    own = [event["dur"] for event in ops]
    open_ops: dict[int, list[int]] = {}
    for index, event in enumerate(ops):
        outer = open_ops.setdefault(event["tid"], [])
        while outer and _end(ops[outer[-1]]) <= event["ts"]:
            outer.pop()
        if outer:
            own[outer[-1]] -= event["dur"]
        outer.append(index)
    names = [
        "autograd's engine" if e["name"].startswith(_NODE) else e["name"].removeprefix("torch::autograd::") for e in ops
    ]
    place = {_argument(event, "External id"): index for index, event in enumerate(ops)}
    on_device = [0.0] * len(ops)
    for event in work:
        call = calls.get(_argument(event, "correlation"))
        index = place.get(_argument(call, "External id")) if call is not None else None
        if index is not None:
            on_device[index] += event["dur"]
    found: dict[str, list[float]] = {}
    for name, host, device in zip(names, own, on_device, strict=True):
        sums = found.setdefault(name, [0.0, 0.0, 0.0])
        for position, value in enumerate((1.0, host * _MICROSECOND, device * _MICROSECOND)):
            sums[position] += value / updates
    times = [OpTime(name, *sums) for name, sums in found.items()]
    return sorted(times, key=lambda op: (-op.device, -op.host))


def _end(event: Event) -> float:
    return event["ts"] + event["dur"]


def _argument(event: Event, name: str) -> Any:
    return event.get("args", {}).get(name)
