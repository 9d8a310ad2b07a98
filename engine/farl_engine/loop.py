"""The training loop: fetch, forward, backward, clip, step, log, evaluate, save.

It knows tensors, steps and ranks; what a batch is and what the loss means is the caller's `forward_backward`.
On a GPU no step asks the device for anything: metrics are read one log interval late.
"""

from __future__ import annotations

import gc
import time

import torch
import torch.distributed as dist
from torch import Tensor

from farl_engine import stop
from farl_engine.data import BadDataError, Batch
from farl_engine.distributed import Verdict, Vote, World, gather_objects
from farl_engine.graphs import StepGraphs, Update
from farl_engine.optim import FiniteGuard, LearningRate
from farl_engine.profiler import part
from farl_engine.reporter import Reporter
from farl_engine.run import Run, Schedule
from farl_engine.saver import Saver
from farl_engine.sharding import clip_grad_norm

__all__ = ["NonFiniteError", "Run", "Schedule", "train"]

# Python's collector, left alone, stops a step for up to half a second at a moment of its own choosing.
COLLECT_EVERY = 500


class NonFiniteError(FloatingPointError):
    """A loss or gradient was not finite; the state before that update is saved."""


def train(run: Run) -> tuple[int, str | None]:
    """Train from `start_step` to `stop_at`.

    Returns:
        The number of completed steps and the name of the signal that ended the run early (None: it reached its end).

    Raises:
        NonFiniteError: on every rank, after the last good state is saved.
        BadDataError, CheckpointError, OSError: likewise, for what one rank met and told the others. A loader that has
            no batch at all for a step, or stalls, ends its own rank at once (rank 0 saves first, where it has the
            whole state), and the others by their collectives.
    """
    schedule, world = run.schedule, run.world
    vote, guard = Vote(world), FiniteGuard(world.device, run.start_step)
    guard.attach(run.optimizer)
    learning_rate = LearningRate(run.optimizer, world.device)
    bad_samples = torch.zeros((), device=world.device)
    update = _update_of(run, guard, bad_samples)
    if run.recorder is not None:
        update = StepGraphs(update, run.optimizer, run.recorder)
    # What went wrong at this rank alone. Raised there and then it would leave the others waiting, so they vote on it.
    failures: list[BaseException] = []
    reporter, saver = Reporter(run, guard, failures), Saver(run, guard, failures)
    batches = iter(run.loader)
    step, agreed = run.start_step, Verdict.GO

    def verdict() -> Verdict:
        # An error that the loader met ahead is no matter once the run has all its batches.
        if failures or (run.loader.error and step < schedule.stop_at):
            return Verdict.FAIL
        if stop.requested():
            return Verdict.STOP
        return Verdict.SAVE if saver.asks_for_all() else Verdict.GO

    def should_stop() -> bool:
        nonlocal agreed
        agreed = max(agreed, vote.cast_now(verdict()))
        return agreed >= Verdict.STOP

    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        # At once here and in an evaluation, which nobody has to hurry through; one step late otherwise.
        should_stop()
        while step < schedule.stop_at and agreed < Verdict.STOP:
            if run.profiler is not None:
                run.profiler.begin(step)
            waited = time.monotonic()
            try:
                with part("data wait"):
                    batch = next(batches, None)
                if batch is None:
                    raise ValueError(f"the loader ended before step {step}; its end_step must be {schedule.stop_at}")
            except Exception:
                # The other ranks are in this step already and cannot be told.
                saver.save_alone(step)
                raise
            reporter.data_seconds += time.monotonic() - waited

            rate = schedule.learning_rate(step)
            learning_rate.set(rate)
            bad_samples.fill_(float(sum(run.loader.bad_samples.values())))
            figures = update(batch)
            step += 1
            run.progress.advance()

            last = step == schedule.stop_at
            if step % schedule.log_every == 0 or last or step == run.start_step + 1:
                reporter.report(step, figures, rate, now=last or world.device.type == "cpu")
                _raise_if_not_finite(run, reporter.found, saver)
                try:
                    run.loader.check_bad()
                except BadDataError as error:
                    failures.append(error)
            if run.evaluate and schedule.eval_every and (step % schedule.eval_every == 0 or step == schedule.steps):
                with part("evaluation"):
                    reporter.report_evaluation(step, run.evaluate(step, should_stop))
            if saver.is_due(step, agreed):
                reporter.flush()
                with part("checkpoint"):
                    saver.save(step, background=True)
                agreed = Verdict.GO if agreed is Verdict.SAVE else agreed
            if step % COLLECT_EVERY == 0:
                # Whole, which is quick: what there was before the first step is frozen and not looked at.
                gc.collect()
            agreed = max(agreed, vote.cast(verdict()))
        reporter.flush()
        _raise_if_not_finite(run, guard.read(guard.state().tolist()), saver)
        saver.save(step)
        # Voted on last, so that a checkpoint that could not be written counts.
        should_stop()
    finally:
        gc.enable()
        gc.unfreeze()
        run.progress.close()
    if agreed is Verdict.FAIL:
        _raise_agreed_failure(world, next(iter(failures), run.loader.error))
    stopped_by = gather_objects(world, stop.requested()) if step < schedule.stop_at else []
    return step, next((name for name in stopped_by if name), None)


def _update_of(run: Run, guard: FiniteGuard, bad_samples: Tensor) -> Update:
    """An update, from a batch on the device to new weights and the figures to log.

    All of it is work for the device: what changes from step to step it reads there (the learning rate, the number of
    the step, `bad_samples`), so that it can be recorded once and replayed.
    """
    parameters = [parameter for parameter in run.model.parameters() if parameter.requires_grad]

    def update(batch: Batch) -> dict[str, Tensor]:
        figures = run.forward_backward(batch)
        with part("clipping"):
            grad_norm = clip_grad_norm(parameters, run.schedule.clip_norm)
        shared = _sum_over_ranks(figures | {"bad_samples": bad_samples}, run.world)
        guard.check(figures["loss"], (shared["loss"], grad_norm))
        with part("optimizer"):
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
        return shared | {"grad_norm": grad_norm, **run.after_update()}

    return update


def _raise_agreed_failure(world: World, own: BaseException | None) -> None:
    """A rank raises its own failure, the others that of the first rank that has one, so that all leave together."""
    # Errors of other kinds may not survive the way between processes.
    portable = own if own is None or isinstance(own, (BadDataError, OSError)) else RuntimeError(repr(own))
    failures = [failure for failure in gather_objects(world, portable) if failure is not None]
    raise own or failures[0]


def _raise_if_not_finite(run: Run, found: tuple[int, bool] | None, saver: Saver) -> None:
    """Save the untouched state and say what went wrong where; every rank calls this with the same step in `found`."""
    if found is None:
        return
    step, own = found
    told = gather_objects(run.world, (own, saver.save(step)))
    guilty = [rank for rank, (bad, _) in enumerate(told) if bad]
    not_saved = told[0][1]
    where = f"the loss of rank {', '.join(map(str, guilty))}" if guilty else "a gradient"
    kept = f"could not be saved ({not_saved})" if not_saved else "is saved"
    raise NonFiniteError(
        f"{where} was not finite in step {step + 1}; no weight was changed by it and the state after step {step} "
        f"{kept}. Lower --lr or --clip-grad, or look at the data of that step, before running the command again"
    )


def _sum_over_ranks(figures: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """One all-reduce for all figures of a step."""
    stacked = torch.stack([value.detach().float() for value in figures.values()])
    if world.size > 1:
        dist.all_reduce(stacked)
    return dict(zip(figures, stacked.unbind(), strict=True))
