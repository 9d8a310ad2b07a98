"""The command that pre-trains FaRL: `torchrun -m farl.train [PRESET] --run-dir D --data 'shards/*.tar' ...`."""

from __future__ import annotations

import inspect
import sys
from dataclasses import replace

from farl import cli
from farl.config import PRESETS, TrainConfig
from farl_engine import stop

PROG = "farl.train"


def read_config(argv: list[str]) -> TrainConfig:
    """Options over those of the preset named first (quickstart if none is).

    An unknown preset, an unknown option or a value out of range ends the process with code 2 and one line.
    """
    name, rest = "quickstart", argv
    if argv and not argv[0].startswith("-"):
        name, rest = argv[0], argv[1:]
    if name not in PRESETS:
        cli.fail_usage(PROG, f"there is no preset {name!r}; use one of {', '.join(PRESETS)}")
    preset = PRESETS[name]()
    given = {word.split("=", 1)[0].replace("_", "-") for word in rest}
    if "--data" in given and "--eval-data" not in given:
        preset = replace(preset, eval_data="")  # the preset's held-out shards belong to its own data
    description = f"{inspect.getdoc(TrainConfig)}\n\nPresets: {', '.join(PRESETS)}. Shown here: {name}."
    return cli.parse(TrainConfig, rest, default=preset, prog=PROG, description=description)


def main() -> None:
    # Before torch is imported, which takes seconds in which a signal would kill.
    stop.install()
    config = read_config(sys.argv[1:])
    from farl.pretrain import pretrain

    pretrain(config)


if __name__ == "__main__":
    cli.run(main, PROG)
