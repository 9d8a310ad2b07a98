"""What a run is made of; `farl_engine.loop.train` puts it in motion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from farl_engine.checkpoint import CheckpointStore
from farl_engine.data import Batch, Loader
from farl_engine.distributed import World
from farl_engine.graphs import Recorder
from farl_engine.metrics import MetricsLog, Progress
from farl_engine.profiler import Profiler


@dataclass(frozen=True)
class Schedule:
    """When things happen, in completed steps."""

    steps: int
    stop_at: int
    log_every: int
    eval_every: int
    save_every: int
    save_minutes: float
    clip_norm: float
    learning_rate: Callable[[int], float]


@dataclass
class Run:
    """The parts of a run.

    Attributes:
        forward_backward: leaves gradients (reduced over ranks) on the parameters and returns 0-d device tensors whose
            sum over ranks is the figure to log; one is named "loss".
        after_update: called after each optimizer step; returns 0-d device tensors to log as they are.
        snapshot: the whole state of the run after that many steps, as nested dicts of tensors and plain values.
        evaluate: figures to log at a step, or None if `should_stop` said so; every rank calls it together, and
            `should_stop` is a collective call. None: no evaluation.
        flops_per_sample: of a training step, for the MFU.
        profiler: records some updates of this process; None: none.
        recorder: records updates to replay them (see `farl_engine.graphs`); None: each is called as it is.
    """

    world: World
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loader: Loader
    forward_backward: Callable[[Batch], dict[str, Tensor]]
    after_update: Callable[[], dict[str, Tensor]]
    snapshot: Callable[[int], dict[str, Any]]
    evaluate: Callable[[int, Callable[[], bool]], dict[str, Any] | None] | None
    store: CheckpointStore
    log: MetricsLog | None
    progress: Progress
    schedule: Schedule
    global_batch: int
    flops_per_sample: float
    start_step: int
    profiler: Profiler | None = None
    recorder: Recorder | None = None
