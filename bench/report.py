"""Draws `docs/benchmarks.md` from the files under `bench/results`: ``python -m bench.report``.

Every number in it comes from a file there; what has no result is written "not measured".
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from bench import plots, training_report
from bench.results import Results, load
from bench.tables import NOT_MEASURED, breakdown, missing, table

ROOT = Path(__file__).resolve().parents[1]

INTRODUCTION = """# Benchmarks

Drawn by `python -m bench.report` from the files under [`bench/results`](../bench/results); not written by hand.

```
make bench                                       # what this machine can run, as a comparison in the terminal
python -m bench.gpu --out bench/results/NAME     # checks and measures everything on a GPU machine
python -m bench.training --out bench/results/NAME --photographs TAR    # real training runs, on a CPU too
python -m bench.report                           # draws this page
```

## How it is measured

- A contender's result (output or gradients) is first compared with float64 on the same inputs; a wrong one gets no
  time. "Largest error" is the largest of ||result - truth|| / ||truth|| over its outputs or gradients.
- Inputs are fresh random numbers, in several sets that together are four times the GPU's L2 cache.
- On a GPU one measured call is the replay of a CUDA graph of many launches and a synchronisation; the time is the
  median call divided by the launches. A mark ° means that the contender could not be captured and was called in a loop.
- "forward" is without gradients; "backward" follows a forward pass that is not timed; "forward + backward" is a
  training step's share. Losses have no "backward" of their own, because implementations divide the work differently.
- Peers get their inputs in the layout that suits them best, with masks, padding and compilation done beforehand.
- "Against the best peer" compares in the last mode measured, in the same run: 2.00x is twice as fast as that peer.
- "Of the ceiling" is the least time that the machine needs by its own measured copy bandwidth and matrix products (each
  input read once, each output written once, the products that the formula has), divided by the time taken. On a CPU
  only products count, because what is measured there fits into its caches.
- Loaders and decoders are timed in turns, each started afresh for every round and measured once its workers are under
  way. "Time over ours" is the median of the ratios to the first row's contender within a round (to a load split of 0.65
  for decoding), with the smallest and the largest: of seven rounds these hold the median with 98 % confidence.
- A whole step with decoding is training by the real loop, from shards of photographs; "time over ours" there is over
  the same loop on batches that are on the device already.
- Whole steps and the image tower are checked on the batch that they are timed with, against the reference ops in
  float32. On a CPU they are timed in turns, like loaders; "time over ours" is that to "farl". What torch.compile needs
  is in no time: "first call" holds it, of the forward and the backward pass (seconds where its cache was warm).
- Useful are the products that a FaRL step needs, whoever makes it (`farl.flops`); MFU is their rate as a share of the
  GPU's peak, HFU that of the products really taken, with padding and rows that nobody reads, as torch counts them (of
  a compiled step, in its eager form). A CPU has no such peak: the rates themselves are given.
- The parts of a step are those of `farl.train --profile`; "least time" is that of the part's products at the rate of
  one large product, or of its bytes at that of one large copy.
- Batches on a GPU are the largest of a few that `farl.memory` predicts to fit it.
- Peak memory is what one call takes beyond its inputs; for a whole step and the image tower, all that PyTorch allocated
  (on a CPU weights, moments, and the most that a step allocates beyond them).
"""
GPU_MISSING = """
## On a GPU

Not measured. `python -m bench.gpu --out bench/results/NAME` on a machine with one makes the results, and
`python -m bench.report` puts them here.
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks.md")
    options = parser.parse_args(arguments)
    folders = [folder for folder in sorted(options.results.glob("*")) if folder.is_dir() and any(folder.glob("*.json"))]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    pages = [load(folder) for folder in folders]
    # GPUs first: they are what the ops are made for.
    pages.sort(key=lambda results: not is_gpu(results))
    images = options.out.parent / "images"
    text: list[str] = [INTRODUCTION.rstrip()]
    if not any(map(is_gpu, pages)):
        text.append(GPU_MISSING)
    if not pages:
        text.append("\n## On a CPU\n\nNot measured.\n")
    for results in pages:
        text.append("\n" + "\n".join(page(results, images, options.out.parent)))
    options.out.write_text(re.sub(r"\n{3,}", "\n\n", "\n".join(text)).rstrip() + "\n")
    print(f"wrote {options.out}")
    return 0


def is_gpu(results: Results) -> bool:
    return any("capability" in machine for machine in results.machines.values())


def page(results: Results, images: Path, beside: Path) -> list[str]:
    """The part of one machine."""
    machine = next(iter(results.machines.values()), {})
    lines = [f"## {machine.get('device', results.folder.name)}", ""]
    lines += provenance(results)
    lines += checked(results)
    lines += training_report.section(results.folder, images, beside)
    pictures = plots.draw(results, images, results.folder.name)
    for op in results.ops:
        lines += [f"### {plots.capital(op)}", ""]
        if op in pictures:
            lines += [f"![{op}]({pictures[op].relative_to(beside).as_posix()})", ""]
        for shape in results.shapes(op):
            lines += table(results, op, shape)
            lines += breakdown(results, op, shape)
        facts = [f"- {text}" for text in results.facts.get(op, ())]
        lines += [*facts, ""] if facts else []
        lines += missing(results, op)
    return lines


def provenance(results: Results) -> list[str]:
    """Files, machine, versions, commits and ceilings; one line where all files agree."""
    lines = [
        f"Files: `bench/results/{results.folder.name}/`: {', '.join(f'`{name}`' for name in results.machines)}.",
        "",
    ]
    lines += differing("Commit", {name: commit(machine) for name, machine in results.machines.items()})
    for key, label in (("driver_version", "Driver"), ("cuda", "CUDA"), ("cudnn", "cuDNN")):
        found = {name: str(machine[key]) for name, machine in results.machines.items() if key in machine}
        lines += differing(label, found)
    clocks = {
        name: f"SM {machine['clocks.sm']} of {machine['clocks.max.sm']}, memory {machine['clocks.mem']}"
        for name, machine in results.machines.items()
        if "clocks.sm" in machine
    }
    lines += differing("Clocks when the results were written", clocks)
    versions = {
        name: ", ".join(f"{package} {version}" for package, version in machine.get("versions", {}).items())
        for name, machine in results.machines.items()
    }
    lines += differing("Versions", versions)
    tops = {
        name: f"{top['bytes_per_second'] / 1e9:,.0f} GB/s copied, {top['flop_per_second'] / 1e12:,.3g} TFLOP/s "
        f"({top['gemm']})"
        for name, top in results.ceilings.items()
    }
    return [*lines, *differing("Ceilings", tops), ""]


def commit(machine: dict[str, Any]) -> str:
    found = machine.get("commit", {})
    return f"`{str(found.get('id', 'unknown'))[:12]}`" + (" with uncommitted changes" if found.get("dirty") else "")


def differing(label: str, values: dict[str, str]) -> list[str]:
    """One line if all files say the same, else one a value."""
    by_value: dict[str, list[str]] = {}
    for name, value in values.items():
        by_value.setdefault(value, []).append(name)
    if len(by_value) == 1:
        return [f"- {label}: {next(iter(by_value))}"]
    return [f"- {label} ({', '.join(names)}): {value}" for value, names in by_value.items()]


def checked(results: Results) -> list[str]:
    """What tests were run on this machine."""
    if not results.checks:
        return []
    lines = ["### Checks", "", "| | | |", "|---|---|---|"]
    for name, steps in results.checks.items():
        for step in steps:
            counts = ", ".join(f"{number} {what}" for what, number in step["counts"].items() if number)
            status = step["status"] if step["status"] != NOT_MEASURED else f"{NOT_MEASURED}: {step['line']}"
            lines.append(f"| {step['title']} | {status} | {counts} (`{name}`) |")
    return [*lines, ""]


if __name__ == "__main__":
    sys.exit(main())
