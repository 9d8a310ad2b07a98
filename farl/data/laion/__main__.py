"""`python -m farl.data laion COMMAND`; each command is imported when it is called."""

from __future__ import annotations

from farl import cli

PROG = "farl.data laion"
# Modules of this package, in the order of the steps.
COMMANDS = {
    "select": "join the id list with LAION-400M's metadata into parquet parts",
    "command": "print the img2dataset commands that download these parts",
    "filter": "take samples out of downloaded shards, without writing them again",
    "faces": "make one file of face boxes for shards, for --face-boxes",
    "card": "describe what was got: counts, losses, sizes, licences",
    "sample": "draw a small sample of all these formats, to try the steps without a network",
}


def main(argv: list[str] | None = None) -> int | None:
    commands = {name: (cli.main_of(f"farl.data.laion.{name}"), text) for name, text in COMMANDS.items()}
    return cli.subcommand(commands, argv, prog=PROG, description="LAION-Face, step by step; see docs/laion-face.md.")


if __name__ == "__main__":
    cli.run(main, PROG)
