"""Checks and measures everything on the machine at hand: ``python -m bench.gpu --out DIR``.

Made for a GPU machine without network, git or shared folders: it needs this repository's files and a Python with torch,
triton, numpy, pytest and pytest-benchmark. Whatever else is missing is named in a line "not measured: reason". Each
section runs in processes of its own, under a time-out, and writes one JSON file; a failing section does not stop the
others. ``summary.txt`` says what came of it, and the exit status is 1 if anything failed. Without a GPU (or with
``--device cpu``) it runs reduced.

The section ``training`` makes real training runs (`bench.training`) and is run only if asked for by name: it takes all
the time that a section has.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bench.deadline import VARIABLE
from bench.sections import DEFAULT, NAMES, ROOT, Step, steps_of

SECTION_MINUTES = 8.5
# Kept back from a section's time for its last benchmark and for writing the results.
RESERVE_SECONDS = 45
# Time to write what there is, once a step is told to stop.
GRACE_SECONDS = 20
PROGRESS_SECONDS = 30
TAIL_LINES = 40
OURS = {"bench", "farl", "farl_engine", "farl_kernels"}


@dataclass
class Outcome:
    """What came of one step. `status` is "ok", "failed", "timed out" or "not measured"."""

    title: str
    status: str
    seconds: float = 0.0
    line: str = ""
    left_out: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)
    tail: str = ""

    @property
    def bad(self) -> bool:
        return self.status in ("failed", "timed out")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    out = Path(options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    begun = time.time()
    end = begun + 60 * options.minutes if options.minutes else float("inf")
    environment = environment_of(options)
    machine = ask_machine(environment)
    cuda = "capability" in machine
    say(f"{machine.get('device', 'unknown device')}, commit {machine.get('commit', {}).get('id', 'unknown')}")
    outcomes: dict[str, list[Outcome]] = {}
    for name in options.sections:
        outcomes[name] = run_section(name, steps_of(name, cuda, options.tests), out, environment, machine, options, end)
    text = summary(machine, outcomes, out, time.time() - begun)
    (out / "summary.txt").write_text(text)
    say("\n" + text)
    return int(any(outcome.bad for section in outcomes.values() for outcome in section))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench.gpu", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--out", required=True, help="folder for the results")
    parser.add_argument(
        "--sections",
        type=lambda text: tuple(name.strip() for name in text.split(",") if name.strip()),
        default=DEFAULT,
        help=f"of {', '.join(NAMES)}; default: {','.join(DEFAULT)}",
    )
    parser.add_argument("--commit", help="commit of these files, where there is no git")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--minutes", type=float, default=0.0, help="for all sections together; default: no limit")
    parser.add_argument("--section-minutes", type=float, default=SECTION_MINUTES, help="at most, for one section")
    parser.add_argument("--tests", nargs="+", default=(), help="files or folders instead of tests/kernels")
    parser.add_argument("--photographs", type=Path, help="tar of photographs with captions, for decoders and training")
    parser.add_argument("--match", help="pytest's -k for the benchmarks and tests")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.sections if name not in NAMES]
    if unknown:
        parser.error(f"there is no section {unknown[0]!r}; there are {', '.join(NAMES)}")
    options.tests = tuple(options.tests)
    return options


def environment_of(options: argparse.Namespace) -> dict[str, str]:
    """For the processes: this repository importable without being installed, the commit, and no GPU if so asked."""
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    paths = [ROOT, ROOT / "engine", ROOT / "kernels"]
    environment["PYTHONPATH"] = os.pathsep.join([*map(str, paths), environment.get("PYTHONPATH", "")]).rstrip(
        os.pathsep
    )
    if options.photographs:
        environment["FARL_PHOTOGRAPHS"] = str(options.photographs.resolve())
    if options.commit:
        environment["FARL_COMMIT"] = options.commit
    if options.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def ask_machine(environment: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.machine"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"python -m bench.machine failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def run_section(
    name: str,
    steps: tuple[Step, ...],
    out: Path,
    environment: dict[str, str],
    machine: dict[str, Any],
    options: argparse.Namespace,
    end: float,
) -> list[Outcome]:
    """Run the steps of a section one after the other and write `name`.json."""
    section_end = min(end, time.time() + 60 * options.section_minutes)
    target = out / f"{name}.json"
    outcomes = []
    for step in steps:
        say(f"[{name}] {step.title}")
        left = min(section_end - time.time(), 60 * step.minutes)
        if step.command is None:
            outcome = Outcome(step.title, "not measured", line=step.reason)
        elif left < RESERVE_SECONDS:
            outcome = Outcome(step.title, "not measured", line="out of time")
        else:
            outcome = run_step(name, step, left, target, environment, options.match)
        outcome.left_out += step.left_out
        say(f"[{name}] {step.title}: {described(outcome)}")
        outcomes.append(outcome)
    write_section(name, target, outcomes, machine)
    return outcomes


def run_step(
    section: str, step: Step, seconds: float, target: Path, environment: dict[str, str], match: str | None
) -> Outcome:
    """Run one command under its time-out and read what it wrote."""
    assert step.command is not None
    environment = environment | dict(step.environment) | {VARIABLE: str(time.time() + seconds - RESERVE_SECONDS)}
    with tempfile.TemporaryDirectory() as scratch:
        log, junit = Path(scratch, "log.txt"), Path(scratch, "junit.xml")
        command = list(step.command)
        if step.kind in ("benchmarks", "tests"):
            command += [f"--junitxml={junit}", *(["-k", match] if match else [])]
        if step.kind == "benchmarks":
            command.append(f"--benchmark-json={target}")
        if step.kind == "files":
            command.append(f"--out={target.parent}")
        begun = time.time()
        code = run(section, command, environment, log, seconds)
        outcome = Outcome(step.title, "ok", seconds=time.time() - begun)
        output = log.read_text(errors="replace")
        if step.kind == "json":
            read_json(outcome, output, code)
        elif step.kind != "files":
            read_junit(outcome, junit)
        absent = absent_package(outcome) if step.kind == "benchmarks" else None
        if code is None:
            outcome.status = "timed out"
            # Pytest's report has the tests that were interrupted among the good ones.
            outcome.counts = last_counts(output)
        elif absent is not None:
            outcome.status, outcome.line = "not measured", f"{absent} is not installed"
        # 5: pytest found nothing to run, 1 with no failure: it could not collect.
        elif code not in (0, 5) or outcome.failures:
            outcome.status = "failed"
        elif step.kind in ("benchmarks", "tests") and not outcome.counts.get("passed"):
            outcome.status = "not measured"
            outcome.line = next(iter(outcome.skipped), "nothing to run")
        if outcome.bad:
            outcome.tail = "\n".join(output.splitlines()[-TAIL_LINES:])
            outcome.line = outcome.line or ("" if code is None else f"exit status {code}")
    return outcome


def run(section: str, command: list[str], environment: dict[str, str], log: Path, seconds: float) -> int | None:
    """The exit status of `command`, None if it had to be ended after `seconds`."""
    end, told = time.time() + seconds, time.time()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A shell lets what it starts with `&` ignore SIGINT, and children inherit that: `stop` sends it.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        while process.poll() is None:
            if time.time() > end:
                stop(process)
                return None
            if time.time() - told > PROGRESS_SECONDS:
                told = time.time()
                lines = log.read_text(errors="replace").strip().splitlines()
                say(f"[{section}] ... {lines[-1][-100:] if lines else 'starting'}")
            time.sleep(0.2)
    return process.returncode


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process group, after pytest, if it is that, has had time to write its results."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def read_json(outcome: Outcome, output: str, code: int | None) -> None:
    start = output.find("{")
    if code == 0 and start >= 0:
        outcome.found = json.loads(output[start:])


def read_junit(outcome: Outcome, path: Path) -> None:
    """Counts, failures and reasons of skips from pytest's report, if it came to write one."""
    if not path.exists():
        return
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        label = f"{case.get('classname')}::{case.get('name')}"
        failure = next((part for part in case if part.tag in ("failure", "error")), None)
        skip = case.find("skipped")
        if failure is not None:
            counts["failed"] += 1
            text = (failure.get("message") or "").strip()[:300]
            lacking = re.search(r"ModuleNotFoundError: (No module named '[\w.]+')", failure.text or "")
            outcome.failures.append(f"{label}: {text}" + (f", {lacking[1]}" if lacking else ""))
        elif skip is not None:
            counts["skipped"] += 1
            reason = (skip.get("message") or "").strip()
            outcome.skipped[reason] = outcome.skipped.get(reason, 0) + 1
        else:
            counts["passed"] += 1
    outcome.counts = counts


def last_counts(output: str) -> dict[str, int]:
    """The counts of pytest's last line, "1 passed, 2 skipped in 6.05s"; none if it came to write none."""
    lines = [line for line in output.splitlines() if re.search(r"\d (passed|failed|skipped).* in [\d.]+s", line)]
    found = re.findall(r"(\d+) (passed|failed|skipped)", lines[-1]) if lines else []
    return {what: int(number) for number, what in found}


def absent_package(outcome: Outcome) -> str | None:
    """The package for want of which a suite could not be loaded, if that is all that failed."""
    found = [re.search(r"collection failure, No module named '(\w+)", failure) for failure in outcome.failures]
    names = {match[1] for match in found if match}
    return min(names) if names and all(found) and not names & OURS else None


def write_section(name: str, target: Path, outcomes: list[Outcome], machine: dict[str, Any]) -> None:
    """Add the outcomes to the benchmarks' file, or write a file with them alone."""
    content: dict[str, Any] = {}
    if target.exists():
        content = json.loads(target.read_text())
    content.setdefault("machine_info", {})["farl"] = content.get("machine_info", {}).get("farl", machine)
    content["section"] = name
    content["steps"] = [asdict(outcome) for outcome in outcomes]
    for outcome in outcomes:
        content |= {key: value for key, value in outcome.found.items() if key == "ceilings"}
    target.write_text(json.dumps(content, indent=1) + "\n")


def described(outcome: Outcome) -> str:
    counts = ", ".join(f"{number} {what}" for what, number in outcome.counts.items() if number)
    parts = [outcome.status if outcome.status != "not measured" else f"not measured: {outcome.line}"]
    parts += [counts] if counts else []
    parts += [outcome.line] if outcome.bad and outcome.line else []
    parts += [f"{outcome.seconds:.0f} s"] if outcome.seconds else []
    return ", ".join(parts)


def summary(machine: dict[str, Any], outcomes: dict[str, list[Outcome]], out: Path, seconds: float) -> str:
    """The whole run in words, with a short table of the benchmarks last."""
    from bench.results import load
    from bench.tables import short_table

    lines = [f"device: {machine.get('device')}", f"commit: {machine.get('commit', {}).get('id')}"]
    lines += [
        f"{key}: {machine[key]}" for key in ("driver_version", "clocks.sm", "clocks.mem", "cuda") if key in machine
    ]
    lines += ["versions: " + ", ".join(f"{k} {v}" for k, v in machine.get("versions", {}).items()), ""]
    for name, section in outcomes.items():
        for outcome in section:
            lines.append(f"[{name}] {outcome.title}: {described(outcome)}")
            lines += [f"    not measured: {reason}" for reason in outcome.left_out]
            lines += [f"    failed: {failure}" for failure in outcome.failures[:20]]
            lines += [f"    skipped: {number} x {reason}" for reason, number in outcome.skipped.items()][:20]
            if outcome.tail:
                lines += ["    | " + line for line in outcome.tail.splitlines()]
    lines += ["", f"{seconds:.0f} s in all", ""]
    runs = json.loads((out / "training.json").read_text()) if "training" in outcomes else {}
    if "training" in runs:
        # Here, because it draws with matplotlib, which another section can do without.
        from bench.training_report import words

        lines += [*words(runs), ""]
    lines += short_table(load(out))
    return "\n".join(lines) + "\n"


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
