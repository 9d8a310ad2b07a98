"""`python -m farl.tokens convert encoder.pkl OUT.safetensors`."""

from __future__ import annotations

import argparse
import sys

from farl.tokens.convert import convert_encoder_pickle


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m farl.tokens", description="Tools for visual tokens.")
    commands = parser.add_subparsers(dest="command", required=True)
    convert = commands.add_parser(
        "convert", help="turn OpenAI's DALL-E encoder.pkl into a safetensors file, without running its pickled code"
    )
    convert.add_argument("source", metavar="ENCODER.PKL")
    convert.add_argument("out", metavar="OUT.SAFETENSORS")
    given = parser.parse_args(arguments)
    try:
        encoder = convert_encoder_pickle(given.source, given.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    parameters = sum(p.numel() for p in encoder.parameters())
    print(f"{given.out}: {encoder.vocab_size} tokens, {parameters / 1e6:.1f} M parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
