"""One benchmark: a contender solves a problem, is checked against float64, and only then timed.

A suite describes its problems (inputs, truth, cost) and its contenders (ours and peers); `compete` does the rest.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import ceilings
from bench.deadline import out_of_time
from bench.timing import CUDA, DEVICE, Timed, prepare, set_count, side_stream

Tensors = tuple[Tensor, ...]
MODES = ("both", "forward", "backward")
DTYPE = torch.bfloat16 if CUDA else torch.float32
# Largest ||result - truth|| / ||truth|| at which a time is printed.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 2e-2}

# Of this process: {"op", "shape", "mode", "contender", "reason"}; conftest.py writes it into the results.
NOT_MEASURED: list[dict[str, str]] = []
# What was found besides times: {"op", "text"} and, where it helps, "data"; the report prints the text with the op.
FACTS: list[dict[str, Any]] = []


# The benchmark after which no CUDA call works any more, and nobody's time can be taken.
_broken_by: str | None = None


class NotMeasuredError(Exception):
    """A contender cannot take part; the message says why and is what the report prints."""


@dataclass(frozen=True)
class Cost:
    """The least that a solution must do: FLOP of the products, bytes read and written once."""

    forward_flop: float = 0.0
    backward_flop: float = 0.0
    forward_bytes: float = 0.0
    backward_bytes: float = 0.0

    def of(self, mode: str) -> tuple[float, float]:
        """(FLOP, bytes) of "forward", "backward" or "both"."""
        forward, backward = (self.forward_flop, self.forward_bytes), (self.backward_flop, self.backward_bytes)
        both = forward[0] + backward[0], forward[1] + backward[1]
        return {"forward": forward, "backward": backward, "both": both}[mode]


@dataclass(frozen=True, eq=False)
class Problem:
    """What is to be computed.

    Args:
        op, shape: how results are grouped.
        draw: makes fresh random inputs, from a generator on `DEVICE`.
        solve: inputs -> output or outputs, in plain PyTorch; on float64 inputs it is the truth.
        wanted: indices of the inputs whose gradient is wanted; none makes a problem without a backward pass.
        tolerance: see `TOLERANCE`, which None takes.
    """

    op: str
    shape: str
    draw: Callable[[torch.Generator], Tensors]
    solve: Callable[..., Any]
    cost: Cost
    wanted: tuple[int, ...] = (0,)
    tolerance: float | None = None

    @property
    def modes(self) -> tuple[str, ...]:
        return MODES if self.wanted else ("forward",)


def _same(values: Tensors) -> Tensors:
    return values


@dataclass(frozen=True)
class Contender:
    """Somebody's solution; `ours` fails a test where a peer is only left out.

    The conversions go between the problem's layout and the contender's own, and are not timed: `leaves` of inputs,
    `outputs` back, `cotangents` of upstream gradients, `gradients` (of all leaves that float) back, with None for one
    that the contender does not make. `solve` gets leaves.
    """

    solve: Callable[..., Any]
    ours: bool = False
    capture: bool = True
    leaves: Callable[[Tensors], Tensors] = _same
    outputs: Callable[[Tensors], Tensors] = _same
    cotangents: Callable[[Tensors], Tensors] = _same
    gradients: Callable[[Tensors], tuple[Tensor | None, ...]] = _same
    modes: tuple[str, ...] = field(default=MODES)


def randn(*sizes: tuple[int, ...]) -> Callable[[torch.Generator], Tensors]:
    """A `Problem.draw` of normal numbers of these sizes, in `DTYPE`."""
    return lambda g: tuple(torch.randn(size, generator=g, device=DEVICE, dtype=DTYPE) for size in sizes)


def our_names(*on_gpu: str) -> list[str]:
    """Names of our contenders: these backends on a GPU; on a CPU what is taken there unasked, and the reference."""
    backends = on_gpu if CUDA else ("default", "reference")
    return [f"farl_kernels {backend}" for backend in backends]


def backend_of(name: str) -> str | None:
    """Of "farl_kernels triton" the backend, "triton"; "default" is None."""
    backend = name.partition(" ")[2]
    return None if backend == "default" else backend


def generator(seed: int) -> torch.Generator:
    return torch.Generator(device=DEVICE).manual_seed(seed)


def compete(benchmark: Any, problem: Problem, name: str, make: Callable[[], Contender], mode: str) -> None:
    """Check `make()` on `problem` and time it in `mode`; skips with the reason where that is not possible."""
    benchmark.group = f"{problem.op} | {problem.shape} | {mode}"
    benchmark.extra_info |= {"op": problem.op, "shape": problem.shape, "mode": mode, "contender": name}
    labels = {"op": problem.op, "shape": problem.shape, "mode": mode, "contender": name}
    ours, reason = False, None
    try:
        check_ready()
        contender = make()
        ours = contender.ours
        if mode not in contender.modes or mode not in problem.modes:
            raise NotMeasuredError(f"has no {mode} pass of its own")
        _compete(benchmark, problem, contender, mode)
    except NotMeasuredError as error:
        reason = str(error)
    except torch.OutOfMemoryError:
        reason = "out of memory"
    except Exception as error:
        reason = in_words(error)
        # A backend that the op does not have, or that refuses: not measured, and no fault.
        refused = isinstance(error, ValueError) and (
            "cannot run this call" in str(error) or "is not one of" in str(error)
        )
        if ours and not refused:
            NOT_MEASURED.append(labels | {"reason": f"failed: {reason}"})
            raise
    finally:
        # After the except clauses: what they caught held the tensors of the failed contender.
        clean_up(f"{name}, {problem.shape}, {mode}")
    if reason is not None:
        leave_out(labels, reason)


def in_words(error: Exception) -> str:
    """One line."""
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:200]}"


def check_ready() -> None:
    """Raise NotMeasuredError where no benchmark can start any more; the first measures the ceilings."""
    if out_of_time():
        raise NotMeasuredError("out of time")
    if _broken_by is not None:
        raise NotMeasuredError(f"the GPU failed in {_broken_by}")
    ceilings.measured()


def clean_up(name: str) -> None:
    """Give memory back for the next benchmark, and note if `name` has broken the GPU for this process."""
    global _broken_by
    gc.collect()
    if CUDA and _broken_by is None:
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            _broken_by = f"{name} ({str(error).splitlines()[0]})"


def leave_out(labels: dict[str, str], reason: str) -> None:
    """Record that a time is missing and skip the test."""
    NOT_MEASURED.append(labels | {"reason": reason})
    pytest.skip(reason)


def _compete(benchmark: Any, problem: Problem, contender: Contender, mode: str) -> None:
    truth = _truth(problem)
    with side_stream() if CUDA else contextlib.nullcontext():
        sets = set_count(sum(x.numel() * x.element_size() for x in truth.inputs))
        drawn = [truth, *(_drawn(problem, seed) for seed in range(1, sets))]
        calls, given = zip(*(_call(problem, contender, mode, each) for each in drawn), strict=True)
        peak = _peak_bytes(calls[0])
        errors = _errors(problem, contender, mode, calls[0](), truth)
        timed = prepare(list(calls), capture=contender.capture, given=given[0])
        if timed.refresh is not None:
            # What is timed must be right too, not only what was run before the capture.
            _errors(problem, contender, mode, timed.refresh(), truth)
        benchmark.pedantic(timed, rounds=timed.rounds, warmup_rounds=2 if CUDA else 1)
    if benchmark.enabled:
        record(benchmark, timed, *problem.cost.of(mode), errors=errors, peak_bytes=peak, input_sets=sets)


def record(benchmark: Any, timed: Timed, flop: float, moved: float, **others: Any) -> None:
    """Add to the result the time of one call and what it says of the ceilings."""
    stats = benchmark.stats.stats
    seconds = stats.median / timed.launches
    top = ceilings.measured()
    info = {
        "seconds": seconds,
        "spread_seconds": stats.iqr / timed.launches,
        "launches": timed.launches,
        "timed": "graph replay" if timed.captured else "calls in a loop",
        "not_captured": timed.failure if CUDA else None,
        "flop": flop,
        "bytes": moved,
        "tflop_per_second": flop / seconds / 1e12,
        "gigabytes_per_second": moved / seconds / 1e9,
        "of_gemm_ceiling": flop / seconds / top["flop_per_second"],
        "of_copy_ceiling": moved / seconds / top["bytes_per_second"],
        # A CPU's caches hold the small problems that are measured there.
        "floor_seconds": max(flop / top["flop_per_second"], moved / top["bytes_per_second"] if CUDA else 0.0),
    }
    benchmark.extra_info |= {key: value for key, value in (info | others).items() if value is not None}


@dataclass(frozen=True)
class _Drawn:
    """Inputs and upstream gradients in the problem's layout, and for the first set what is right."""

    inputs: Tensors
    cotangents: Tensors
    outputs: Tensors = ()
    gradients: Tensors = ()


@functools.lru_cache(maxsize=1)
def _truth(problem: Problem) -> _Drawn:
    """The first set of inputs with outputs and gradients in float64."""
    g = generator(int(time.time_ns()) % 2**31)
    inputs = problem.draw(g)
    exact = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    for index in problem.wanted:
        exact[index].requires_grad_()
    outputs = _tuple(problem.solve(*exact))
    cotangents = tuple(_cotangent(x.shape, g).to(_dtype(inputs)) for x in outputs)
    gradients: Tensors = ()
    if problem.wanted:
        leaves = [exact[index] for index in problem.wanted]
        gradients = torch.autograd.grad(outputs, leaves, [x.double() for x in cotangents])
    return _Drawn(inputs, cotangents, tuple(x.detach() for x in outputs), gradients)


def _drawn(problem: Problem, seed: int) -> _Drawn:
    g = generator(seed)
    like = _truth(problem)
    return _Drawn(problem.draw(g), tuple(_cotangent(x.shape, g).to(x.dtype) for x in like.cotangents))


def _cotangent(shape: torch.Size, g: torch.Generator) -> Tensor:
    # A loss is differentiated with 1, as in training.
    return torch.randn(shape, generator=g, device=DEVICE) if shape else torch.ones((), device=DEVICE)


def _call(problem: Problem, contender: Contender, mode: str, drawn: _Drawn) -> tuple[Callable[[], Any], Tensors]:
    """A call of the contender on one set of inputs, and what it reads: outputs in mode "forward", else gradients."""
    leaves = tuple(x.detach() for x in contender.leaves(drawn.inputs))
    if mode == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return contender.solve(*leaves)

        return forward, leaves
    wanted = [x for x in leaves if x.is_floating_point()]
    if contender.leaves is _same:
        wanted = [leaves[index] for index in problem.wanted]
    for x in wanted:
        x.requires_grad_()
    cotangents = contender.cotangents(drawn.cotangents)

    def backward_of(outputs: Any, keep: bool) -> Tensors:
        pairs = [(y, c.to(y.dtype)) for y, c in zip(_tuple(outputs), cotangents, strict=True)]
        return torch.autograd.grad([y for y, _ in pairs], wanted, [c for _, c in pairs], retain_graph=keep)

    if mode == "both":
        return lambda: backward_of(contender.solve(*leaves), False), (*leaves, *cotangents)
    outputs = contender.solve(*leaves)
    return lambda: backward_of(outputs, True), (*leaves, *cotangents)


def _errors(problem: Problem, contender: Contender, mode: str, got: Any, truth: _Drawn) -> dict[str, float]:
    """Relative errors in float64, each checked; NaN never passes."""
    limit = TOLERANCE[_dtype(truth.inputs)] if problem.tolerance is None else problem.tolerance
    if mode == "forward":
        results, exact, kind = contender.outputs(_tuple(got)), truth.outputs, "output"
    else:
        results, exact, kind = contender.gradients(_tuple(got)), truth.gradients, "gradient"
    errors = {}
    for index, (mine, right) in enumerate(zip(results, exact, strict=True)):
        if mine is None:
            continue
        norm = right.double().norm().item()
        error = (mine.detach().double() - right.double()).norm().item() / (norm or 1.0)
        errors[f"{kind} {index}"] = error
        if not error <= limit:
            # For ours an assertion fails the test; a peer is reported as wrong.
            message = f"wrong result: relative error of {kind} {index} is {error:.2g}, allowed {limit:.2g}"
            if contender.ours:
                raise AssertionError(message)
            raise NotMeasuredError(message)
    return errors


def _peak_bytes(call: Callable[[], Any]) -> int | None:
    """Memory that one call takes on top of what is there before it; the call also compiles what is to be compiled."""
    if not CUDA:
        return None
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def compiled(function: Callable[..., Any], *, fullgraph: bool = True, whole_step: bool = False) -> Callable[..., Any]:
    """`function` through torch.compile with fixed shapes. Forgets what was compiled before.

    Args:
        whole_step: every forward pass is followed by one backward pass, as in training, and it is worth the minutes
            that a C++ compiler takes for a CPU; single ops are compiled for a GPU only.
    """
    if not (CUDA or whole_step):
        raise NotMeasuredError("compiled versions are measured on a GPU")
    need_compiler()
    import torch._functorch.config as functorch

    # The backward pass alone is timed by running it several times over one graph.
    functorch.donated_buffer = whole_step
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, fullgraph=fullgraph)


def need_compiler() -> None:
    """NotMeasuredError where torch.compile finds no C++ compiler, without which it does nothing for a CPU."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    # pytest would keep its thousands of lines, and print them with a failure.
    logging.getLogger("torch.__trace").propagate = False
    try:
        get_cpp_compiler()
    except RuntimeError:
        if not CUDA:
            raise NotMeasuredError("torch.compile finds no C++ compiler") from None


def need(name: str) -> Any:
    """The module `name` of a peer; NotMeasuredError where it cannot be imported."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise NotMeasuredError(f"{(error.name or name).partition('.')[0]} is not installed") from None
    except Exception as error:
        raise NotMeasuredError(f"import of {name} failed: {type(error).__name__}: {error}") from None


def need_gpu() -> None:
    if not CUDA:
        raise NotMeasuredError("needs a GPU")


def _dtype(inputs: Tensors) -> torch.dtype:
    return next((x.dtype for x in inputs if x.is_floating_point()), torch.float32)


def _tuple(value: Any) -> Tensors:
    return tuple(value) if isinstance(value, tuple | list) else (value,)
