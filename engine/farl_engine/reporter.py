"""From the device figures of a log step to a line in the log and one for a person."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from farl_engine.data.stages import ADVICE, loader_figures
from farl_engine.metrics import device_peak_flops, memory_bytes
from farl_engine.optim import FiniteGuard
from farl_engine.run import Run

# A person is told of waiting for data from this share of the time on.
TOLD_WAIT = 0.03


class Reporter:
    """Turns the device figures of a log step into a line, one interval late unless told `now`.

    Losses and counts are of all ranks; rates, times and memory are this rank's. A line that cannot be written goes to
    `failures`.

    Attributes:
        data_seconds: time spent waiting for batches in this interval.
        found: what the guard said in the newest figures that were read.
    """

    def __init__(self, run: Run, guard: FiniteGuard, failures: list[BaseException]) -> None:
        self._run = run
        self._guard = guard
        self._failures = failures
        self._peak = device_peak_flops(run.world.device)
        self._pending: tuple[dict[str, Any], list[str], Callable[[], list[float]]] | None = None
        self._interval_began = time.monotonic()
        self._interval_first_step = run.start_step
        # "step" has nothing to be done about.
        self._advised = {"step"}
        self.data_seconds = 0.0
        self.found: tuple[int, bool] | None = None

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
            "loader": loader_figures(run.loader.stage_times(), seconds),
        }
        self._interval_began, self._interval_first_step, self.data_seconds = time.monotonic(), step, 0.0
        self.flush()
        values = torch.stack([value.detach().double() for value in figures.values()])
        self._pending = (record, list(figures), _start_copy(torch.cat([values, self._guard.state()])))
        if now:
            self.flush()

    def flush(self) -> None:
        """Write the report that waits, if any."""
        if self._pending is None:
            return
        record, names, copied = self._pending
        self._pending = None
        numbers = copied()
        self.found = self._guard.read(numbers[len(names) :])
        step: int = record["step"]
        record = {"step": step, **dict(zip(names, numbers[: len(names)], strict=True)), **record}
        record["bad_samples"] = int(record["bad_samples"])
        self._tell(record, lambda: self._run.progress.show(step, _one_line(record)))
        self._advise(record)

    def report_evaluation(self, step: int, figures: dict[str, Any] | None) -> None:
        if figures is None:
            return
        # The time of an evaluation is not the time of a step, nor is what the loader did meanwhile.
        self._run.loader.stage_times()
        self._interval_began, self._interval_first_step, self.data_seconds = time.monotonic(), step, 0.0
        shown = "  ".join(f"{name} {value:.1%}" for name, value in figures.items() if name.endswith("_r1"))
        line = f"evaluation after step {step}: {shown}"
        self._tell({"step": step, "eval": figures}, lambda: self._run.progress.say(line))

    def _advise(self, record: dict[str, Any]) -> None:
        """Say what to do about a stage that holds training up, once; the first line holds the start, not a trend."""
        stage = record["loader"]["bottleneck"]
        first = record["step"] == self._run.start_step + 1
        if first or stage in self._advised or record["data_wait_fraction"] < TOLD_WAIT:
            return
        self._advised.add(stage)
        share = f"{record['data_wait_fraction']:.0%} of the time"
        self._run.progress.say(f"training waits for data {share}, and most of it is {stage}: {ADVICE[stage]}")

    def _tell(self, record: dict[str, Any], show: Callable[[], None]) -> None:
        """To the log and to the person; a full disk or a reader who left is noted for the ranks to agree on."""
        try:
            if self._run.log is not None:
                self._run.log.write(record)
            show()
        except OSError as error:
            self._failures.append(error)

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
    if record["data_wait_fraction"] >= TOLD_WAIT:
        parts.append(f"data wait {record['data_wait_fraction']:.0%} ({record['loader']['bottleneck']})")
    if record["mfu"] is not None:
        parts.append(f"mfu {record['mfu']:.0%}")
    parts.append(f"{record['memory_bytes'] / 2**30:.1f} GiB")
    if record["bad_samples"]:
        parts.append(f"bad {record['bad_samples']}")
    return "  ".join(parts)
