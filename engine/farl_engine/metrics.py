"""What a run says: `metrics.jsonl` always, a bar or plain lines for a person, TensorBoard and W&B where asked."""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

# Dense bf16 peak in FLOP/s, from NVIDIA's data sheets (SXM parts; without sparsity).
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}


class MetricsLog:
    """Appends one JSON object a line to `run_dir/metrics.jsonl` and passes numbers on to the trackers asked for.

    Lines past `resume_step` are dropped first: the run is about to write them again, to the last bit the same.

    Args:
        trackers: "tensorboard", "wandb:PROJECT", or both with a comma between.

    Raises:
        ValueError: a tracker that is unknown or not installed.
    """

    def __init__(self, run_dir: Path, *, resume_step: int, trackers: str = "") -> None:
        self.path = run_dir / "metrics.jsonl"
        run_dir.mkdir(parents=True, exist_ok=True)
        self._tensorboard = self._wandb = None
        for tracker in filter(None, trackers.split(",")):
            if tracker == "tensorboard":
                _require("tensorboard", "TensorBoard", "pip install 'farl-engine[tensorboard]'")
                writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
                self._tensorboard = writer(str(run_dir / "tensorboard"), purge_step=resume_step + 1)
            elif tracker.startswith("wandb:"):
                module = _require("wandb", "Weights & Biases", "pip install 'farl-engine[wandb]'")
                project = tracker.removeprefix("wandb:")
                self._wandb = module.init(
                    project=project, name=run_dir.name, dir=str(run_dir), id=run_dir.name, resume="allow"
                )
            else:
                raise ValueError(f"there is no tracker {tracker!r}; use tensorboard or wandb:PROJECT")
        _drop_lines_after(self.path, resume_step)
        self._file = self.path.open("a", buffering=1)

    def write(self, record: dict[str, Any]) -> None:
        """Write one line; `record["step"]` counts completed steps."""
        self._file.write(json.dumps(record) + "\n")
        numbers = dict(_flat_numbers(record))
        step = int(numbers.pop("step"))
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


class Progress:
    """A bar on a terminal; elsewhere one plain line for each call of `show`. Silent where `enabled` is False."""

    def __init__(self, *, start: int, total: int, enabled: bool) -> None:
        self._enabled = enabled
        self._total = total
        self._began = time.monotonic()
        self._start = start
        terminal = enabled and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True) if terminal else None

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def show(self, step: int, text: str) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
        elif self._enabled:
            print(f"step {step}/{self._total}  {text}  eta {self._eta(step)}", flush=True)

    def say(self, text: str) -> None:
        """A line of its own that leaves the bar whole."""
        if self._bar is not None:
            self._bar.write(text)
        elif self._enabled:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _eta(self, step: int) -> str:
        done = max(1, step - self._start)
        seconds = round((time.monotonic() - self._began) / done * (self._total - step))
        hours, rest = divmod(seconds, 3600)
        return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def device_peak_flops(device: torch.device) -> float | None:
    """Peak bf16 FLOP/s of the GPU, or None where it is not in the table (a CPU among them)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def memory_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated by torch on a GPU, resident set size of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts ru_maxrss in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _drop_lines_after(path: Path, step: int) -> None:
    """Keep the whole lines up to `step`; a line cut short by a kill goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in kept))
    temporary.replace(path)


def _flat_numbers(record: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    numbers: list[tuple[str, float]] = []
    for key, value in record.items():
        if isinstance(value, dict):
            numbers += _flat_numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            numbers.append((prefix + key, value))
    return numbers


def _require(module: str, what: str, how: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"{what} was asked for but is not installed: {how}") from None
