"""Contenders that train the same model, checked against float32 reference ops and then timed: in turns on a CPU.

What is checked is what is timed, on the same batch: the loss, and all gradients together.
"""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.contest import NOT_MEASURED, NotMeasuredError, check_ready, clean_up, in_words, leave_out, record
from bench.interleaved import ROUNDS, Ratio, Replay, take_turns
from bench.results import is_ours
from bench.step_facts import computed_flop, parts_of, predicted_bytes, profiled, step_bytes
from bench.step_training import Case, Training
from bench.timing import CUDA, DEVICE, Timed, prepare, side_stream
from farl_engine.metrics import device_peak_flops

# Relative, of the loss and of all gradients together. Twelve blocks in bfloat16 are not closer than a few percent.
LIMITS = {"float32": (1e-4, 1e-3), "bfloat16": (2e-2, 0.15)}
# A loss, and gradients by name.
Checked = tuple[float, dict[str, Tensor]]
CLOCK = Replay()
# All contenders of a case are compiled and timed in the first one's benchmark, where a C++ compiler takes minutes.
PATIENT = [pytest.mark.timeout(1800)] if importlib.util.find_spec("pytest_timeout") else []
# What the others are compared with in turns.
OURS = "farl"


@dataclass(frozen=True, eq=False)
class Suite:
    """What is compared.

    Args:
        op: how results are grouped.
        contenders: make the training of a case by name.
        truth: makes the training whose loss and gradients are right.
        rate: key of samples a second in the results.
        counted: whose products are counted in place of another's: torch's counter sees none in a compiled graph.
        parted: whether seconds by part and a prediction of memory are told of `OURS`.
    """

    op: str
    contenders: dict[str, Callable[[Case], Training]]
    truth: Callable[[Case], Training]
    rate: str
    counted: dict[str, str]
    parted: bool = False

    def flop_computed(self, name: str, case: Case) -> float:
        return computed_flop(self.contenders[self.counted.get(name, name)], case)


@functools.lru_cache(maxsize=1)
def _truth(make: Callable[[Case], Training], case: Case) -> Checked:
    return make(case).checked()


def compare(found: Checked, truth: Checked, precision: str) -> dict[str, float]:
    """Relative errors of the loss and of the gradients; NotMeasuredError where they are too large."""
    (loss, grads), (right, exact) = found, truth
    missing = exact.keys() - grads.keys()
    if missing:
        raise NotMeasuredError(f"wrong result: no gradient for {sorted(missing)[0]}")
    squares = sum((grads[key].double() - exact[key].double()).square().sum().item() for key in exact)
    norm = sum(x.double().square().sum().item() for x in exact.values())
    errors = {"loss": abs(loss / right - 1), "gradients": (squares / norm) ** 0.5}
    for (what, error), limit in zip(errors.items(), LIMITS[precision], strict=True):
        if not error <= limit:
            raise NotMeasuredError(f"wrong result: relative error of the {what} is {error:.2g}, allowed {limit:.2g}")
    return errors


def checked(suite: Suite, name: str, case: Case) -> tuple[Training, dict[str, Any]]:
    """A contender that is right, and what is told of it besides its time."""
    truth = _truth(suite.truth, case.in_full_precision)
    info: dict[str, Any] = {"flop_computed": suite.flop_computed(name, case)}
    training = suite.contenders[name](case)
    begun = time.perf_counter()
    found = training.checked()
    # Compilation is in it, of both passes.
    info["first_call_seconds"] = time.perf_counter() - begun
    info["errors"] = compare(found, truth, case.precision)
    return training, info


def told(suite: Suite, name: str, case: Case, training: Training) -> dict[str, Any]:
    """Parts and memory, once the training is warm."""
    info: dict[str, Any] = {}
    if suite.parted and name == OURS:
        profile = profiled(training, case)
        info |= {"parts": parts_of(profile), "parts_seconds": profile.seconds}
        info["predicted_bytes"] = predicted_bytes(case)
    if not CUDA:
        info["peak_bytes"] = step_bytes(training)
    return info


def run(suite: Suite, benchmark: Any, request: pytest.FixtureRequest, case: Case, name: str) -> None:
    """The benchmark of contender `name`; skips with the reason where it cannot be measured."""
    labels = {"op": suite.op, "shape": case.shape, "mode": "both", "contender": name}
    benchmark.group = f"{suite.op} | {case.shape}"
    benchmark.extra_info |= labels
    reason = None
    try:
        check_ready()
        if CUDA:
            _alone(suite, benchmark, case, name)
        else:
            _in_turns(suite, benchmark, case, name, selected(request, case))
    except NotMeasuredError as error:
        reason = str(error)
    except torch.OutOfMemoryError:
        reason = "out of memory"
    except ImportError as error:
        reason = f"import failed: {error}"
    except Exception as error:
        reason = in_words(error)
        if is_ours(name):
            NOT_MEASURED.append(labels | {"reason": f"failed: {reason}"})
            raise
    finally:
        # After the except clauses: what they caught held the model and its activations.
        clean_up(f"{name}, {case.shape}")
    if reason is None:
        return
    if is_ours(name) and "wrong result" in reason:
        NOT_MEASURED.append(labels | {"reason": reason})
        raise AssertionError(reason)
    leave_out(labels, reason)


def each_contender(cases: Mapping[Any, list[str]]) -> Callable[[Callable[..., None]], Any]:
    """Runs a test for each of `cases`, as argument `case`, and each of its contenders, as `name`."""
    pairs = [(case, name) for case, names in cases.items() for name in names]
    marks = [
        *PATIENT,
        pytest.mark.benchmark(timer=time.perf_counter if CUDA else CLOCK),
        pytest.mark.parametrize(
            ("case", "name"), pairs, ids=lambda value: value if isinstance(value, str) else value.shape
        ),
    ]

    def marked(test: Callable[..., None]) -> Any:
        for mark in marks:
            test = mark(test)
        return test

    return marked


def selected(request: pytest.FixtureRequest, case: Case) -> tuple[str, ...]:
    """The contenders of `case` whose benchmarks pytest was told to run."""
    found = (getattr(item, "callspec", None) for item in request.session.items)
    return tuple(spec.params["name"] for spec in found if spec is not None and spec.params.get("case") == case)


def _alone(suite: Suite, benchmark: Any, case: Case, name: str) -> None:
    """On a GPU, whose memory holds one contender at a time and whose times are steady."""
    with side_stream():
        training, info = checked(suite, name, case)
        torch.cuda.reset_peak_memory_stats()
        timed = prepare([training], capture=name.endswith("CUDA graph"), rounds=7)
        if name.endswith("CUDA graph") and not timed.captured:
            raise NotMeasuredError(f"cannot be captured: {timed.failure}")
        benchmark.pedantic(timed, rounds=timed.rounds, warmup_rounds=1)
        info["peak_bytes"] = torch.cuda.max_memory_allocated()
        if benchmark.enabled:
            info |= told(suite, name, case, training)
    _record(suite, benchmark, case, timed, info)


def _in_turns(suite: Suite, benchmark: Any, case: Case, name: str, names: tuple[str, ...]) -> None:
    found = _turns(suite, case, names, ROUNDS if benchmark.enabled else 1)
    if name in found.failures:
        raise found.failures[name]
    seconds = found.seconds[name]
    jump = CLOCK.load(seconds)
    benchmark.pedantic(jump, rounds=len(seconds))
    info = found.infos[name]
    if OURS in found.seconds:
        ratio = Ratio.of(seconds, found.seconds[OURS])
        info["times_ours"] = [ratio.median, ratio.low, ratio.high]
    _record(suite, benchmark, case, Timed(jump, 1, False, len(seconds)), info)
    benchmark.extra_info["timed"] = f"{len(seconds)} rounds in turns"


@dataclass
class _Turns:
    """Of all contenders of a case: seconds a round, what else is told, and why one has none."""

    seconds: dict[str, list[float]]
    infos: dict[str, dict[str, Any]]
    failures: dict[str, Exception]


@functools.lru_cache(maxsize=1)
def _turns(suite: Suite, case: Case, names: tuple[str, ...], rounds: int) -> _Turns:
    trainings: dict[str, Training] = {}
    found = _Turns({}, {}, {})
    for name in names:
        try:
            training, info = checked(suite, name, case)
            found.infos[name] = info | told(suite, name, case, training)
            trainings[name] = training
        except Exception as error:
            # Without the frames, which hold its model.
            found.failures[name] = error.with_traceback(None)
    starts = {name: partial(_steps, training) for name, training in trainings.items()}
    found.seconds = take_turns(starts, 1, first=0, rounds=rounds)
    return found


def _steps(training: Training) -> Generator[None, None, None]:
    while True:
        training()
        yield


def _record(suite: Suite, benchmark: Any, case: Case, timed: Timed, info: dict[str, Any]) -> None:
    if not benchmark.enabled:
        return
    record(benchmark, timed, case.flop, 0.0, peak_flop_per_second=device_peak_flops(DEVICE), **info)
    benchmark.extra_info[suite.rate] = case.pairs / benchmark.extra_info["seconds"]
