"""Fine-tuning of a backbone and a head on one task: `tune(job, world)`."""

from __future__ import annotations

import contextlib
import math
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from farl.downstream.backbone import load_backbone, restore_backbone
from farl.downstream.draws import Draws
from farl.downstream.evaluating import Evaluator
from farl.downstream.job import Job, check_same_run, plain
from farl.downstream.network import Network, describe_network, save_network
from farl.downstream.optimize import WeightAverage, learning_rate_factor, make_optimizer, set_learning_rates
from farl.downstream.reading import check_files, read_batches
from farl.downstream.task import Sample
from farl.downstream.tune_report import best_of, make_result, one_line, plain_figures
from farl_engine import stop
from farl_engine.checkpoint import CheckpointStore
from farl_engine.distributed import Verdict, Vote, World, broadcast_object, say
from farl_engine.metrics import MetricsLog, Progress

SAVE_MINUTES = 5.0


def tune(job: Job, world: World) -> dict[str, Any] | None:
    """Run `job` to its end, going on from the run folder's checkpoint if it has one.

    Returns:
        The result for JSON (see `make_result`; the same on every process), or None where a signal or `stop_at` ended
        the run early.

    Raises:
        ValueError: settings that do not fit each other, the data or the checkpoint; broken files.
        FloatingPointError: the loss was not finite. OSError: a file cannot be read or written.
    """
    job.check_world(world)
    tuner = Tuner(job, world)
    tuner.run()
    return tuner.finish()


class _Parallel(DistributedDataParallel):
    """DDP that takes this project's BatchNorm on a CPU, where torch's own does not work and is refused."""

    def _passing_sync_batchnorm_handle(self, module: nn.Module) -> None:
        pass


class Tuner:
    """A run in motion. Its state is (weights, their average, optimizer, step, evaluations so far)."""

    def __init__(self, job: Job, world: World) -> None:
        self.job, self.world, settings = job, world, job.settings
        self.identity = job.identity(world.device)
        self.train = job.used()
        self.store = CheckpointStore(job.run_dir / "checkpoints", keep_last=1)
        saved = self.store.load() if self.store.latest() is not None else None
        if saved is not None:
            check_same_run(saved["identity"], self.identity, job.run_dir)
        elif job.check:
            check_files(job.train, sorted(self.train.chosen), "--train", world, job.threads)
            check_files(job.test, range(len(job.test)), "--test", world, job.threads)

        torch.manual_seed(job.seed)
        if saved is None:
            backbone = load_backbone(job.init, resolution=settings.resolution, blocks=job.blocks)
        else:
            backbone = restore_backbone(saved["about"]["backbone"])
        if settings.frozen:
            backbone.freeze()
        backbone.recompute_activations(job.recompute)
        self.network = Network(backbone, job.task.make_head(backbone)).to(world.device)
        self.average = WeightAverage(self.network, settings.ema)
        self.optimizer = make_optimizer(self.network, settings)
        self.about = plain(describe_network(job.task, self.network))
        self.step, self.history, self.seconds_before = 0, [], 0.0
        if saved is not None:
            self.step, self.history, self.seconds_before = saved["step"], saved["history"], saved["seconds"]
            self.network.load_state_dict(saved["network"])
            self.average.network.load_state_dict(saved["ema"])
            self.optimizer.load_state_dict(saved["optimizer"])
            say(world, f"going on after step {self.step}")
        self.model = self.network
        if world.size > 1:
            self.model = _Parallel(self.network, gradient_as_bucket_view=True)

        self.bf16 = job.is_bf16(world.device)
        own_batch = settings.batch // world.size
        self.evaluator = Evaluator(job.task, job.test, world, own_batch, self.bf16, job.threads)
        self.log = MetricsLog(job.run_dir, resume_step=self.step) if world.is_main else None
        self.progress = Progress(start=self.step, total=job.total_steps, enabled=world.is_main)
        self.start_step = self.step
        self.saved = (self.step, len(self.history))
        self.began = self.saved_at = time.monotonic()

    def run(self) -> None:
        """Train to the end, to `stop_at` or to a signal, and save."""
        job, vote, agreed = self.job, Vote(self.world), Verdict.GO
        steps, per_epoch = job.total_steps, job.steps_per_epoch
        end, eval_every = min(job.stop_at or steps, steps), job.eval_every or per_epoch
        reader = read_batches(self.train, job.own_batches(self.world, self.step, end), job.threads)
        self.network.train()
        with contextlib.closing(reader):
            while True:
                due = self.step == steps or (self.step > 0 and self.step % eval_every == 0)
                # A run that was stopped in an evaluation begins with it again.
                if due and not self.is_evaluated() and not self.evaluate():
                    break
                if self.step >= end or agreed is not Verdict.GO:
                    break
                factor = learning_rate_factor(self.step, job.settings, steps=steps, steps_per_epoch=per_epoch)
                set_learning_rates(self.optimizer, factor)
                losses = self.forward_backward(next(reader))
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self.step += 1
                self.average.update(self.network, self.step)
                self.progress.advance()
                # A loss that is not finite has to be seen before weights are judged or saved.
                save_due = time.monotonic() - self.saved_at > 60 * SAVE_MINUTES
                if self.step % job.log_every == 0 or self.step % eval_every == 0 or self.step == end or save_due:
                    self.report(losses, factor)
                if save_due:
                    self.save()
                agreed = vote.cast(Verdict.STOP if stop.requested() else Verdict.GO)
        vote.close()
        self.save()
        self.progress.close()
        if self.log is not None:
            self.log.close()

    def forward_backward(self, samples: list[Sample]) -> dict[str, Tensor]:
        """Gradients and losses, both means over the whole batch of all processes."""
        job, world = self.job, self.world
        first = world.rank * len(samples)
        draws = Draws((job.seed, self.step, first + slot) for slot in range(len(samples)))
        # Dropout is a function of the step too, so that no generator's state has to be saved.
        torch.manual_seed((job.seed << 32) + self.step * world.size + world.rank)
        batch = job.task.batch(samples, world.device, rng=draws)
        with torch.autocast(world.device.type, torch.bfloat16, enabled=self.bf16):
            outputs = self.model(batch["images"])
        losses = job.task.loss(outputs, batch)
        losses["loss"].backward()
        stacked = torch.stack([value.detach().float() for value in losses.values()])
        if world.size > 1:
            dist.all_reduce(stacked)
        return dict(zip(losses, (stacked / world.size).unbind(), strict=True))

    def report(self, losses: dict[str, Tensor], factor: float) -> None:
        """A line for the log and one for a person. FloatingPointError where the loss is not finite."""
        job, figures = self.job, {name: float(value) for name, value in losses.items()}
        if not math.isfinite(figures["loss"]):
            raise FloatingPointError(
                f"the loss was not finite at or before step {self.step}; the weights of then are not saved. "
                "Lower --lr-backbone or --lr-head and use another --run-dir"
            )
        rates = {"lr_backbone": job.settings.lr_backbone * factor, "lr_head": job.settings.lr_head * factor}
        if self.log is not None:
            self.log.write({"step": self.step, **figures, **rates})
        speed = job.settings.batch * (self.step - self.start_step) / (time.monotonic() - self.began)
        self.progress.show(self.step, f"loss {figures['loss']:.4f}  {speed:.0f} images/s")

    def is_evaluated(self) -> bool:
        return bool(self.history) and self.history[-1]["step"] == self.step

    def evaluate(self) -> bool:
        """Note the figures of this step, and the weights if they are the best so far; False where a signal came."""
        job = self.job
        figures = self.evaluator.figures(self.average.network)
        if figures is None:
            return False
        epoch = round(self.step / job.steps_per_epoch, 3)
        record = {"step": self.step, "epoch": epoch, "metrics": plain_figures(figures)}
        self.history.append(record)
        if self.log is not None:
            self.log.write({"step": self.step, "epoch": epoch, "eval": record["metrics"]})
            if best_of(self.history, job.task) is record:
                save_network(job.run_dir / "best.pt", self.about, self.average.network.state_dict(), **record)
                # Or a killed run would go on from before, with a best.pt of updates that it then makes anew.
                self.save()
        self.progress.say(one_line(record, self.history, job.task))
        return True

    def save(self) -> None:
        """Write a checkpoint, unless the same is there."""
        self.saved_at = time.monotonic()
        now = (self.step, len(self.history))
        if not self.world.is_main or now == self.saved:
            return
        state = {
            "step": self.step,
            "history": self.history,
            "seconds": self.seconds(),
            "identity": self.identity,
            "about": self.about,
            "network": self.network.state_dict(),
            "ema": self.average.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        self.store.save(self.step, state)
        self.saved = now

    def seconds(self) -> float:
        """Since the run began, without the time it lay still."""
        return self.seconds_before + time.monotonic() - self.began

    def finish(self) -> dict[str, Any] | None:
        """Last weights, pictures and result of a run that is at its end; None where it is not."""
        job, world = self.job, self.world
        if self.step < job.total_steps or not self.is_evaluated():
            say(world, f"stopped after step {self.step} of {job.total_steps}; the same command goes on from there")
            return None
        result = None
        if world.is_main:
            seconds, weights = self.seconds(), self.average.network.state_dict()
            save_network(job.run_dir / "last.pt", self.about, weights, **self.history[-1])
            pictures = None
            if job.pictures:
                pictures = self.evaluator.worst_cases(self.average.network, job.run_dir / "worst.png", job.pictures)
            result = make_result(job, self.identity, self.network, self.history, pictures, world, seconds)
        return broadcast_object(world, result)
