"""`python -m farl.data laion COMMAND`; each command is imported when it is called."""

from __future__ import annotations

from farl import cli

PROG = "farl.data laion"


def select(argv: list[str]) -> int | None:
    from farl.data.laion.select import main

    return main(argv)


def command(argv: list[str]) -> int | None:
    from farl.data.laion.command import main

    return main(argv)


def filter_(argv: list[str]) -> int | None:
    from farl.data.laion.filter import main

    return main(argv)


def faces(argv: list[str]) -> int | None:
    from farl.data.laion.faces import main

    return main(argv)


def card(argv: list[str]) -> int | None:
    from farl.data.laion.card import main

    return main(argv)


def sample(argv: list[str]) -> int | None:
    from farl.data.laion.sample import main

    return main(argv)


def main(argv: list[str] | None = None) -> int | None:
    commands = {
        "select": (select, "join the id list with LAION-400M's metadata into parquet parts"),
        "command": (command, "print the img2dataset commands that download these parts"),
        "filter": (filter_, "take samples out of downloaded shards, without writing them again"),
        "faces": (faces, "make one file of face boxes for shards, for --face-boxes"),
        "card": (card, "describe what was got: counts, losses, sizes, licences"),
        "sample": (sample, "draw a small sample of all these formats, to try the steps without a network"),
    }
    return cli.subcommand(commands, argv, prog=PROG, description="LAION-Face, step by step; see docs/laion-face.md.")


if __name__ == "__main__":
    cli.run(main, PROG)
