"""The training loop: fetch, forward, backward, clip, step, log, evaluate, save.

It knows tensors, steps and ranks; what a batch is and what the loss means is the caller's `forward_backward`.
On a GPU no step asks the device for anything: metrics are read one log interval late.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from farl_engine import stop
from farl_engine.checkpoint import CheckpointStore
from farl_engine.data import BadDataError, Batch, Loader
from farl_engine.distributed import Verdict, Vote, World, gather_objects
from farl_engine.metrics import MetricsLog, Progress, device_peak_flops, memory_bytes
from farl_engine.optim import FiniteGuard, set_learning_rate

# Python's collector, left alone, stops a step for up to half a second at a moment of its own choosing.
COLLECT_EVERY = 500


class NonFiniteError(FloatingPointError):
    """A loss or gradient was not finite; the state before that update is saved."""


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


def train(run: Run) -> tuple[int, str | None]:
    """Train from `start_step` to `stop_at`.

    Returns:
        The number of completed steps and the name of the signal that ended the run early (None: it reached its end).

    Raises:
        NonFiniteError, BadDataError, CheckpointError: on every rank, after the last good state is saved.
    """
    schedule, world = run.schedule, run.world
    vote, guard = Vote(world), FiniteGuard(world.device)
    guard.attach(run.optimizer)
    reporter = _Reporter(run, guard)
    parameters = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    batches = iter(run.loader)
    step, saved_step, saved_at = run.start_step, run.start_step if run.start_step else -1, time.monotonic()
    bad_data: BadDataError | None = None

    def verdict() -> Verdict:
        return Verdict.FAIL if bad_data else Verdict.STOP if stop.requested() else Verdict.GO

    def should_stop() -> bool:
        return vote.cast_now(verdict()) is not Verdict.GO

    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        while step < schedule.stop_at:
            agreed = vote.cast(verdict())
            if agreed is not Verdict.GO:
                break
            waited = time.monotonic()
            batch = next(batches)
            reporter.data_seconds += time.monotonic() - waited

            rate = schedule.learning_rate(step)
            set_learning_rate(run.optimizer, rate)
            figures = run.forward_backward(batch)
            grad_norm = nn.utils.clip_grad_norm_(parameters, schedule.clip_norm or float("inf"), foreach=True)
            shared = _sum_over_ranks(figures, world)
            guard.check(step, figures["loss"], (shared["loss"], grad_norm))
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
            shared |= {"grad_norm": grad_norm, **run.after_update()}
            step += 1
            run.progress.advance()

            last = step == schedule.stop_at
            if step % schedule.log_every == 0 or last or step == run.start_step + 1:
                reporter.report(step, shared, rate, now=last or world.device.type == "cpu")
                try:
                    run.loader.check_bad()
                except BadDataError as error:
                    bad_data = error
            if run.evaluate and schedule.eval_every and (step % schedule.eval_every == 0 or step == schedule.steps):
                reporter.report_evaluation(step, run.evaluate(step, should_stop))
            minutes = (time.monotonic() - saved_at) / 60
            if (schedule.save_every and step % schedule.save_every == 0) or (
                schedule.save_minutes and minutes >= schedule.save_minutes
            ):
                # No collective here: by the clock it may be time at this rank alone. What is not finite is raised when
                # the ranks read the figures together.
                if world.is_main and guard.read(guard.state().tolist()) is None:
                    run.store.save(step, run.snapshot(step), background=True)
                    saved_step = step
                saved_at = time.monotonic()
            if step % COLLECT_EVERY == 0:
                gc.collect(1)
        agreed = vote.cast_now(verdict())
        reporter.flush()
        reporter.raise_if_not_finite(guard.state().tolist())
        if world.is_main:
            if step != saved_step:
                run.store.save(step, run.snapshot(step))
            run.store.wait()
    finally:
        gc.enable()
        gc.unfreeze()
        run.progress.close()
    _raise_agreed_failure(world, agreed, bad_data)
    stopped_by = gather_objects(world, stop.requested()) if step < schedule.stop_at else []
    return step, next((str(name) for name in stopped_by if name), None)


def _raise_agreed_failure(world: World, agreed: Verdict, bad_data: BadDataError | None) -> None:
    """Every rank raises the failure of the first rank that has one, so that all leave together and say the same."""
    if agreed is Verdict.FAIL:
        messages = gather_objects(world, str(bad_data) if bad_data else None)
        raise BadDataError(next(str(message) for message in messages if message))


def _sum_over_ranks(figures: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """One all-reduce for all figures of a step."""
    stacked = torch.stack([value.detach().float() for value in figures.values()])
    if world.size > 1:
        dist.all_reduce(stacked)
    return dict(zip(figures, stacked.unbind(), strict=True))


class _Reporter:
    """Turns the device figures of a log step into a line, one interval late unless told `now`."""

    def __init__(self, run: Run, guard: FiniteGuard) -> None:
        self._run = run
        self._guard = guard
        self._peak = device_peak_flops(run.world.device)
        self._pending: tuple[dict[str, Any], list[str], Callable[[], list[float]]] | None = None
        self._interval_began = time.monotonic()
        self._interval_first_step = run.start_step
        self.data_seconds = 0.0

    def report(self, step: int, figures: dict[str, Tensor], rate: float, *, now: bool) -> None:
        """Take the figures of completed step `step`; write those of the report before, and these too if `now`."""
        run = self._run
        seconds = time.monotonic() - self._interval_began
        pairs_per_second = (step - self._interval_first_step) * run.global_batch / seconds
        record = {
            "step": step,
            "samples": step * run.global_batch,
            "lr": rate,
            "pairs_per_second": round(pairs_per_second, 2),
            "data_wait_fraction": round(self.data_seconds / seconds, 4),
            "mfu": self._mfu(pairs_per_second),
            "memory_bytes": memory_bytes(run.world.device),
            "bad_samples": sum(run.loader.bad_samples.values()),
            "loader_seconds": {stage: round(value, 4) for stage, value in run.loader.stage_times().items()},
        }
        self._interval_began, self._interval_first_step, self.data_seconds = time.monotonic(), step, 0.0
        self.flush()
        values = torch.stack([value.detach().double() for value in figures.values()])
        self._pending = (record, list(figures), _start_copy(torch.cat([values, self._guard.state()])))
        if now:
            self.flush()

    def flush(self) -> None:
        """Write the report that waits, if any; stop the run if the guard has tripped."""
        if self._pending is None:
            return
        record, names, copied = self._pending
        self._pending = None
        numbers = copied()
        step: int = record["step"]
        record = {"step": step, **dict(zip(names, numbers[: len(names)], strict=True)), **record}
        if self._run.log is not None:
            self._run.log.write(record)
        self._run.progress.show(step, _one_line(record))
        self.raise_if_not_finite(numbers[len(names) :])

    def report_evaluation(self, step: int, figures: dict[str, Any] | None) -> None:
        if figures is None:
            return
        # The time of an evaluation is not the time of a step.
        self._interval_began, self._interval_first_step, self.data_seconds = time.monotonic(), step, 0.0
        if self._run.log is not None:
            self._run.log.write({"step": step, "eval": figures})
        shown = "  ".join(f"{name} {value:.1%}" for name, value in figures.items() if name.endswith("_r1"))
        self._run.progress.say(f"evaluation after step {step}: {shown}")

    def raise_if_not_finite(self, guard_state: list[float]) -> None:
        """Save the untouched state and say what went wrong where; every rank calls this with the same flag."""
        found = self._guard.read(guard_state)
        if found is None:
            return
        step, own = found
        run = self._run
        if run.world.is_main:
            run.store.save(step, run.snapshot(step))
        guilty = [rank for rank, bad in enumerate(gather_objects(run.world, own)) if bad]
        where = f"the loss of rank {', '.join(map(str, guilty))}" if guilty else "a gradient"
        raise NonFiniteError(
            f"{where} was not finite in step {step + 1}; no weight was changed by it and the state after step {step} "
            "is saved. Lower --lr or --clip-grad, or look at the data of that step, before running the command again"
        )

    def _mfu(self, pairs_per_second: float) -> float | None:
        if self._peak is None:
            return None
        return round(pairs_per_second * self._run.flops_per_sample / (self._peak * self._run.world.size), 4)


def _start_copy(values: Tensor) -> Callable[[], list[float]]:
    """Start copying to the host; the function returned waits for this copy alone, not for what is queued after it."""
    if values.device.type == "cpu":
        return values.tolist
    host = torch.empty_like(values, device="cpu", pin_memory=True)
    host.copy_(values, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def read() -> list[float]:
        done.synchronize()
        return host.tolist()

    return read


def _one_line(record: dict[str, Any]) -> str:
    parts = [f"loss {record['loss']:.4f}"]
    parts += [f"{key.removeprefix('loss_')} {record[key]:.3f}" for key in record if key.startswith("loss_")]
    parts += [f"{key.removeprefix('accuracy_')} {record[key]:.1%}" for key in record if key.startswith("accuracy_")]
    parts.append(f"{record['pairs_per_second']:.0f} pairs/s")
    parts.append(f"data wait {record['data_wait_fraction']:.0%}")
    if record["mfu"] is not None:
        parts.append(f"mfu {record['mfu']:.0%}")
    parts.append(f"{record['memory_bytes'] / 2**30:.1f} GiB")
    if record["bad_samples"]:
        parts.append(f"bad {record['bad_samples']}")
    return "  ".join(parts)
