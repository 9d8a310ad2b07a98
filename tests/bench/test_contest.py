"""A benchmark prints no time for a wrong result, and says why a contender has none."""

from __future__ import annotations

import dataclasses
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import contest, deadline, timing
from bench.contest import Contender, Cost, NotMeasuredError, Problem, compete


class Benchmark:
    """Stands in for pytest-benchmark's fixture."""

    enabled = True

    def __init__(self) -> None:
        self.group = ""
        self.extra_info: dict[str, Any] = {}
        self.calls = 0

    def pedantic(self, target: Callable[[], object], *, rounds: int, warmup_rounds: int) -> None:
        for _ in range(rounds + warmup_rounds):
            target()
            self.calls += 1
        self.stats = types.SimpleNamespace(stats=types.SimpleNamespace(median=0.5, iqr=0.1))


@pytest.fixture(autouse=True)
def light(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ceilings that need no measuring, and a list of missing times of our own."""
    top = {"bytes_per_second": 1e9, "flop_per_second": 1e9}
    monkeypatch.setattr(contest.ceilings, "measured", lambda: top)
    monkeypatch.setattr(contest, "NOT_MEASURED", [])
    yield
    contest._truth.cache_clear()


def product(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


PROBLEM = Problem("product", "6 x 5 x 4", contest.randn((6, 5), (5, 4)), product, Cost(240, 480, 1, 2), wanted=(0, 1))
MODES = pytest.mark.parametrize("mode", contest.MODES)


@MODES
def test_a_right_contender_is_timed(mode: str) -> None:
    benchmark = Benchmark()
    compete(benchmark, PROBLEM, "mine", lambda: Contender(product, ours=True), mode)
    info = benchmark.extra_info
    assert benchmark.calls > 1 and benchmark.group == f"product | 6 x 5 x 4 | {mode}"
    assert info["seconds"] == 0.5 / info["launches"] and info["spread_seconds"] == 0.1 / info["launches"]
    assert info["flop"] == {"forward": 240, "backward": 480, "both": 720}[mode]
    kind = "output" if mode == "forward" else "gradient"
    assert info["errors"] and all(key.startswith(kind) and value < 1e-2 for key, value in info["errors"].items())
    assert not contest.NOT_MEASURED


class Halved(torch.autograd.Function):
    """A right output with half the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] / 2


@pytest.mark.parametrize(
    ("solve", "mode"),
    [
        (lambda a, b: 1.05 * (a @ b), "forward"),
        (lambda a, b: (a @ b) * float("nan"), "forward"),
        (lambda a, b: Halved.apply(a @ b), "both"),
        (lambda a, b: Halved.apply(a @ b), "backward"),
    ],
)
def test_a_wrong_result_gets_no_time(solve: Callable[..., Tensor], mode: str) -> None:
    peer, mine = Benchmark(), Benchmark()
    with pytest.raises(pytest.skip.Exception, match="wrong result"):
        compete(peer, PROBLEM, "peer", lambda: Contender(solve), mode)
    assert peer.calls == 0 and "wrong result" in contest.NOT_MEASURED[0]["reason"]
    with pytest.raises(AssertionError, match="wrong result"):
        compete(mine, PROBLEM, "mine", lambda: Contender(solve, ours=True), mode)
    assert mine.calls == 0 and contest.NOT_MEASURED[1]["reason"].startswith("failed: ")


def test_a_contender_that_cannot_take_part_is_named_with_the_reason() -> None:
    def absent() -> Contender:
        contest.need("a_package_that_nobody_has.part")
        raise AssertionError

    def refuses(a: Tensor, b: Tensor) -> Tensor:
        raise ValueError("product: backend 'triton' cannot run this call: no GPU")

    def breaks(a: Tensor, b: Tensor) -> Tensor:
        raise RuntimeError("illegal memory access\nand more")

    for make, reason in (
        (absent, "a_package_that_nobody_has is not installed"),
        (lambda: Contender(refuses, ours=True), "cannot run this call: no GPU"),
        (lambda: Contender(breaks), "RuntimeError: illegal memory access"),
        (lambda: Contender(product, modes=("both",)), "has no forward pass of its own"),
    ):
        with pytest.raises(pytest.skip.Exception):
            compete(Benchmark(), PROBLEM, "it", make, "forward")
        last = contest.NOT_MEASURED[-1]
        assert reason in last["reason"] and "and more" not in last["reason"]
        assert (last["op"], last["shape"], last["mode"], last["contender"]) == (
            "product",
            PROBLEM.shape,
            "forward",
            "it",
        )
    with pytest.raises(RuntimeError):
        compete(Benchmark(), PROBLEM, "mine", lambda: Contender(breaks, ours=True), "forward")


def test_a_contender_may_have_a_layout_of_its_own() -> None:
    flipped = Contender(
        lambda a, b: b @ a,
        leaves=lambda inputs: tuple(x.T.contiguous() for x in inputs),
        outputs=lambda outputs: (outputs[0].T,),
        cotangents=lambda given: (given[0].T,),
        gradients=lambda grads: tuple(x.T for x in grads),
    )
    for mode in contest.MODES:
        compete(Benchmark(), PROBLEM, "flipped", lambda: flipped, mode)
    partial = dataclasses.replace(flipped, gradients=lambda grads: (grads[0].T, None))
    benchmark = Benchmark()
    compete(benchmark, PROBLEM, "flipped", lambda: partial, "both")
    assert list(benchmark.extra_info["errors"]) == ["gradient 0"]


def test_nothing_starts_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(deadline.VARIABLE, "1000")
    with pytest.raises(pytest.skip.Exception, match="out of time"):
        compete(Benchmark(), PROBLEM, "mine", lambda: Contender(product, ours=True), "forward")
    monkeypatch.setenv(deadline.VARIABLE, "1e12")
    assert not deadline.out_of_time()


def test_no_time_is_taken_on_a_gpu_that_failed_and_nobody_else_is_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    monkeypatch.setattr(contest, "CUDA", True)
    monkeypatch.setattr(contest, "_broken_by", None)
    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    contest.clean_up("culprit")
    contest.clean_up("bystander")
    with pytest.raises(NotMeasuredError, match=r"the GPU failed in culprit \(CUDA error: an illegal memory access"):
        contest.check_ready()


def test_the_tensors_of_a_failed_contender_are_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []

    def exhausts(a: Tensor, b: Tensor) -> Tensor:
        big = a + 1
        made.append(weakref.ref(big))
        raise torch.OutOfMemoryError("CUDA out of memory")

    freed: list[bool] = []

    def look(labels: dict[str, str], reason: str) -> None:
        freed.extend(each() is None for each in made)
        assert reason == "out of memory"

    monkeypatch.setattr(contest, "leave_out", look)
    compete(Benchmark(), PROBLEM, "peer", lambda: Contender(exhausts), "forward")
    assert freed == [True]


def test_inputs_differ_between_sets_and_runs() -> None:
    first, second = contest._drawn(PROBLEM, 1), contest._drawn(PROBLEM, 2)
    assert not torch.equal(first.inputs[0], second.inputs[0])
    assert not torch.equal(first.cotangents[0], second.cotangents[0])


def test_sets_of_inputs_do_not_fit_into_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "CUDA", True)
    monkeypatch.setattr(timing, "l2_bytes", lambda: 60 << 20)
    for size in (1 << 20, 50 << 20, 100 << 20, 1 << 30):
        count = timing.set_count(size)
        assert count == timing.MAX_SETS or count * size >= 4 * (60 << 20)
    assert timing.set_count(1 << 30) == 1


def test_a_benchmarked_call_lasts_long_enough_and_goes_through_all_sets() -> None:
    assert timing.launch_count(1e-5, 7) == 294 and timing.launch_count(1e-9, 3) == 399
    assert timing.launch_count(2.0, 3) == 3
    assert timing.round_count(3e-3) == 30 and timing.round_count(0.1) == 7 and timing.round_count(2.0) == 3


def test_an_unknown_reason_is_not_swallowed() -> None:
    with pytest.raises(NotMeasuredError, match="torch_of_nobody is not installed"):
        contest.need("torch_of_nobody")
