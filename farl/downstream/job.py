"""Everything that decides a fine-tuning run, and whether a checkpoint belongs to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from farl.downstream.fractions import FRACTION_SEED, FractionSet
from farl.downstream.task import LabelledSet, Task, TuneSettings
from farl_engine.data import SampleOrder
from farl_engine.distributed import World


@dataclass(frozen=True)
class Job:
    """One fine-tuning run.

    Attributes:
        train, test: labelled sets that fit `task`.
        init, blocks: as in `load_backbone`.
        run_dir: gets metrics.jsonl, checkpoints/, last.pt, best.pt, curves.png and worst.png; the same one resumes.
        steps: updates in all; None takes the protocol's epochs.
        stop_at: save and leave after this many updates; None runs to the end.
        eval_every: updates between two evaluations; None is once an epoch. There is always one at the end.
        log_every: updates between two lines of losses.
        fraction, fraction_seed: share of the training set, see `FractionSet`.
        seed: of random weights, order, augmentation and dropout.
        threads: that read ahead; 0 reads between the steps.
        bf16: compute in bfloat16 by autocast; None does so on a GPU alone.
        recompute: keep no activations inside the backbone's blocks.
        check: decode all files once before a new run.
        pictures: test images among which the worst are looked for; 0 draws none.
    """

    task: Task
    train: LabelledSet
    test: LabelledSet
    init: str
    run_dir: Path
    settings: TuneSettings
    blocks: tuple[int, ...] | None = None
    steps: int | None = None
    stop_at: int | None = None
    eval_every: int | None = None
    log_every: int = 20
    fraction: float = 1.0
    fraction_seed: int = FRACTION_SEED
    seed: int = 0
    threads: int = 2
    bf16: bool | None = None
    recompute: bool = False
    check: bool = True
    pictures: int = 64

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.train) // self.settings.batch)

    @property
    def total_steps(self) -> int:
        return self.settings.epochs * self.steps_per_epoch if self.steps is None else self.steps

    def used(self) -> FractionSet:
        """The training set that is used: `fraction` of it."""
        return FractionSet(self.train, self.fraction, self.fraction_seed)

    def is_bf16(self, device: torch.device) -> bool:
        return device.type == "cuda" if self.bf16 is None else self.bf16

    def identity(self, device: torch.device) -> dict[str, dict[str, Any]]:
        """Plain values of all that decides the weights at a step."""
        run = {"steps": self.total_steps, "seed": self.seed, "bf16": self.is_bf16(device)}
        return plain(
            {
                "task": self.task.about(),
                "settings": asdict(self.settings) | run,
                "backbone": {"init": self.init, "blocks": self.blocks},
                "train": self.used().about(),
                "test": self.test.about(),
            }
        )

    def check_world(self, world: World) -> None:
        """ValueError where the run cannot be done by so many processes, or there is nothing to do it on."""
        if not len(self.train) or not len(self.test):
            raise ValueError(f"the {'test' if len(self.train) else 'training'} set is empty")
        if self.settings.batch % world.size:
            raise ValueError(f"the batch of {self.settings.batch} is not divisible by {world.size} processes")

    def own_batches(self, world: World, start: int, end: int) -> Iterator[list[int]]:
        """Positions in the training set of this process's part of each batch: a pure function of seed and step.

        Every sample comes once an epoch; a batch at an epoch's end goes on into the next one.
        """
        order = SampleOrder(len(self.train), self.settings.batch, self.seed)
        size = self.settings.batch // world.size
        for step in range(start, end):
            yield order.ids(step)[world.rank * size : (world.rank + 1) * size].tolist()


def check_same_run(before: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]], run_dir: Path) -> None:
    """Refuse to go on from a checkpoint of other settings or data; the same files at another path pass.

    Raises:
        ValueError: one line that names each difference.
    """
    differences = []
    for part, new in now.items():
        old = before[part]
        for name in {**old, **new}:
            if name != "path" and old.get(name) != new.get(name):
                differences.append(f"{part} {name} was {old.get(name)}, is {new.get(name)}")
    if differences:
        raise ValueError(
            f"the checkpoint in {run_dir} belongs to another run: {'; '.join(differences)}. "
            "Use another --run-dir, or the old settings"
        )


def plain(value: Any) -> Any:
    """Nested values as JSON and checkpoints give them back: lists for tuples, Python's numbers for numpy's."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return [plain(entry) for entry in value]
    return value.item() if isinstance(value, np.generic) else value
