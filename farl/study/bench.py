"""Does one cell after the other in one process, which keeps what is slow to open."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any, cast

import torch

from farl.config import TrainConfig
from farl.downstream.job import Job, plain
from farl.downstream.network import task_module
from farl.downstream.reading import check_files
from farl.downstream.task import LabelledSet, Sample, Task, TuneSettings
from farl.downstream.tuner import Tuner
from farl.evaluation.features import spread_positions
from farl.evaluation.provenance import describe_versions
from farl.study.cells import Cell, Result, write_json
from farl.study.plans import PRETRAIN_SHARDS, SCRATCH, Arm, TaskPlan
from farl.study.study import Study
from farl_engine import distributed
from farl_engine.checkpoint import CheckpointStore
from farl_engine.distributed import World


class StoppedError(Exception):
    """A signal came; the cell is not done."""


class Part:
    """At most `limit` samples of a set, at equal distances."""

    def __init__(self, whole: LabelledSet, limit: int) -> None:
        self.whole, self.positions = whole, spread_positions(len(whole), limit).tolist()

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Sample:
        return self.whole[self.positions[index]]

    def about(self) -> dict[str, Any]:
        return self.whole.about() | {"samples": len(self), "of": len(self.whole)}


class Bench:
    """Runs the cells of a study and writes their results."""

    def __init__(self, study: Study) -> None:
        self.study, self.world = study, distributed.start("auto")
        self._opened: dict[str, tuple[Task, LabelledSet, LabelledSet]] = {}

    def run(self, cell: Cell) -> None:
        """Do a cell and write its result.

        Raises:
            StoppedError: a signal came before its end. Others: what the work raises.
        """
        wall, cpu = time.monotonic(), time.process_time()
        result = getattr(self, f"_{cell.kind}")(cell)
        seconds = {"wall_seconds": time.monotonic() - wall, "cpu_seconds": time.process_time() - cpu}
        for name, value in seconds.items():
            result[name] = round(value + result.get(name, 0), 2)
        about = {name: value for name, value in dataclasses.asdict(cell).items() if value and name != "needs"}
        about |= {"seed": cell.seed} if cell.kind == "tune" else {}
        about |= {"identity": self.study.identity, "threads": torch.get_num_threads()}
        write_json(
            self.study.results / f"{cell.key}.json",
            about | result | {"versions": describe_versions(self.world.device)},
        )

    def _check(self, cell: Cell) -> Result:
        task, train, test = self._open(cell.task)
        check_files(train, range(len(train)), "the training set", self.world, 1)
        check_files(test, range(len(test)), "the test set", self.world, 1)
        return plain({"task_about": task.about(), "train": train.about(), "test": test.about()})

    def _pretrain(self, cell: Cell) -> Result:
        from farl.pretrain import pretrain

        config = pretrain_config(self.study, self.study.plan.arm(cell.arm))
        run_dir = Path(config.run_dir)
        spent = _Clock(run_dir / "time.json")
        try:
            pretrain(config)
        finally:
            spent.note()
        if CheckpointStore(run_dir / "checkpoints").latest() != config.steps:
            raise StoppedError
        records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        last = next(record for record in reversed(records) if "loss" in record)
        return {**spent.before, "losses": {name: value for name, value in last.items() if "loss" in name}}

    def _tune(self, cell: Cell) -> Result:
        plan = self.study.plan.task(cell.task)
        task, train, test = self._open(cell.task)
        run_dir = self.study.run_dir / "work" / cell.key
        shutil.rmtree(run_dir, ignore_errors=True)  # of a run that was killed: it is short enough to begin anew
        job = Job(
            task=task,
            train=train,
            test=test,
            init=self._init(cell.arm),
            run_dir=run_dir,
            settings=tune_settings(plan, task),
            steps=plan.updates,
            eval_every=plan.updates,
            fraction=cell.fraction,
            fraction_seed=cell.seed,
            seed=cell.seed,
            threads=0 if self.world.device.type == "cpu" else 4,
            check=False,
            pictures=0,
        )
        job.check_world(self.world)
        tuner = make_tuner(job, self.world)
        tuner.run()
        if tuner.step < plan.updates or not tuner.is_evaluated():
            raise StoppedError
        records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        shutil.rmtree(run_dir, ignore_errors=True)
        return plain(
            {
                "metrics": tuner.history[-1]["metrics"],
                "metric": plan.metric,
                "higher_is_better": plan.higher_is_better,
                "last_loss": next((record["loss"] for record in reversed(records) if "loss" in record), None),
                "labelled_images": len(job.used().chosen),
                "test_images": len(test),
                "settings": dataclasses.asdict(job.settings),
                "updates": plan.updates,
            }
        )

    def _init(self, arm: str) -> str:
        if self.study.plan.arm(arm).pretrain is None:
            return f"{SCRATCH}:{self.study.plan.pretrain['model']}"
        return str(self.study.pretrained(arm))

    def _open(self, name: str) -> tuple[Task, LabelledSet, LabelledSet]:
        if name not in self._opened:
            plan, module = self.study.plan.task(name), task_module(name)
            train = module.open_set(str(self.study.data / plan.train), split="train")
            test = module.open_set(str(self.study.data / plan.test), split="test")
            made: Any = module.make_task(train, crop=plan.crop)
            task = cast(Task, dataclasses.replace(made, **plan.task))
            if plan.metric not in task.metric().compute():
                raise ValueError(f"the plan shows {plan.metric} for {name}, which has no such figure")
            self._opened[name] = (task, train, Part(test, plan.test_images))
        return self._opened[name]


def make_tuner(job: Job, world: World) -> Tuner:
    """The tuner of a job whose head is the seed's: the loop draws it after the backbone, so arms would differ in it."""
    tuner = Tuner(job, world)
    torch.manual_seed(job.seed)
    head = job.task.make_head(tuner.network.backbone).state_dict()
    for network in (tuner.network, tuner.average.network):
        network.head.load_state_dict(head)
    return tuner


class _Clock:
    """Seconds of earlier parts of a run that goes on by itself, kept in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.before: dict[str, float] = {"wall_seconds": 0.0, "cpu_seconds": 0.0}
        if path.is_file():
            self.before = json.loads(path.read_text())
        self._wall, self._cpu = time.monotonic(), time.process_time()

    def note(self) -> None:
        write_json(
            self.path,
            {
                "wall_seconds": self.before["wall_seconds"] + time.monotonic() - self._wall,
                "cpu_seconds": self.before["cpu_seconds"] + time.process_time() - self._cpu,
            },
        )


def pretrain_config(study: Study, arm: Arm) -> TrainConfig:
    """The settings of an arm's pre-training."""
    assert arm.pretrain is not None
    fields: dict[str, Any] = {
        "run_dir": str(study.pretrained(arm.name)),
        "data": str(study.data / PRETRAIN_SHARDS),
        "log_every": 20,
        "eval_every": 0,
        "save_every": 0,
        "save_minutes": 2.0,
        "keep_last": 1,
        "threads": 1,
        **study.plan.pretrain,
        **arm.pretrain,
    }
    return TrainConfig(**fields)


def tune_settings(plan: TaskPlan, task: Task) -> TuneSettings:
    """The protocol with what the plan replaces."""
    sizes = {"crop": plan.crop, "resolution": plan.crop}
    return dataclasses.replace(task.protocol, **sizes, **plan.settings)
