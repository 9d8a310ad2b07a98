"""A made-up trace, whose every microsecond is known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from farl_engine.trace import DRAIN, PART, Interval, Label, Timeline, read_trace

MAIN, AUTOGRAD, LOADER, DEVICE = 1, 2, 3, 0
MICRO = 1e-6


def event(category: str, name: str, start: float, end: float, thread: int = MAIN, **arguments: Any) -> dict[str, Any]:
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "ts": start,
        "dur": end - start,
        "tid": thread,
        "args": {key.replace("_", " "): value for key, value in arguments.items()},
    }


def part(name: str, start: float, end: float) -> dict[str, Any]:
    return event("user_annotation", PART + name, start, end)


def made(name: str, start: float, end: float, number: int, thread: int = MAIN) -> dict[str, Any]:
    return event("cpu_op", name, start, end, thread, Sequence_number=number, Fwd_thread_id=0)


def node(name: str, start: float, end: float, number: int | None, thread: int = MAIN) -> dict[str, Any]:
    numbers = {} if number is None else {"Sequence_number": number, "Fwd_thread_id": 1}
    return event("cpu_op", f"autograd::engine::evaluate_function: {name}", start, end, thread, **numbers)


def update(start: float, first_number: int, backward_thread: int = MAIN) -> Iterator[dict[str, Any]]:
    """100 us: wait 10, tower 30 with a head of 10 in it, backward 40 (15 of the tower, 20 of the head), other 20."""
    n = first_number
    yield event("user_annotation", f"ProfilerStep#{n}", start, start + 100)
    yield part("data wait", start, start + 10)
    yield part("tower", start + 10, start + 40)
    yield made("mm", start + 12, start + 20, n)
    # It makes no node, so its number is that of the next op, which is in another part.
    yield made("detach", start + 20, start + 22, n + 1)
    yield part("head", start + 25, start + 35)
    yield made("linear", start + 26, start + 34, n + 1)
    yield made("addmm", start + 27, start + 33, n + 2)
    yield made("add", start + 41, start + 43, n + 3)
    yield part("gradients", start + 45, start + 85)
    yield node("Add", start + 45, start + 46, n + 3, backward_thread)
    yield node("Addmm", start + 46, start + 56, n + 2, backward_thread)
    yield node("T", start + 56, start + 66, n + 1, backward_thread)
    yield node("torch::autograd::AccumulateGrad", start + 66, start + 68, None, backward_thread)
    yield node("Mm", start + 68, start + 83, n, backward_thread)
    yield event("cpu_op", "mm", start + 70, start + 80, backward_thread)


@pytest.mark.parametrize("backward_thread", [MAIN, AUTOGRAD])
def test_each_microsecond_goes_to_one_part(backward_thread: int) -> None:
    events = [*update(1000, 10, backward_thread), *update(1100, 20, backward_thread), *update(1200, 30)]
    events.append({"ph": "i", "name": "no duration", "ts": 1000})
    found = read_trace(events[::-1], 2)
    assert found.updates == 2 and found.device is None
    assert found.seconds == pytest.approx(100 * MICRO)
    wanted = {
        "data wait": (10, 0),
        "tower": (20, 15),
        "head": (10, 20),
        "gradients": (5, 0),
        "other": (20, 0),
    }
    assert found.parts.keys() == wanted.keys()
    for name, (forward, backward) in wanted.items():
        assert found.parts[name].forward == pytest.approx(forward * MICRO), name
        assert found.parts[name].backward == pytest.approx(backward * MICRO), name
        assert found.parts[name].host == pytest.approx((forward + backward) * MICRO), name
    ops = {op.name: op for op in found.ops}
    assert ops["mm"].calls == 2 and ops["mm"].host == pytest.approx(18 * MICRO)
    assert ops["linear"].host == pytest.approx(2 * MICRO)
    assert ops["autograd's engine"].host == pytest.approx(28 * MICRO)


def test_time_of_the_device_goes_to_the_part_that_started_its_work() -> None:
    def launch(number: int, start: float, thread: int = MAIN, op: int = 0) -> dict[str, Any]:
        return event("cuda_runtime", "cudaLaunchKernel", start, start + 1, thread, correlation=number, External_id=op)

    def work(category: str, name: str, start: float, end: float, number: int) -> dict[str, Any]:
        return event(category, name, start, end, DEVICE, correlation=number)

    events = [*update(0, 10, AUTOGRAD)]
    events[3]["args"]["External id"] = 7
    events += [
        launch(1, 13, op=7),
        work("kernel", "gemm", 20, 50, 1),
        launch(2, 47, AUTOGRAD),
        work("kernel", "gemm", 50, 60, 2),
        # An exchange beside a computation and 10 us after it.
        launch(3, 67, AUTOGRAD),
        work("kernel", "ncclDevKernel_AllReduce", 55, 70, 3),
        # The loader's copy, half of it beside a computation.
        launch(4, 30, LOADER),
        work("gpu_memcpy", "Memcpy HtoD", 15, 25, 4),
        event("cuda_runtime", "cudaStreamSynchronize", 87, 88, correlation=5),
        event("cuda_runtime", "cudaStreamSynchronize", 87, 88, LOADER, correlation=6),
        event("user_annotation", DRAIN, 90, 95),
        event("cuda_runtime", "cudaDeviceSynchronize", 91, 94, correlation=8),
    ]
    found = read_trace(events, 1)
    assert found.device is not None
    assert found.seconds == pytest.approx(100 * MICRO)
    on_device = {name: (time.forward / MICRO, time.backward / MICRO) for name, time in found.parts.items()}
    assert on_device["tower"] == pytest.approx((30, 0))
    assert on_device["head"] == pytest.approx((0, 10))
    assert on_device["gradients"] == pytest.approx((10, 0))
    assert on_device["other threads"] == pytest.approx((5, 0))
    assert on_device["data wait"] == pytest.approx((10, 0))
    assert on_device["device idle"] == pytest.approx((35, 0))
    assert sum(map(sum, on_device.values())) == pytest.approx(100)
    assert found.parts["tower"].host == pytest.approx(35 * MICRO)
    assert found.device.busy == pytest.approx(55 * MICRO) and found.device.idle == pytest.approx(45 * MICRO)
    assert found.device.launches == 3
    assert found.device.host_syncs == {"cudaStreamSynchronize": 1}
    assert (found.device.kernels[0].name, found.device.kernels[0].calls) == ("gemm", 2)
    assert found.device.kernels[0].seconds == pytest.approx(40 * MICRO)
    assert found.ops[0].name == "mm" and found.ops[0].device == pytest.approx(30 * MICRO)


def test_fewer_updates_than_asked_for_are_an_error() -> None:
    with pytest.raises(ValueError, match="1 updates, 2 were asked for"):
        read_trace(list(update(0, 10)), 2)


def test_of_overlapping_intervals_the_highest_rank_counts_then_the_last_begun() -> None:
    a, b, c = Label("a"), Label("b"), Label("c")
    timeline = Timeline([Interval(0, 10, a), Interval(2, 12, b), Interval(4, 5, c, rank=-1), Interval(20, 21, c)])
    assert [(piece.start, piece.end, piece.label) for piece in timeline.pieces if piece.label is a] == [(0, 2, a)]
    assert timeline.totals() == {a: 2, b: 10, c: 1}
    assert timeline.at(1) == a and timeline.at(4.5) == b and timeline.at(15) is None and timeline.at(-1) is None
