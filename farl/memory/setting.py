"""The largest batch that fits a GPU, and the settings with which a global batch does."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from farl.config import TrainConfig
from farl.memory.prediction import Memory, predict_memory
from farl.model import ModelConfig

GB = 10**9
# Of a device's memory, for what is not counted: the CUDA context, fragments of the allocator, NCCL's buffers.
MARGIN = 0.06


@dataclass(frozen=True)
class Setting:
    """How a step is to run: `pairs` at once in each process (`micro_batch`: the option, 0 for all), the option
    `save_memory`, and what it needs."""

    pairs: int
    micro_batch: int
    save_memory: str
    memory: Memory

    @property
    def options(self) -> str:
        """For the command line."""
        return f"--micro-batch {self.micro_batch}" + (f" --save-memory {self.save_memory}" if self.save_memory else "")


def fits(memory: Memory, capacity: float) -> bool:
    """Whether the prediction leaves `MARGIN` of `capacity` bytes."""
    return memory.peak <= (1 - MARGIN) * capacity


def largest_batch(config: ModelConfig, capacity: float, *, world_size: int = 1, **options: bool | int) -> int:
    """The most pairs a process that fit `capacity` bytes without micro-batches; 0 if not even one does.

    `options` are those of `predict_memory`. The global batch is that of all processes.
    """

    def fit(pairs: int) -> bool:
        return fits(predict_memory(config, pairs=pairs, world_size=world_size, **options), capacity)  # type: ignore[arg-type]

    if not fit(1):
        return 0
    good, bad = 1, 2
    while fit(bad):
        good, bad = bad, 2 * bad
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fit(middle) else (good, middle)
    return good


def choose_micro_batch(
    config: ModelConfig, capacity: float, *, global_batch: int, world_size: int = 1, **options: bool | int
) -> Setting | None:
    """The largest equal parts of a process's share of `global_batch` that fit; None if not even single pairs do."""
    share = -(-global_batch // world_size)
    parts = 1
    while True:
        pairs = -(-share // parts)
        memory = predict_memory(
            config,
            pairs=pairs,
            global_batch=global_batch,
            world_size=world_size,
            **options,  # type: ignore[arg-type]
        )
        if fits(memory, capacity):
            ways = {"recompute": options.get("checkpoint_activations"), "shard": options.get("shard")}
            save_memory = ",".join(way for way, on in ways.items() if on)
            return Setting(pairs, 0 if parts == 1 else pairs, save_memory, memory)
        if pairs == 1:
            return None
        # The next number of parts that makes them smaller.
        parts = -(-share // (pairs - 1))


def choose_setting(
    config: ModelConfig, capacity: float, *, global_batch: int, world_size: int = 1, **options: bool | int
) -> Setting | None:
    """The first that fits: all at once, else micro-batches, else those with the state shared out over the processes,
    else with blocks computed again, else with both.

    Sharing out comes before computing again, as it should cost less time; that is not measured.
    """
    for again, shard in itertools.product((False, True), (False, True)[: min(world_size, 2)]):
        found = choose_micro_batch(
            config,
            capacity,
            global_batch=global_batch,
            world_size=world_size,
            **options | {"checkpoint_activations": again, "shard": shard},
        )
        if found is not None:
            return found
    return None


def memory_warning(
    config: TrainConfig, sizes: ModelConfig, *, world_size: int, bf16: bool, capacity: float
) -> str | None:
    """One line for a run that is predicted not to fit `capacity` bytes of each process's device, or None.

    Args:
        sizes: those of the model built, of which the masked branch counts if it is there.
    """
    share = -(-config.global_batch // world_size)
    options = {
        "dtype": torch.bfloat16 if bf16 else torch.float32,
        "contrast": config.contrastive_weight > 0,
        "mask_ratio": config.mask_ratio,
    }
    call = {"global_batch": config.global_batch, "world_size": world_size, **options}
    pairs = min(config.micro_batch or share, share)
    ways = {"checkpoint_activations": config.recompute, "shard": config.shard}
    memory = predict_memory(sizes, pairs=pairs, **ways, **call)  # type: ignore[arg-type]
    if fits(memory, capacity):
        return None
    found = choose_micro_batch(sizes, capacity, **ways, **call) or choose_setting(sizes, capacity, **call)  # type: ignore[arg-type]
    advice = "not even single pairs fit: take a smaller --model, or more processes"
    if found is not None:
        advice = f"{found.options} would take {found.memory.peak / GB:.1f} GB"
    return (
        f"this run may not fit: {pairs} pairs at once take an estimated {memory.peak / GB:.1f} GB "
        f"of {capacity / GB:.1f} GB ({MARGIN:.0%} of it kept free); {advice}"
    )
