"""What a training step takes and which batch fits: `python -m farl.memory MODEL`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields
from typing import Annotated

from tyro.conf import Positional, arg

from farl import cli
from farl.memory import GB, Memory, choose_setting, largest_batch
from farl.model.config import sizes_of


@dataclass(frozen=True)
class MemoryOptions:
    model: Annotated[Positional[str], arg(metavar="MODEL")] = "farl-b16"
    """Sizes of the model, as for farl.train."""
    gpu_memory: float = 80.0
    """Memory of a GPU, in GB of 10^9 bytes."""
    world_size: int = 1
    """Processes, one a GPU."""
    global_batch: int = 5120
    """Pairs an update, over all processes."""


def describe(memory: Memory) -> str:
    """The parts and phases as lines of text, in GB."""
    parts = {f.name.replace("_", " "): getattr(memory, f.name) for f in fields(memory) if f.name != "held_gradients"}
    parts = {name: size for name, size in parts.items() if size} | memory.phases
    return "\n".join(f"{name:<24}{size / GB:9.2f} GB" for name, size in parts.items())


def main(argv: list[str] | None = None) -> None:
    options = cli.parse(
        MemoryOptions,
        argv,
        prog="farl.memory",
        description="Predicted memory of a training step in bf16, and the batch that fits a GPU.",
    )
    sizes = sizes_of(options.model)
    for name in ("gpu_memory", "world_size", "global_batch"):
        if not getattr(options, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be more than 0")
    capacity, world = options.gpu_memory * GB, options.world_size
    print(f"{options.model} in bf16 on {world} x {options.gpu_memory:g} GB: ESTIMATES, not measured.\n")
    for shard, again in itertools.product((False, True)[: min(world, 2)], (False, True)):
        most = largest_batch(sizes, capacity, world_size=world, checkpoint_activations=again, shard=shard)
        how = f"blocks {'computed again' if again else 'kept'}{', state shared out' if shard else ''}"
        print(f"largest batch a process, {how}: {most:,} pairs")
    found = choose_setting(sizes, capacity, global_batch=options.global_batch, world_size=world)
    if found is None:
        print(f"\n--global-batch {options.global_batch} does not fit: take more GPUs")
        return
    print(f"\n--global-batch {options.global_batch} {found.options}\n")
    print(describe(found.memory))


if __name__ == "__main__":
    cli.run(main, "farl.memory")
