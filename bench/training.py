"""Trains for real on this machine and measures the runs: ``python -m bench.training --out DIR``.

Each run is a process of ``farl.train`` as a user starts it, watched from outside:

1. Photographs become shards and their visual tokens a cache. The tar has images with captions, as for training, and may
   have a CSV table (image, person), by which the held-out photographs are of other people:

       python -m farl.data build FACES/pairs.tsv --out packed --max-samples 3700
       tar -rf packed/train-00000.tar -C FACES attributes.csv
       python -m bench.training --out DIR --photographs packed/train-00000.tar

   Without a tar, embedded faces are drawn.
2. A cold start: compilers' caches are empty. The files of Python and of the data may be in the system's cache.
3. A run with retrieval on held-out pairs, as long as fits: its curve, rate, waiting for data, memory, and how long a
   start with warm caches takes.
4. The same short run with every engine; their loss curves are compared (see `bench.training_curves`).

It keeps to ``--minutes``: what does not fit is cut, and said. DIR gets training.json and training.png. A run that fails
is told with its last lines and does not stop the others; then, or where an engine learns something else, the exit
status is 1. On a GPU it takes farl-b16 in bfloat16, on a CPU a small model in fp32.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import sys
import tarfile
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

from bench.deadline import VARIABLE
from bench.gpu import ask_machine, environment_of
from bench.sections import ROOT
from bench.training_curves import Comparison, Curve, compare_exact, compare_rounded
from bench.training_plan import Plan, cold_run, engine_run, long_run, module, plan_of, updates_in
from bench.training_report import draw, words
from bench.training_run import Finished, Record, steady, watch

MINUTES = 8.5
# Kept back for drawing and for what takes longer than thought.
RESERVE_SECONDS = 10.0
# Less is not worth a start.
LEAST_SECONDS = 20.0
KEPT = ("step", "loss", "loss_contrastive", "loss_mim", "accuracy_mim", "lr", "grad_norm", "logit_scale")
KEPT_RATES = ("pairs_per_second", "data_wait_fraction", "mfu", "memory_bytes")


class Measurement:
    """The runs of a plan, one after the other; `content` is what is known so far."""

    def __init__(self, plan: Plan, out: Path, scratch: Path, environment: dict[str, str], end: float) -> None:
        self.plan, self.out, self.scratch, self.end = plan, out, scratch, end
        caches = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "CUDA_CACHE_PATH": "cuda"}
        self.environment = environment | {name: str(scratch / "caches" / each) for name, each in caches.items()}
        self.content: Record = {"plan": asdict(plan), "failed": [], "starts": {}, "engines": {}}

    def left(self) -> float:
        return self.end - time.time()

    def prepare(self, photographs: Path | None) -> bool:
        """Shards and the cache of their visual tokens; False if there are none."""
        began, shards = time.time(), self.scratch / "shards"
        split: list[str] = []
        sizes: dict[str, int] = {}
        if photographs is not None:
            split = ["--val-fraction", "0.1", *groups(photographs, self.scratch)]
            made = self._run("shards", module("farl.data", "build", str(photographs), "--out", str(shards), *split))
            if made:
                built = json.loads((shards / "train.build.json").read_text())["splits"]
                sizes = {"train": built["train"]["samples"], "held_out": built["val"]["samples"]}
        else:
            train, held_out, size = self.plan.drawn
            counts = ("--train", str(train), "--val", str(held_out), "--size", str(size))
            made = self._run("drawn faces", module("farl.faces", "--out", str(shards), *counts, "--no-sheet"))
        ready = time.time()
        how = ("--model", self.plan.model, "--views", str(self.plan.views), "--device", self.plan.device)
        places = ("--data", f"{shards}/train-*.tar", "--out", str(self.scratch / "tokens"))
        tokens = made and self._run("visual tokens", module("farl.data", "tokenize", *places, *how))
        self.content["data"] = {
            "what": "photographs" if photographs else "drawn faces",
            **(sizes or dict(zip(("train", "held_out"), self.plan.drawn, strict=False))),
            "by_person": "--group-csv" in split,
            "shards_seconds": ready - began,
            "tokens_seconds": time.time() - ready,
        }
        return bool(tokens)

    def cold(self) -> Finished | None:
        run_dir = self.scratch / "cold"
        found = self._train("cold start", cold_run(self.plan, self.scratch, run_dir), run_dir, self.end)
        self._start("cold", found, self.plan.batch)
        return None if found.failed else found

    def long(self, probe: Finished, share: float) -> None:
        """The run itself; `share` of the time that is left is for it."""
        plan, seconds = self.plan, share * self.left()
        speed = steady(probe.records, plan.batch)
        if speed is None or probe.first_update is None:
            status = f"not measured: the cold start came to {len(probe.records)} updates, too few to tell the speed"
            self.content["failed"].append({"what": "run", "status": status})
            return
        per_update = speed["seconds_per_update"]
        # What a run does beyond its updates: an evaluation and a checkpoint here, more of them and a report there.
        beyond = max(0.0, probe.seconds - probe.first_update - plan.probe * per_update)
        fitting = updates_in(seconds, start=probe.first_update, finish=5 * beyond, per_update=per_update)
        updates, run_dir = plan.updates or fitting, self.scratch / "long"
        say(f"{updates} updates of {plan.batch} pairs, {per_update:.3f} s each by the cold start")
        command = long_run(plan, self.scratch, run_dir, updates)
        found = self._train("run", command, run_dir, min(self.end, time.time() + 1.25 * seconds))
        self._start("warm", found, plan.batch)
        self.content["run"] = {
            "command": self._shown(" ".join(["python", *found.command[1:]])),
            "updates_planned": updates,
            "updates": found.records[-1]["step"] if found.records else 0,
            "batch": plan.batch,
            "seconds": found.seconds,
            "stopped": found.stopped,
            "steady": steady(found.records, plan.batch),
            "memory_bytes": max((record["memory_bytes"] for record in found.records), default=None),
            "training": [{key: record.get(key) for key in (*KEPT, *KEPT_RATES)} for record in found.records],
            "evaluation": [{k: v for k, v in line.items() if not isinstance(v, dict)} for line in found.evaluations],
        }

    def engines(self) -> None:
        """The same short run with each engine; in bfloat16 also the plain one in fp32, by which all are measured."""
        plan = self.plan
        runs = [(name, name, plan.precision) for name in plan.engines]
        if plan.precision != "fp32":
            runs.insert(1, (f"{plan.engines[0]} fp32", plan.engines[0], "fp32"))
        curves: dict[str, Curve] = {}
        for number, (name, engine, precision) in enumerate(runs):
            seconds = self.left() / (len(runs) - number)
            if seconds < LEAST_SECONDS:
                self.content["failed"].append({"what": f"engine {name}", "status": "not measured: out of time"})
                continue
            run_dir = self.scratch / "engine"
            command = engine_run(plan, self.scratch, run_dir, engine, precision)
            found = self._train(f"engine {name}", command, run_dir, time.time() + seconds)
            curves[name] = {record["step"]: record["loss"] for record in found.records}
            self.content["engines"][name] = {
                "command": self._shown(" ".join(["python", *found.command[1:]])),
                "updates": len(found.records),
                "first_update_seconds": first_update(found, plan.engine_batch, plan.device == "cuda"),
                "seconds": found.seconds,
                "stopped": found.stopped,
                "steady": steady(found.records, plan.engine_batch),
                "loss": [float(f"{record['loss']:.9g}") for record in found.records],
            }
        compared = compare(curves, plan)
        self.content["comparisons"] = [asdict(each) | {"passed": each.passed} for each in compared]

    def _train(self, what: str, command: list[str], run_dir: Path, end: float) -> Finished:
        say(f"[{what}] at most {max(0.0, end - time.time()):.0f} s, {self.left():.0f} s left in all")
        found = watch(
            command,
            environment=self.environment,
            folder=ROOT,
            end=end,
            run_dir=run_dir,
            say=lambda text: say(f"[{what}] ... {text}"),
        )
        self._note(what, found)
        # Checkpoints of several runs could fill a disk.
        shutil.rmtree(run_dir, ignore_errors=True)
        return found

    def _run(self, what: str, command: list[str]) -> bool:
        say(f"[{what}]")
        found = watch(command, environment=self.environment, folder=ROOT, end=self.end, say=say)
        self._note(what, found)
        return not found.failed

    def _note(self, what: str, found: Finished) -> None:
        cut = ", told to leave because time was up" if found.stopped else ""
        say(f"[{what}] {'failed' if found.failed else 'done'} after {found.seconds:.1f} s{cut}")
        if found.failed:
            status = "had to be killed" if found.code is None else f"exit status {found.code}"
            tail = [self._shown(line) for line in found.tail]
            self.content["failed"].append({"what": what, "status": status + cut, "tail": tail})
            say("\n".join(f"    | {line}" for line in found.tail))

    def _shown(self, text: str) -> str:
        """For a reader: without the folders of this machine."""
        return text.replace(str(self.scratch), "DIR").replace(str(ROOT), ".")

    def _start(self, caches: str, found: Finished, batch: int) -> None:
        self.content["starts"][caches] = {
            "seconds": first_update(found, batch, self.plan.device == "cuda"),
            "said": [[seconds, self._shown(line)] for seconds, line in found.said],
        }


def first_update(found: Finished, batch: int, late: bool) -> float | None:
    """Seconds from the start of the process to its first update.

    Args:
        late: a line of the log is written with the next one, so that nobody waits for the GPU. All but one of the
            updates between them are taken off: what is left is at most one update too much.
    """
    if found.first_update is None or not late or len(found.records) < 2:
        return found.first_update
    first, second = found.records[:2]
    updates = second["step"] - first["step"]
    return found.first_update - (updates - 1) * batch / second["pairs_per_second"]


def compare(curves: dict[str, Curve], plan: Plan) -> list[Comparison]:
    """Every engine but the plain one against it, where both have a curve."""
    plain, *others = plan.engines
    exact = curves.get(f"{plain} fp32")
    found = []
    for name in others:
        if not curves.get(name) or not curves.get(plain):
            continue
        if plan.precision == "fp32":
            found.append(compare_exact(name, curves[name], plain, curves[plain]))
        elif exact:
            found.append(compare_rounded(name, curves[name], curves[plain], exact))
    return found


def groups(photographs: Path, scratch: Path) -> list[str]:
    """Options that split by person, if the tar has a table of persons."""
    with tarfile.open(photographs) as tar:
        # Members of a sample come in thousands, and the table may be the last of them.
        table = next((member for member in tar if member.isfile() and member.name.endswith(".csv")), None)
        if table is None:
            return []
        stream, path = tar.extractfile(table), scratch / "people.csv"
        assert stream is not None
        path.write_bytes(stream.read())
    return ["--group-csv", str(path), "--group-column", "person"]


def measure(
    plan: Plan, out: Path, photographs: Path | None, environment: dict[str, str], end: float, machine: Record
) -> Record:
    """All runs; what there is by then is written to `out` even where something breaks off."""
    with tempfile.TemporaryDirectory(prefix="farl-training-") as scratch:
        runs = Measurement(plan, out, Path(scratch), environment, end)
        try:
            if runs.prepare(photographs) and (probe := runs.cold()):
                runs.long(probe, plan.long_share if plan.engines else 1.0)
                runs.engines()
        finally:
            content = {
                "machine_info": {"farl": machine},
                "section": "training",
                "datetime": datetime.datetime.now(datetime.UTC).isoformat(),
                "training": runs.content,
            }
            (out / "training.json").write_text(json.dumps(content, indent=1) + "\n")
    draw(content, out / "training.png")
    return content


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    out = Path(options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    environment = environment_of(options)
    end = min(time.time() + 60 * options.minutes - RESERVE_SECONDS, float(os.environ.get(VARIABLE, "inf")))
    machine = ask_machine(environment)
    plan = adapted(plan_of("capability" in machine, options.processes), options)
    content = measure(plan, out, options.photographs, environment, end, machine)
    say("\n" + "\n".join(words(content)))
    found = content["training"]
    wrong = [each for each in found.get("comparisons", []) if not each["passed"]]
    return int(bool(wrong) or any("tail" in failure for failure in found["failed"]))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    description = (__doc__ or "").partition("\n\n")[2]
    parser = argparse.ArgumentParser(
        "python -m bench.training", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="folder for training.json and training.png")
    given = os.environ.get("FARL_PHOTOGRAPHS")
    help_ = "tar of photographs with captions; default: that of FARL_PHOTOGRAPHS, else drawn faces"
    parser.add_argument("--photographs", type=Path, default=given, help=help_)
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for everything; default: {MINUTES}")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--commit", help="commit of these files, where there is no git")
    parser.add_argument("--processes", type=int, default=1, help="of each run, under torchrun; one a GPU")
    parser.add_argument("--model", help="of all runs; default: farl-b16 and farl-s16 on a GPU, farl-tiny on a CPU")
    parser.add_argument("--batch", type=int, help="pairs an update of the long run")
    parser.add_argument("--updates", type=int, help="of the long run; default: as many as fit")
    parser.add_argument("--engine", help="of the long run; default: fused")
    parser.add_argument("--engines", help="to compare, the plain one first; default: all, as in eager,fused,compile")
    parser.add_argument("--engine-updates", type=int, help="of the comparison; default: 500 on a GPU, 100 on a CPU")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on a GPU, fp32 on a CPU")
    options = parser.parse_args(arguments)
    if options.photographs and not options.photographs.is_file():
        parser.error(f"--photographs names {options.photographs}, which is no file")
    return options


def adapted(plan: Plan, options: argparse.Namespace) -> Plan:
    """The plan with what the command line says otherwise."""
    names = ("model", "batch", "updates", "engine", "engine_updates", "precision")
    changes: Record = {name: getattr(options, name) for name in names if getattr(options, name)}
    if options.model:
        changes["engine_model"] = options.model
    if options.engines is not None:
        changes["engines"] = tuple(filter(None, options.engines.split(",")))
    return replace(plan, **changes)


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
