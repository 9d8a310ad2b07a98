"""Pairs a second of training with everything in it: shards are read, photographs decoded, and the real loop trains.

Beside it the same loop on batches of the same loader that are on the device already: the ratio says what reading and
decoding cost. Visual tokens are given to both, as from a token cache. Before any time is taken, both must log the same
finite losses from the same start.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.contest import NotMeasuredError, check_ready, clean_up, leave_out
from bench.interleaved import Ratio, Replay
from bench.photographs import SETS, PhotographSet
from bench.step_training import SMALL, GivenTokens, flop_per_pair, fresh
from bench.timing import CUDA, DEVICE
from farl.initialize import UNDECAYED
from farl.model import MODELS
from farl.step import TrainStep, clamp_logit_scale, pack_parts
from farl_engine.checkpoint import CheckpointStore
from farl_engine.data import Batch, CropPlan, Loader, SampleOrder, ShardIndex
from farl_engine.data.decoders import choose_decoder
from farl_engine.distributed import World
from farl_engine.loop import Run, Schedule, train
from farl_engine.metrics import MetricsLog, Progress
from farl_engine.optim import parameter_groups

OP = "whole step with decoding"
CONFIG = MODELS["farl-b16"] if CUDA else SMALL
PAIRS, THREADS, ROUNDS = (256, 8, 5) if CUDA else (16, 2, 3)
# As many steps before the clock starts as are timed: more than the loader makes ahead.
STEPS = 10 if CUDA else 4
CHECKED_STEPS = 2
# Relative, of the losses. On a GPU sums are made in no fixed order.
LIMIT = 1e-3 if CUDA else 1e-5
# Captions of 16 tokens or so, as those of web pairs, with what the photographs' own captions say.
MORE_WORDS = ", of a person with long dark hair who smiles"
ALONE, DECODING = "farl, batches on the device", "farl, photographs decoded"
CLOCK = Replay()


class Resident:
    """In place of a loader: batches that are on the device already, again and again."""

    error = None

    def __init__(self, batches: list[Batch]) -> None:
        self._batches = batches
        self.bad_samples: dict[str, int] = {}

    def __iter__(self) -> Iterator[Batch]:
        return itertools.cycle(self._batches)

    def check_bad(self) -> None:
        """Has no bad samples."""

    def stage_times(self) -> dict[str, float]:
        stages = ("read", "decode", "text", "device_decode", "wait_for_batch")
        return dict.fromkeys((*stages, "queue_depth", "mean_queue_depth", "threads"), 0.0)


class Training:
    """A model in training by `farl_engine.loop.train`, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._runs = folder, itertools.count()
        self._model = fresh(CONFIG)
        groups = parameter_groups(self._model, 0.05, no_decay=lambda name, _: name.endswith(UNDECAYED))
        self._optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.98), eps=1e-6, fused=True)
        self._world = World(rank=0, size=1, device=DEVICE, control=None)
        assert CONFIG.mim is not None
        g = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, CONFIG.mim.vocab_size, (PAIRS, CONFIG.vision.num_patches), generator=g)
        self._step = TrainStep(
            self._model,
            self._world,
            GivenTokens(tokens.to(DEVICE), CONFIG.mim.vocab_size),
            mim_weight=1.0,
            mask_ratio=75 / 196,
            seed=0,
            bf16=CUDA,
        )

    def run(self, loader: Any, steps: int, log_every: int) -> list[dict[str, Any]]:
        """Lines of the log."""
        folder = self._folder / f"run-{next(self._runs)}"
        log, done = MetricsLog(folder, resume_step=0), itertools.count(1)

        def after_update() -> dict[str, torch.Tensor]:
            if CUDA and next(done) % log_every == 0:
                # The log takes the time of the host, which would be ahead of the device in so short a run.
                torch.cuda.synchronize()
            return clamp_logit_scale(self._model)

        schedule = Schedule(
            steps=steps,
            stop_at=steps,
            log_every=log_every,
            eval_every=0,
            save_every=0,
            save_minutes=0.0,
            clip_norm=1.0,
            learning_rate=lambda step: 1e-4,
        )
        run = Run(
            world=self._world,
            model=self._model,
            optimizer=self._optimizer,
            loader=loader,
            forward_backward=self._step,
            after_update=after_update,
            snapshot=lambda step: {"step": step},
            evaluate=None,
            store=CheckpointStore(folder / "checkpoints"),
            log=log,
            progress=Progress(start=0, total=steps, enabled=False),
            schedule=schedule,
            global_batch=PAIRS,
            flops_per_sample=flop_per_pair(CONFIG),
            start_step=0,
        )
        train(run)
        log.close()
        return [json.loads(line) for line in log.path.read_text().splitlines()]


def make_loader(index: ShardIndex, decoder: Any, steps: int) -> Loader:
    """As `farl.train` makes it, but for its longer captions."""
    return Loader(
        index,
        SampleOrder(len(index), PAIRS, seed=0),
        decoder=decoder,
        plan=CropPlan(scale=(0.9, 1.0)),
        seed=0,
        text_transform=lambda captions: pack_parts([caption + MORE_WORDS for caption in captions], 0),
        threads=THREADS,
        device=DEVICE,
        end_step=steps,
    )


class Contest:
    """Both ways to train over one set of photographs, compared and timed in turns.

    Attributes:
        seconds: of a step, a figure a round. waits: share of the time in which the step waits for data, likewise.
        error: of the losses, relative.
        reason: why nothing was measured, if it was not.
    """

    def __init__(self, photographs: PhotographSet, folder: Path) -> None:
        self.seconds: dict[str, list[float]] = {ALONE: [], DECODING: []}
        self.waits: dict[str, list[float]] = {ALONE: [], DECODING: []}
        self.error, self.reason = 0.0, ""
        self.decoder = choose_decoder("auto", CONFIG.vision.image_size, device=DEVICE, threads=THREADS)
        try:
            check_ready()
            index = ShardIndex.build(photographs.shards(folder))
        except (NotMeasuredError, ValueError) as error:
            self.reason = str(error)
            return
        loader = partial(make_loader, index, self.decoder)
        resident = self._checked(loader, folder)
        training = Training(folder / "timed")
        for turn in range(ROUNDS):
            # Not always behind the same one.
            for name in (ALONE, DECODING)[:: 1 if turn % 2 else -1]:
                with loader(2 * STEPS) as decoding:
                    line = training.run(resident if name == ALONE else decoding, 2 * STEPS, STEPS)[-1]
                self.seconds[name].append(PAIRS / line["pairs_per_second"])
                self.waits[name].append(line["data_wait_fraction"])

    def _checked(self, loader: Callable[[int], Loader], folder: Path) -> Resident:
        """The first batches, after training on them and from the loader gave the same losses."""
        with loader(CHECKED_STEPS) as first:
            resident = Resident(list(first))
        with loader(CHECKED_STEPS) as again:
            found = {
                name: [line["loss"] for line in Training(folder / name.split()[1]).run(batches, CHECKED_STEPS, 1)]
                for name, batches in ((ALONE, resident), (DECODING, again))
            }
        assert len(found[ALONE]) == CHECKED_STEPS
        self.error = max(abs(a / b - 1) for a, b in zip(found[DECODING], found[ALONE], strict=True))
        assert self.error <= LIMIT, f"other losses with decoding: {found}"
        return resident


@pytest.fixture(scope="module", params=[each for each in SETS if "250 x 250" in each.name], ids=lambda each: each.name)
def contest(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Contest]]:
    """Name of the set, and the contest over it."""
    yield request.param.name, Contest(request.param, tmp_path_factory.mktemp("end-to-end"))
    clean_up(f"{OP}, {request.param.name}")


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("name", [ALONE, DECODING])
def test_end_to_end(benchmark: Any, contest: tuple[str, Contest], name: str) -> None:
    photographs, result = contest
    model = "farl-b16" if CUDA else "small FaRL (192 x 12, 112 px)"
    decoder = f"{type(result.decoder).__name__}, {THREADS} threads"
    shape = f"{model}, {PAIRS} pairs, {'bfloat16' if CUDA else 'float32'}, photographs {photographs}, {decoder}"
    labels = {"op": OP, "shape": shape, "mode": "both", "contender": name}
    benchmark.group = f"{OP} | {shape}"
    benchmark.extra_info |= labels
    if result.reason:
        leave_out(labels, result.reason)
    seconds = result.seconds[name]
    benchmark.pedantic(CLOCK.load(seconds), rounds=len(seconds) if benchmark.enabled else 1)
    if benchmark.enabled:
        stats = benchmark.stats.stats
        ratio = Ratio.of(seconds, result.seconds[ALONE])
        benchmark.extra_info |= {
            "seconds": stats.median,
            "spread_seconds": stats.iqr,
            "timed": f"{ROUNDS} rounds in turns, {STEPS} steps each",
            "pairs_per_second": PAIRS / stats.median,
            "data_wait_fraction": statistics.median(result.waits[name]),
            "errors": {"loss": result.error},
            "times_ours": [ratio.median, ratio.low, ratio.high],
        }
