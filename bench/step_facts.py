"""What is told of a training step besides its time: products taken, peak memory, and seconds by part."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.contest import NotMeasuredError
from bench.step_training import CAPTION_TOKENS, Case, Training, tokenizer_of
from bench.timing import CUDA, DEVICE
from farl.flops import count_flops
from farl.masking import mask_sizes
from farl.memory import predict_memory
from farl.model import FaRL
from farl.profiling import Profile, make_profile, measure_ceilings, work_of
from farl_engine.profiler import Profiler, Recording

# Products are counted on so many pairs at most: a pair's do not depend on how many there are, but for the contrastive
# loss, which takes less than a thousandth.
COUNTED_PAIRS = 64


def computed_flop(build: Callable[[Case], Training], case: Case) -> float:
    """FLOP that a step of this contender takes, padding and unused rows and all."""
    return case.pairs * _computed_per_pair(build, replace(case, pairs=min(case.pairs, COUNTED_PAIRS)))


@functools.cache
def _computed_per_pair(build: Callable[[Case], Training], case: Case) -> float:
    return count_flops(build(case)) / case.pairs


def predicted_bytes(case: Case) -> int | None:
    """What `farl.memory` says of FaRL's own step; None where it has no prediction."""
    if not CUDA and case.precision != "float32":
        return None
    dtype = torch.bfloat16 if case.precision == "bfloat16" else torch.float32
    return predict_memory(case.config, pairs=case.pairs, dtype=dtype, caption_tokens=CAPTION_TOKENS, fused=CUDA).peak


def step_bytes(training: Training) -> int:
    """On a CPU: weights, moments, and the most that a step has allocated beyond them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        training()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events: list[Any] = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return training.lasting_bytes + peak


class _BriefProfiler(Profiler):
    """The step has run before."""

    WARM_UP = 3


def profiled(training: Training, case: Case, *, updates: int = 2) -> Profile:
    """Seconds of FaRL's own step by part, with floors: as `farl.train --profile` tells them."""
    assert isinstance(training.model, FaRL)
    found: list[Recording] = []
    failures: list[str] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        _BriefProfiler(
            Path(folder), updates=updates, device=DEVICE, report=found.append, say=failures.append
        ) as profiler,
    ):
        for step in range(_BriefProfiler.WARM_UP + updates + 1):
            profiler.begin(step)
            training()
    if not found:
        raise NotMeasuredError(f"no profile: {'; '.join(failures)}")
    tokenizer = tokenizer_of(case, torch.empty(0)) if case.online else None
    work = work_of(
        training.model,
        pairs=case.pairs,
        global_batch=case.pairs,
        masked=mask_sizes(case.config.vision.grid)[0],
        contrast=True,
        tokenizer=tokenizer,
    )
    dtype = torch.bfloat16 if CUDA and case.precision == "bfloat16" else torch.float32
    ceilings = measure_ceilings(DEVICE, dtype, sum(work.parameters.values()))
    return make_profile(found[0], work, ceilings, device=DEVICE.type, engine="fused")


def parts_of(found: Profile) -> list[dict[str, Any]]:
    """For a result: {"part", "forward", "backward", "floor"} in seconds, in the order of the step."""
    return [
        {"part": row.part, "forward": row.forward, "backward": row.backward, "floor": row.floor} for row in found.rows
    ]
