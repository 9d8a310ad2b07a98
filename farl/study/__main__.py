"""`python -m farl.study {short,long,photographs}`: does pre-training help where labels are few?"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from farl import cli
from farl.study.cells import Cell, Queue, cells_of, identity_of, read_cells, write_json
from farl.study.data import make_data
from farl.study.plans import PLANS, Plan
from farl.study.progress import StudyProgress
from farl.study.study import Study
from farl.study.worker import DONE, STOPPED, run_cells
from farl_engine import stop

PROG = "farl.study"
DESCRIPTION = """Pre-train small models on equal budgets, fine-tune them on three face tasks with few and with all
labels, and compare each with random weights, seed by seed. The same command goes on where it was stopped."""


@dataclass(frozen=True)
class StudyOptions:
    run_dir: str = ""
    """Folder of the study; runs/study-PLAN if empty."""
    jobs: int = 2
    """Worker processes, which share the cores; on GPUs one for each is right."""
    photographs: str = os.environ.get("FARL_DATA", "")
    """Folder of the real photographs, for the plan of that name; $FARL_DATA if not given."""
    dry_run: bool = False
    """Print the plan and compute nothing."""

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise ValueError(f"--jobs is {self.jobs}; it must be 1 or more")


def main(argv: list[str] | None = None) -> int | None:
    # Before torch is imported, which takes seconds in which a signal would kill.
    stop.install()
    commands = {name: (partial(_main, plan), plan.about) for name, plan in PLANS.items()}
    return cli.subcommand(commands, argv, prog=PROG, description=DESCRIPTION)


def _main(plan: Plan, argv: list[str]) -> int:
    options = cli.parse(StudyOptions, argv, prog=f"{PROG} {plan.name}", description=DESCRIPTION)
    if options.dry_run:
        from farl.study.report import describe_plan

        print(describe_plan(plan))
        return 0
    run_dir = Path(options.run_dir or f"runs/study-{plan.name}")
    photographs = Path(options.photographs) if options.photographs else None
    return run_study(plan, run_dir, jobs=options.jobs, photographs=photographs)


def run_study(plan: Plan, run_dir: Path, *, jobs: int, photographs: Path | None = None) -> int:
    """Do the cells that are missing and draw the report; the exit code.

    Returns:
        0 where all cells are there or a signal came, 1 where some failed.

    Raises:
        ValueError: a run folder of another plan or other data, or in use; photographs that are not there.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("start farl.study with plain python: it makes its own processes (--jobs)")
    if run_dir.is_file():
        raise ValueError(f"--run-dir {run_dir} is a file: name a folder, which is made if absent")
    run_dir.mkdir(parents=True, exist_ok=True)
    with _alone(run_dir):
        _check_same_plan(plan, run_dir / "plan.json")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        make_data(plan, run_dir / "data", photographs, workers=min(jobs, cores) if jobs > 1 else 0)
        study = Study(plan, run_dir, identity_of(plan, run_dir / "data"))
        cells = cells_of(plan)
        results = read_cells(study.results, cells, study.identity)
        queue = Queue(cells, set(results))
        failures: dict[str, str] = {}
        with StudyProgress(cells, results, jobs) as progress:

            def ended(cell: Cell, outcome: str) -> None:
                if outcome == DONE:
                    results.update(read_cells(study.results, [cell], study.identity))
                    progress.done(cell, results[cell.key])
                elif outcome != STOPPED:
                    failures[cell.key] = outcome
                    progress.say(f"{PROG}: {cell.key} failed: {outcome} (see {study.logs})", file=sys.stderr)

            run_cells(study, queue, jobs, max(1, cores // jobs), ended)
        from farl.study.report import write_report

        page = write_report(study, cells, results, failures)
    missing = len(cells) - len(results)
    if stop.requested():
        print(f"stopped by {stop.requested()}: {missing} cells are missing; the same command goes on. So far: {page}")
        return 0
    print(f"{'done' if not missing else f'{missing} of {len(cells)} cells are missing'}: see {page}")
    return 1 if missing else 0


def _check_same_plan(plan: Plan, file: Path) -> None:
    """Keep the plan beside its results. ValueError where the folder is another plan's."""
    if not file.is_file():
        write_json(file, {"fingerprint": plan.fingerprint(), **asdict(plan)})
    elif json.loads(file.read_text()).get("fingerprint") != plan.fingerprint():
        raise ValueError(f"{file.parent} belongs to another plan than {plan.name!r} of now: use another --run-dir")


@contextlib.contextmanager
def _alone(run_dir: Path) -> Iterator[None]:
    """ValueError where another process is at this study."""
    with (run_dir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{run_dir} is in use by another farl.study: wait for it, or use another --run-dir"
            ) from None
        yield


if __name__ == "__main__":
    cli.run(main, PROG)
