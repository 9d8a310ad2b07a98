"""`python -m farl.data COMMAND`; each command is imported when it is called."""

from __future__ import annotations

from farl import cli


def build(argv: list[str]) -> int | None:
    from farl.data.build import main

    return main(argv)


def check(argv: list[str]) -> int | None:
    from farl.data.check import main

    return main(argv)


def tokenize(argv: list[str]) -> int | None:
    from farl.data.tokenize import main

    return main(argv)


def laion(argv: list[str]) -> int | None:
    from farl.data.laion.__main__ import main

    return main(argv)


def main(argv: list[str] | None = None) -> int | None:
    commands = {
        "build": (build, "write shards from a folder, a table (TSV, CSV, parquet) or img2dataset's output"),
        "check": (check, "count what shards hold: samples, bad ones by cause, sizes, captions"),
        "tokenize": (tokenize, "store the visual tokens of every sample, for --visual-tokens cache:DIR"),
        "laion": (laion, "LAION-Face from its id list to filtered shards with face boxes (docs/laion-face.md)"),
    }
    return cli.subcommand(commands, argv, prog="farl.data", description="Shards of images and captions.")


if __name__ == "__main__":
    cli.run(main, "farl.data")
