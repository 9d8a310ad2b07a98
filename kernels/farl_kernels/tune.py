"""``python -m farl_kernels.tune``: measure the launch configurations on the GPU at hand and write its tables.

Every candidate of a case is first run and compared with the configuration in use; only those that agree are timed. What
is written to ``OUT/<op>.json`` is the table in use with the fastest entries put in: set FARL_KERNELS_TABLES to that
folder, or commit the files to `tables/<architecture>/`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farl_kernels import tables
from farl_kernels.cases import Case, select
from farl_kernels.tables import Config

Run = Callable[[], Any]
# Seconds of one call, on average over calls that take the runs in turn.
Timer = Callable[[list[Run]], float]
# A new entry must win by more than the clock's noise.
WORTH_A_CHANGE = 0.02
# Between two right answers: the norm of their difference against the norm of the answer.
_DISTANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-3, torch.float64: 1e-9}


@dataclass(frozen=True)
class Measured:
    """One configuration of a case: seconds of a call, or what is wrong with it."""

    config: Config
    seconds: float = math.inf
    fault: str | None = None


def measure(case: Case, device: torch.device, timer: Timer, copies: int | None = None) -> list[Measured]:
    """The configuration in use first, then the candidates.

    Args:
        timer: times a list of runs on different inputs, see :func:`cuda_seconds`.
        copies: how many inputs to make; by default enough to overflow the GPU's second-level cache.
    """
    with tables.recorded_lookups() as lookups:
        runs = _prepared(case, device, copies)
        truth = list(_tensors(runs[0]()))
    entry = (case.op, case.kernel, case.bucket)
    if entry not in lookups:
        raise ValueError(f"{case.name}: the case does not look up its entry")
    # Of outputs that the case keeps, too.
    truth = [x.clone() for x in truth]
    used = tables.lookup(*entry, device)
    found: list[Measured] = []
    for config in (used, *(candidate for candidate in case.candidates if candidate != used)):
        with tables.override(*entry, config):
            try:
                fault = _difference(list(_tensors(runs[0]())), truth)
                found.append(Measured(config, timer(runs)) if fault is None else Measured(config, fault=fault))
            except Exception as error:
                found.append(Measured(config, fault=f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"))
    return found


def best(measured: list[Measured]) -> Measured:
    """The fastest, or the one in use (the first) where none is clearly faster."""
    fastest = min(measured, key=lambda x: x.seconds)
    used = measured[0]
    return fastest if fastest.seconds < used.seconds * (1 - WORTH_A_CHANGE) else used


def tune(cases: Iterable[Case], device: torch.device, out: Path, timer: Timer, *, copies: int | None = None) -> int:
    """Measure `cases`, print a row each, and write the tables to `out` after each. Returns the number of faults."""
    cases = list(cases)
    faults = 0
    width = max((len(case.name) for case in cases), default=0)
    print(f"{'':9}{'case':{width}} {'in use':>10} {'best':>10} {'gain':>7}  configuration")
    for index, case in enumerate(cases, 1):
        measured = measure(case, device, timer, copies)
        chosen, used = best(measured), measured[0]
        gain = used.seconds / chosen.seconds - 1 if chosen is not used else 0.0
        row = f"{_microseconds(used)} {_microseconds(chosen)} {gain:7.1%}  {_words(chosen.config)}"
        print(f"[{index:3}/{len(cases):3}]{case.name:{width}} {row}", flush=True)
        for one in measured:
            if one.fault is not None:
                faults += 1
                print(f"{'':9}{case.name:{width}} left out {_words(one.config)}: {one.fault}", flush=True)
        if chosen.fault is None:
            _write(case, chosen.config, device, out)
    return faults


def cuda_seconds(runs: list[Run], *, shortest: float = 2e-3, replays: int = 15) -> float:
    """Median seconds of a call: CUDA graphs of many calls, of at least `shortest` seconds, that take `runs` in turn."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def elapsed(work: Run) -> float:
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    def rounds(count: int) -> None:
        for _ in range(count):
            for run in runs:
                run()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        rounds(1)
    torch.cuda.current_stream().wait_stream(stream)
    count = max(1, math.ceil(shortest / elapsed(lambda: rounds(1))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rounds(count)
    graph.replay()
    return statistics.median(elapsed(graph.replay) for _ in range(replays)) / (count * len(runs))


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m farl_kernels.tune", description=__doc__)
    parser.add_argument(
        "--only", action="append", default=[], metavar="PATTERN", help="cases: part of a name, or a glob"
    )
    parser.add_argument("--out", type=Path, default=Path("tuned-tables"), metavar="DIR", help="default: %(default)s")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tune: needs a CUDA GPU, and torch sees none here", file=sys.stderr)
        return 2
    cases, faults = select(options.only)
    for fault in faults:
        print(f"tune: left out {fault}", file=sys.stderr)
    if not cases:
        print(f"tune: no case matches {' '.join(options.only)}", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    print(f"{torch.cuda.get_device_name(device)}, tables of {tables.architecture_of(device)}")
    wrong = tune(cases, device, options.out, cuda_seconds)
    print(f"wrote {options.out}; to use it: export {tables.ENVIRONMENT}={options.out.resolve()}")
    return 1 if wrong or faults else 0


def _prepared(case: Case, device: torch.device, copies: int | None) -> list[Run]:
    if copies is not None:
        return [case.prepare(device) for _ in range(copies)]
    before = torch.cuda.memory_allocated(device)
    first = case.prepare(device)
    taken = max(1, torch.cuda.memory_allocated(device) - before)
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return [first, *(case.prepare(device) for _ in range(min(32, 2 * cache // taken)))]


def _tensors(result: Any) -> Iterable[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (tuple, list)):
        for x in result:
            yield from _tensors(x)


def _difference(got: list[Tensor], truth: list[Tensor]) -> str | None:
    if len(got) != len(truth):
        return f"made {len(got)} results, want {len(truth)}"
    for index, (x, wanted) in enumerate(zip(got, truth, strict=True)):
        if not x.is_floating_point():
            if not x.equal(wanted):
                return f"result {index} differs"
            continue
        # Log-sum-exps of rows that see nothing are infinite in both.
        finite = wanted.isfinite()
        off = (x.double() - wanted.double())[finite].norm() / wanted.double()[finite].norm().clamp(min=1e-30)
        if not (x.isfinite() == finite).all() or not off <= _DISTANCE[x.dtype]:
            return f"result {index} differs: {off:.1e} of its norm"
    return None


def _write(case: Case, config: Config, device: torch.device, out: Path) -> None:
    path = out / f"{case.op}.json"
    shipped = tables.FOLDER / tables.architecture_of(device) / f"{case.op}.json"
    source = path if path.exists() else shipped
    table = json.loads(source.read_text()) if source.exists() else {}
    table.setdefault(case.kernel, {})[case.bucket] = config
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(tables.formatted(table))


def _microseconds(measured: Measured) -> str:
    return f"{1e6 * measured.seconds:7.1f} us" if measured.fault is None else f"{'fails':>10}"


def _words(config: Config) -> str:
    return " ".join(f"{name}={value}" for name, value in config.items())


if __name__ == "__main__":
    sys.exit(main())
