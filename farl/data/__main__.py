"""`python -m farl.data COMMAND`; each command is imported when it is called."""

from __future__ import annotations

from farl import cli


def build(argv: list[str]) -> int | None:
    from farl.data.build import main

    return main(argv)


def check(argv: list[str]) -> int | None:
    from farl.data.check import main

    return main(argv)


def main(argv: list[str] | None = None) -> int | None:
    commands = {
        "build": (build, "write shards from a folder, a table (TSV, CSV, parquet) or img2dataset's output"),
        "check": (check, "count what shards hold: samples, bad ones by cause, sizes, captions"),
    }
    return cli.subcommand(commands, argv, prog="farl.data", description="Shards of images and captions.")


if __name__ == "__main__":
    cli.run(main, "farl.data")
