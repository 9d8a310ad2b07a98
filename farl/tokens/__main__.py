"""`python -m farl.tokens`: `convert encoder.pkl OUT`, `fit --data SHARDS --out OUT`, `agreement FILE --data SHARDS`."""

from __future__ import annotations

from collections.abc import Iterator
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


# Two sets of logits of such a batch are 0.1 GB in fp32.
_AGREEMENT_BATCH = 8


@dataclass(frozen=True)
class AgreementOptions:
    encoder: Annotated[Positional[str], arg(metavar="ENCODER")]
    """The encoder's .safetensors file."""
    data: str
    """Shards, written as for farl.train."""
    model: str = _TRAINING.model
    """The --model of the training to come: it decides the size of the encoder's images."""
    limit: int = 256
    """Images to try, at equal distances in the data."""
    device: str = "auto"
    """cpu, cuda, or auto."""

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError(f"--limit is {self.limit}; it must be 1 or more")


def agreement(argv: list[str]) -> int:
    options = cli.parse(
        AgreementOptions,
        argv,
        prog=f"{PROG} agreement",
        description="Tells how many tokens of a DALL-E encoder in fp16 and in bf16 are those of fp32, on your images.",
    )
    import torch

    from farl.evaluation.features import spread_positions
    from farl.evaluation.pair_reader import read_batches
    from farl.initialize import load_encoder
    from farl.progress import Progress
    from farl.shards import open_shards
    from farl.tokens.agreement import agreement_with_fp32
    from farl_engine import distributed
    from farl_engine.data import CpuDecoder

    config = TrainConfig(run_dir="", data=options.data, model=options.model, device=options.device)
    encoder = load_encoder(config, options.encoder)
    world = distributed.start(options.device)
    encoder.to(world.device)
    index = open_shards("--data", options.data, world, config.max_bad_fraction)
    positions = spread_positions(len(index), options.limit)
    size = encoder.token_image_size
    assert size is not None
    with (
        read_batches(index, positions.split(_AGREEMENT_BATCH), CpuDecoder(size), with_captions=False) as batches,
        Progress(len(positions), "comparing", unit="images") as progress,
    ):

        def images() -> Iterator[torch.Tensor]:
            for batch in batches:
                if len(batch.images):
                    yield batch.images.to(world.device)
                progress.update(len(batch.positions) + batch.bad.total())

        names = {torch.float16: "fp16", torch.bfloat16: "bf16"}
        found = agreement_with_fp32(encoder, images(), list(names))
    first = next(iter(found.values()))
    if not first.cells:
        raise ValueError(f"--data {options.data}: none of the {len(positions)} images that were tried can be read")
    print(
        f"{first.cells:,} cells of images of {size} pixels, on {world.device.type}; the best logit leads over the "
        f"second by {first.mean_lead:.3g} on average"
    )
    for dtype, result in found.items():
        overflow = f"; {result.overflowed:,} cells overflowed" if result.overflowed else ""
        print(
            f"{names[dtype]}: {result.share:.3%} of the tokens are those of fp32; the fp32 logits of the others are at "
            f"most {result.largest_loss:.2g} below the best{overflow}"
        )
    return 0


def main(argv: list[str] | None = None) -> int | None:
    commands = {
        "convert": (convert, "turn OpenAI's encoder.pkl into a safetensors file for --visual-tokens dalle:FILE"),
        "fit": (fit, "fit the codebook of a training beforehand, for farl.data tokenize"),
        "agreement": (agreement, "compare a DALL-E encoder's tokens in fp16 and bf16 with those in fp32"),
    }
    return cli.subcommand(commands, argv, prog=PROG, description="Tools for visual tokens.")


if __name__ == "__main__":
    cli.run(main, PROG)
