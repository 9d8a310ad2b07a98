"""`python -m farl.tokens convert encoder.pkl OUT` and `python -m farl.tokens fit --data SHARDS --out OUT`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from farl import cli
from farl.config import TrainConfig

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


_TRAINING = TrainConfig(run_dir="", data="")


@dataclass(frozen=True)
class FitOptions:
    data: str
    """The training shards, written as for farl.train."""
    out: str
    """File to write, .safetensors; its folder must be there."""
    model: str = _TRAINING.model
    """The --model of the training to come: it decides the patches and the number of codes."""
    seed: int = _TRAINING.seed
    """The --seed of the training to come."""
    shard_cache: str = _TRAINING.shard_cache
    """Folder on a local disk for copies of remote shards, as for farl.train."""


def fit(argv: list[str]) -> int:
    options = cli.parse(
        FitOptions,
        argv,
        prog=f"{PROG} fit",
        description="Fits the codebook that a training with --visual-tokens codebook would fit on the same data.",
    )
    from farl.initialize import fit_codebook, named_sizes
    from farl.shards import open_shards
    from farl_engine import distributed
    from farl_engine.data.shard_cache import ShardCache

    config = TrainConfig(run_dir="", data=options.data, model=options.model, seed=options.seed, device="cpu")
    named_sizes(config)
    world = distributed.start("cpu")
    shard_cache = ShardCache(options.shard_cache) if options.shard_cache else None
    index = open_shards("--data", options.data, world, config.max_bad_fraction, shard_cache)
    codebook = fit_codebook(config, index, world)
    codebook.save(options.out)
    print(f"{options.out}: {codebook.vocab_size} tokens for patches of {codebook.patch_size} pixels")
    return 0


def main(argv: list[str] | None = None) -> int | None:
    commands = {
        "convert": (convert, "turn OpenAI's encoder.pkl into a safetensors file for --visual-tokens dalle:FILE"),
        "fit": (fit, "fit the codebook of a training beforehand, for farl.data tokenize"),
    }
    return cli.subcommand(commands, argv, prog=PROG, description="Tools for visual tokens.")


if __name__ == "__main__":
    cli.run(main, PROG)
