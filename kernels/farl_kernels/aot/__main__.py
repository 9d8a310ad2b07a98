"""``python -m farl_kernels.aot``: compile every kernel for every table entry, and check what came out."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

from farl_kernels import launch, tables
from farl_kernels.cases import select

_HEADER = "regs spills stack    smem CTAs HGMMA  HMMA LDGSTS  TMA  LDG.128"


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status: 0, 1 where the check fails, 2 where it cannot run."""
    options = _parse(arguments)
    if launch.INTERPRETED:
        print("aot: TRITON_INTERPRET=1 is set, under which nothing is compiled: unset it", file=sys.stderr)
        return 2
    if not launch.HAS_TRITON:
        print("aot: triton is not installed (pip install triton; Linux only)", file=sys.stderr)
        return 2
    from farl_kernels.aot import check
    from farl_kernels.aot.build import Build, builds, compiled

    folder = options.budgets or check.FOLDER
    budgets = check.read_budgets(folder)
    own = os.environ.get(tables.ENVIRONMENT)
    print(f"triton {check.triton_version()}" + (f", tables of {own} first" if own else ""))
    if options.check and budgets is None:
        print(f"no budgets for triton {check.triton_version()}: hard limits only")
    cases, failed = select(options.only)
    if not cases and not failed:
        print(f"aot: no case matches {' '.join(options.only)}", file=sys.stderr)
        return 2
    wanted: list[Build] = []
    for case in cases:
        for architecture in options.arch:
            try:
                wanted += builds(case, architecture)
            except Exception as error:
                failed.append(f"{architecture} {case.name}: {type(error).__name__}: {error}")
    wanted.sort(key=lambda build: (build.name, build.architecture))
    width = max((len(build.name) for build in wanted), default=0)
    print(f"{'kernel':{width}} arch  warps stages {_HEADER}")
    started = time.perf_counter()
    measured = []
    for build, found in compiled(wanted, options.jobs):
        if isinstance(found, str):
            failed.append(f"{build.architecture} {build.name}: {found}")
            continue
        measured.append((build, found))
        reasons: list[str] = []
        if options.check or options.update:
            reasons += check.over_limits(build, found, budgets)
        if options.check and budgets is not None:
            reasons += check.over_budget(build, found, budgets)
        failed += [f"{build.architecture} {build.name}: {reason}" for reason in reasons]
        if reasons or not options.quiet:
            print(
                f"{build.name:{width}} {build.architecture} {build.num_warps:5} {build.options['num_stages']:6} "
                f"{found.registers:4} {found.spills:6} {found.stack:5} {found.shared / 1024:6.1f}K "
                f"{found.blocks_per_sm:4} {found.hgmma:5} {found.hmma:5} {found.ldgsts:6} {found.tma:4} "
                f"{f'{found.wide_loads}/{found.loads}':>8}",
                flush=True,
            )
    print(f"{len(measured)} kernels in {time.perf_counter() - started:.0f} s")
    if options.json:
        rows = [
            {"name": b.name, "architecture": b.architecture, "num_warps": b.num_warps, **dataclasses.asdict(r)}
            for b, r in measured
        ]
        options.json.write_text(json.dumps({"triton": check.triton_version(), "kernels": rows}, indent=1) + "\n")
    everything = not options.only and options.arch == list(tables.architectures())
    if options.update:
        keep_others = not everything or len(measured) < len(wanted) or len(cases) == 0
        print(f"wrote {check.write_budgets(measured, keep_others=keep_others, folder=folder)}")
    if options.check and not options.only:
        failed += check.stale([build for build, _ in measured], budgets, options.arch)
    for line in failed:
        print(f"FAILED {line}", file=sys.stderr)
    return 1 if failed else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m farl_kernels.aot", description=__doc__)
    parser.add_argument(
        "--only", action="append", default=[], metavar="PATTERN", help="cases: part of a name, or a glob"
    )
    parser.add_argument("--arch", action="append", choices=tables.architectures(), help="default: all with tables")
    parser.add_argument("--check", action="store_true", help="fail on spills, limits and budgets")
    parser.add_argument("--update", action="store_true", help="make what is measured the budget; limits still fail")
    parser.add_argument("--quiet", action="store_true", help="print the rows of failing kernels alone")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the rows here too")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--budgets", type=Path, help="folder of budgets, instead of the package's")
    found = parser.parse_args(arguments)
    found.arch = sorted(found.arch or tables.architectures())
    return found


if __name__ == "__main__":
    sys.exit(main())
