"""`python -m farl.data tokenize`: stores the visual tokens of every sample, so that training need not compute them."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from farl import cli
from farl.config import TrainConfig
from farl.progress import Progress

if TYPE_CHECKING:
    from farl.tokens import PatchCodebook, VisualTokenizer
    from farl.tokens.cache import CacheWriter
    from farl.tokens.make import Rows
    from farl.tokens.manifest import Manifest
    from farl_engine.data import ShardIndex
    from farl_engine.distributed import World

PROG = "farl.data tokenize"
DESCRIPTION = """Stores the visual tokens of K views of every sample, for training with --visual-tokens cache:DIR.

Start it with torchrun to share the work among processes. Stopped or killed, the same command goes on, with any number
of processes; on a finished cache it checks every block."""
# Processes wait for each other at the start and at the end alone, and there for as long as the slowest works.
_PATIENCE = 30 * 86_400.0
_TRAINING = TrainConfig(run_dir="", data="")
_CORES = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@dataclass(frozen=True)
class TokenizeOptions:
    data: str
    """The training shards, written as for farl.train."""
    out: str
    """Folder of the cache."""
    tokenizer: str = "codebook"
    """codebook:FILE (or a run's folder), dalle:FILE, or "codebook" to fit one on the data as farl.train does."""
    views: int = 1
    """Crops a sample; a run of more epochs than that sees them again in turn."""
    model: str = _TRAINING.model
    """The --model of the training to come: it decides the image size and the patches."""
    seed: int = _TRAINING.seed
    """The --seed of the training to come."""
    crop_scale: float = _TRAINING.crop_scale
    """The --crop-scale of the training to come."""
    face_boxes: str = _TRAINING.face_boxes
    """The --face-boxes of the training to come."""
    decoder: str = _TRAINING.decoder
    """The --decoder of the training to come."""
    shard_cache: str = _TRAINING.shard_cache
    """Folder on a local disk for copies of remote shards, as for farl.train."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    batch_size: int = 256
    """Images a process tokenizes at once."""
    threads: int = _CORES
    """Decoding threads a process; all cores between the processes if not given."""
    max_bad_fraction: float = _TRAINING.max_bad_fraction
    """Stop when more than this share of samples is broken."""

    def __post_init__(self) -> None:
        for name in ("views", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be 1 or more")
        kind, _, file = self.tokenizer.partition(":")
        if self.tokenizer != "codebook" and not (kind in ("codebook", "dalle") and file):
            raise ValueError(f"--tokenizer is {self.tokenizer!r}; use codebook, codebook:FILE or dalle:FILE")
        self.training()

    def training(self) -> TrainConfig:
        """Settings of a training that would read the cache."""
        names = {field.name for field in fields(self)} & {field.name for field in fields(TrainConfig)}
        return replace(
            _TRAINING,
            run_dir=self.out,
            visual_tokens=f"cache:{self.out}",
            **{name: getattr(self, name) for name in names},
        )


def tokenize(options: TokenizeOptions, command: str) -> None:
    """Makes the cache, or what is missing of it.

    Args:
        command: what the cache names as the command that finishes it.

    Raises:
        ValueError: options that do not fit each other, the machine, the data, or what the folder holds already.
        BadDataError: too many bad samples.
        OSError: the folder cannot be written.
    """
    # Here, so that --help and wrong options do not wait for torch.
    from farl.initialize import crop_plan, named_sizes
    from farl.shards import open_shards
    from farl.tokens import manifest as described
    from farl.tokens.cache import CacheWriter
    from farl_engine import distributed
    from farl_engine.data import choose_decoder
    from farl_engine.data.shard_cache import ShardCache

    config = options.training()
    vision = named_sizes(config).vision
    world = distributed.start(options.device, _PATIENCE)
    shard_cache = ShardCache(options.shard_cache) if options.shard_cache else None
    index = open_shards("--data", options.data, world, options.max_bad_fraction, shard_cache)
    tokenizer = _load_tokenizer(options, index, world)
    decoder = choose_decoder(
        options.decoder,
        vision.image_size,
        tokenizer.token_image_size,
        world.device,
        threads=max(1, options.threads),
    )
    plan = crop_plan(config, index)
    wanted = described.Manifest(
        fingerprint=index.fingerprint,
        samples=len(index),
        tokenizer=described.describe_tokenizer(tokenizer, options.tokenizer.partition(":")[2]),
        seed=options.seed,
        augmentation=described.describe_plan(plan),
        views=options.views,
        image_size=vision.image_size,
        patches=vision.num_patches,
        block=described.block_samples(len(index)),
        command=command,
        **described.arithmetic_of(decoder, tokenizer, world.device),
    )
    manifest = _begin(Path(options.out), wanted, tokenizer, world)
    writer = CacheWriter(Path(options.out), manifest)
    pending = _unfinished(writer, world)
    if len(pending) and world.is_main and manifest.versions != wanted.versions:
        manifest.also_made_with(wanted.versions).write(Path(options.out))
    mine = np.array_split(pending, world.size)[world.rank]
    if len(mine):
        made = make_blocks(
            manifest,
            mine,
            options.batch_size,
            index=index,
            tokenizer=tokenizer,
            decoder=decoder,
            plan=plan,
            seed=options.seed,
            device=world.device,
            threads=options.threads,
            max_bad_fraction=options.max_bad_fraction,
        )
        unit = "samples" if options.views == 1 else "views"
        with Progress(_rows(manifest, pending), "tokenizing", unit=unit) as progress:
            for block, tokens, status, unreadable in made:
                writer.write(block, tokens, status, unreadable)
                # The others are as far, as a rule.
                progress.update(min(len(tokens) * world.size, (progress.total or 0) - progress.count))
    distributed.finish(world)


def make_blocks(
    manifest: Manifest, blocks: NDArray[np.int64], batch_size: int, **how: Any
) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.uint8], int]]:
    """Block by block what `CacheWriter.write` takes; `how` as of `make_tokens`."""
    from farl.tokens.cache import MADE, MISSING
    from farl.tokens.make import make_tokens

    made = make_tokens(rows=block_rows(manifest, blocks, batch_size), **how)
    tokens, status = np.empty((0, manifest.patches), np.int64), np.empty(0, np.uint8)
    unreadable = np.empty(0, np.bool_)
    for block in blocks.tolist():
        count = _rows(manifest, np.array([block]))
        while len(tokens) < count:
            part = next(made)
            good = part.ids == part.used_ids
            tokens = np.concatenate([tokens, np.where(good[:, None], part.tokens, 0)])
            status = np.concatenate([status, np.where(good, MADE, MISSING).astype(np.uint8)])
            unreadable = np.concatenate([unreadable, part.unreadable])
        yield block, tokens[:count], status[:count], int(unreadable[:count].sum())
        tokens, status, unreadable = tokens[count:], status[count:], unreadable[count:]


def block_rows(manifest: Manifest, blocks: NDArray[np.int64], batch_size: int) -> Rows:
    """The rows of some blocks: block by block, sample by sample, its views side by side."""
    from farl.tokens.make import Rows

    views = manifest.views
    ends = np.cumsum([0, *(_rows(manifest, blocks[i : i + 1]) for i in range(len(blocks)))])
    total = int(ends[-1])
    # Of nearly equal size: a few rows must not fill a large batch by being made over and over.
    batch_size = -(-total // -(-total // batch_size))

    def at(places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        number = np.searchsorted(ends, places, side="right") - 1
        within = places - ends[number]
        return blocks[number] * manifest.block + within // views, within % views

    return Rows(manifest.samples, batch_size, total, at)


def read_codebook(path: str) -> PatchCodebook:
    """The codebook in a file, or the one that the run in a folder was trained with.

    Raises:
        ValueError: there is none.
    """
    from farl.tokens import PatchCodebook
    from farl_engine.checkpoint import CheckpointStore

    if not Path(path).is_dir():
        return PatchCodebook.from_file(path)
    store = CheckpointStore(Path(path) / "checkpoints")
    state = store.load()["visual_tokens"] if store.latest() is not None else None
    if state is None:
        raise ValueError(f"{path} has no checkpoint with a codebook: name a run that was trained with one")
    return PatchCodebook.from_state_dict(state)


def _rows(manifest: Manifest, blocks: NDArray[np.int64]) -> int:
    """Samples times views in some blocks."""
    return sum(last - first for first, last in map(manifest.block_range, blocks.tolist())) * manifest.views


def _load_tokenizer(options: TokenizeOptions, index: ShardIndex, world: World) -> VisualTokenizer:
    """The tokenizer on this process's device; rank 0 reads or fits a codebook for all."""
    from farl.initialize import fit_codebook, load_encoder, named_sizes
    from farl.tokens import PatchCodebook
    from farl.tokens.manifest import CODEBOOK, MANIFEST
    from farl_engine.distributed import broadcast_object

    config = options.training()
    kind, _, file = options.tokenizer.partition(":")
    if kind == "dalle":
        return load_encoder(config, file).to(world.device)
    codebook = None
    if world.is_main:
        kept = Path(options.out) / CODEBOOK
        if file:
            codebook = read_codebook(file)
        elif kept.is_file() and (Path(options.out) / MANIFEST).is_file():
            codebook = PatchCodebook.from_file(kept)
        else:
            codebook = fit_codebook(config, index, world)
    state = broadcast_object(world, codebook.state_dict() if codebook else None)
    codebook = PatchCodebook.from_state_dict(state)
    wanted = named_sizes(config).vision.patch_size
    if codebook.patch_size != wanted:
        raise ValueError(
            f"--tokenizer {options.tokenizer} is of patches of {codebook.patch_size} pixels, --model {options.model} "
            f"has {wanted}: fit one with `python -m farl.tokens fit --model {options.model}`"
        )
    return codebook.to(world.device)


def _begin(folder: Path, wanted: Manifest, tokenizer: VisualTokenizer, world: World) -> Manifest:
    """The manifest of the cache that is there, if it is the wanted one, or of a new one."""
    from farl.tokens.cache import CacheWriter
    from farl.tokens.manifest import MANIFEST, Manifest, differences
    from farl_engine.distributed import broadcast_object, say

    values: dict[str, Any] | None = None
    if world.is_main:
        if not (folder / MANIFEST).exists():
            _check_space(folder, wanted)
            CacheWriter.create(folder, wanted, tokenizer)
        values = asdict(Manifest.read(folder))
    manifest = Manifest(**broadcast_object(world, values))
    differs = differences(
        manifest.contents() | manifest.arithmetic(),
        wanted.contents() | wanted.arithmetic(),
    )
    if differs:
        raise ValueError(
            f"the token cache {folder} was begun with other settings: {differs}. Use the old ones, or another --out"
        )
    say(world, f"{folder}: {manifest.samples:,} samples x {manifest.views} views, {manifest.bytes / 1e9:,.2f} GB")
    return manifest


def _check_space(folder: Path, manifest: Manifest) -> None:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < manifest.bytes:
        raise ValueError(
            f"--out {folder} needs {manifest.bytes / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free there: "
            "use another disk or fewer --views"
        )


def _unfinished(writer: CacheWriter, world: World) -> NDArray[np.int64]:
    """Blocks to make: never finished, damaged since, or with samples whose reading failed."""
    from farl_engine.distributed import broadcast_object, gather_objects, say

    finished, unreadable = broadcast_object(world, (writer.finished(), writer.unreadable()))
    total = int(finished.sum())
    damaged: list[int] = []
    with Progress(total, "checking", unit="blocks") as progress:
        for block in np.flatnonzero(finished)[world.rank :: world.size].tolist():
            if not writer.is_intact(block):
                damaged.append(block)
            progress.update(min(world.size, total - progress.count))
    damaged = [block for part in gather_objects(world, damaged) for block in part]
    pending = ~finished | (unreadable > 0)
    pending[damaged] = True
    if total:
        notes = f", {len(damaged):,} of them damaged" if damaged else ""
        say(world, f"{total:,} of {len(finished):,} blocks are there{notes}; {int(pending.sum()):,} to make")
    return np.flatnonzero(pending)


def main(argv: list[str]) -> int:
    options = cli.parse(TokenizeOptions, argv, prog=PROG, description=DESCRIPTION)
    tokenize(options, f"python -m {PROG} {shlex.join(argv)}")
    if cli.process_rank() == 0:
        from farl.tokens import TokenCache

        cache = TokenCache(options.out)
        facts = cache.manifest.tokenizer
        print(
            f"{options.out}: complete; {cache.manifest.patches} tokens a view by {facts['kind']} {facts['hash'][:12]}, "
            f"{cache.missing_rows():,} of {cache.manifest.samples * options.views:,} views are of bad samples"
        )
        if failed := cache.unreadable_reads:
            print(f"{failed:,} reads failed; the same command tries those again, until then their samples count as bad")
        print(f"use it with --visual-tokens cache:{options.out}")
    return 0
