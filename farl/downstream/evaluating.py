"""Figures of a network on a test set, shared out over processes, and a picture of its worst cases."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from farl.downstream.network import Network
from farl.downstream.reading import read_batches
from farl.downstream.task import LabelledSet, Task
from farl.evaluation.features import spread_positions
from farl.progress import Progress
from farl_engine import stop
from farl_engine.distributed import Verdict, Vote, World

# Cases on the sheet.
WORST = 12


@dataclass(frozen=True)
class Evaluator:
    """How a network is judged.

    Attributes:
        batch: images a forward pass.
        bf16: compute in bfloat16 by autocast.
        threads: that read ahead.
    """

    task: Task
    test: LabelledSet
    world: World
    batch: int
    bf16: bool
    threads: int

    @torch.no_grad()
    def figures(self, network: Network) -> dict[str, float] | None:
        """All figures over the whole test set, the same on every process; None where a signal stopped it.

        Process r of W takes the images r, r + W, ...: each is counted once, and sums are added in float64.
        """
        metric = self.task.metric()
        own = range(self.world.rank, len(self.test), self.world.size)
        batches = (own[first : first + self.batch] for first in range(0, len(own), self.batch))
        progress = Progress(len(own), "evaluate", unit="images")
        with progress, contextlib.closing(read_batches(self.test, batches, self.threads)) as reader:
            for samples in reader:
                if stop.requested():
                    break
                batch = self.task.batch(samples, self.world.device, rng=None)
                metric.update(self._outputs(network, batch), batch)
                progress.update(len(samples))
        if Vote(self.world).cast_now(Verdict.STOP if stop.requested() else Verdict.GO) is not Verdict.GO:
            return None
        if self.world.control is not None:
            sums = metric.state()
            dist.all_reduce(sums, group=self.world.control)
            metric.load_state(sums)
        return metric.compute()

    def worst_cases(self, network: Network, path: Path, look_at: int) -> dict[str, Any]:
        """Draw the worst of `look_at` test images, at equal distances in the set, as a PNG; on one process.

        Returns:
            Names and scores of those drawn, worst first, and how many were looked at.
        """
        cases = list(self._single(network, [int(index) for index in spread_positions(len(self.test), look_at)]))
        sign = 1 if self.task.higher_is_better else -1
        # Without a score (nothing to judge on that image) it is not among the worst.
        cases.sort(key=lambda case: math.inf if math.isnan(case[2]) else sign * case[2])
        worst = cases[:WORST]
        samples, predictions, scores = zip(*worst, strict=True)
        self.task.draw(samples, predictions, scores).save(path)
        named = [{"name": str(sample["name"]), "score": _plain(score)} for sample, _, score in worst]
        return {"file": path.name, "looked_at": len(cases), "worst_first": named}

    @torch.no_grad()
    def _single(self, network: Network, indices: list[int]) -> Iterator[tuple[Any, Any, float]]:
        """Sample, prediction and own score of each image."""
        with contextlib.closing(read_batches(self.test, ([index] for index in indices), self.threads)) as reader:
            for samples in reader:
                batch = self.task.batch(samples, self.world.device, rng=None)
                outputs = self._outputs(network, batch)
                metric = self.task.metric()
                metric.update(outputs, batch)
                (prediction,) = self.task.predict(outputs, batch)
                yield samples[0], prediction, metric.compute()[self.task.main_metric]

    def _outputs(self, network: Network, batch: dict[str, Any]) -> Any:
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.bf16):
            return network(batch["images"])


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)
