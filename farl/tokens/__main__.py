"""`python -m farl.tokens convert encoder.pkl OUT.safetensors`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from farl import cli

PROG = "farl.tokens"


@dataclass(frozen=True)
class ConvertOptions:
    source: Annotated[Positional[str], arg(metavar="SOURCE")]
    """OpenAI's encoder.pkl."""
    out: Annotated[Positional[str], arg(metavar="OUT")]
    """File to write, .safetensors; its folder must be there."""


def convert(argv: list[str]) -> int:
    options = cli.parse(
        ConvertOptions,
        argv,
        prog=f"{PROG} convert",
        description="Turns OpenAI's DALL-E encoder.pkl into a safetensors file, without running its pickled code.",
    )
    # Imported late: --help should not wait for torch.
    from farl.tokens.convert import convert_encoder_pickle

    encoder = convert_encoder_pickle(options.source, options.out)
    parameters = sum(p.numel() for p in encoder.parameters())
    print(f"{options.out}: {encoder.vocab_size} tokens, {parameters / 1e6:.1f} M parameters")
    return 0


def main(argv: list[str] | None = None) -> int | None:
    commands = {
        "convert": (convert, "turn OpenAI's encoder.pkl into a safetensors file for --visual-tokens dalle:FILE")
    }
    return cli.subcommand(commands, argv, prog=PROG, description="Tools for visual tokens.")


if __name__ == "__main__":
    cli.run(main, PROG)
