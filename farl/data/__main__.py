"""`python -m farl.data COMMAND`; each command is imported when it is called."""

from __future__ import annotations

from farl import cli


def main(argv: list[str] | None = None) -> int | None:
    commands = {
        "build": (
            cli.main_of("farl.data.build"),
            "write shards from a folder, a table (TSV, CSV, parquet) or img2dataset's output",
        ),
        "check": (
            cli.main_of("farl.data.check"),
            "count what shards hold: samples, bad ones by cause, sizes, captions",
        ),
        "tokenize": (
            cli.main_of("farl.data.tokenize"),
            "store the visual tokens of every sample, for --visual-tokens cache:DIR",
        ),
        "laion": (
            cli.main_of("farl.data.laion.__main__"),
            "LAION-Face from its id list to filtered shards with face boxes (docs/laion-face.md)",
        ),
    }
    return cli.subcommand(commands, argv, prog="farl.data", description="Shards of images and captions.")


if __name__ == "__main__":
    cli.run(main, "farl.data")
