"""The shards that a run reads: what `--data` says, remote copies, the index, and the order of mixed sources.

`--data` holds patterns with spaces between, in quotes where a path or command has spaces itself, as in a shell. Without
weights they name one set of shards. With a weight before each, `'3=photos/*.tar 1=drawn/*.tar'`, each is a source of
its own, and of four samples three come from the first.
"""

from __future__ import annotations

import math
import os
import re
import shlex
from dataclasses import dataclass
from fractions import Fraction

from farl.progress import Progress
from farl_engine import stop
from farl_engine.data import MixedOrder, SampleOrder, ShardIndex
from farl_engine.data.bad_data import check_excluded
from farl_engine.data.counter_rng import combine
from farl_engine.data.remote import is_remote, shown
from farl_engine.data.shard_cache import ShardCache
from farl_engine.distributed import World, gather_objects, in_turns, say

_WEIGHTED = re.compile(r"(\d+\.?\d*|\.\d+)=(.+)", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """One set of shards, and its weight in a mix (None outside one)."""

    patterns: tuple[str, ...]
    weight: Fraction | None


def parse_sources(text: str) -> list[Source]:
    """The sources that `--data` names: one without a weight, or any number with one each.

    Raises:
        ValueError: no pattern, a quote without its partner, a weight of 0, or weights at some patterns only.
    """
    try:
        words = shlex.split(text)
    except ValueError:
        raise ValueError(f"a quote in {text} has no partner") from None
    if not words:
        raise ValueError("no shards given: name at least one tar file or pattern")
    matches = [_WEIGHTED.fullmatch(word) for word in words]
    if not any(matches):
        return [Source(tuple(words), None)]
    sources = []
    for word, match in zip(words, matches, strict=True):
        if match is None:
            raise ValueError(f"{word} has no weight: write WEIGHT=SHARDS for each source, or for none")
        if not Fraction(match[1]):
            raise ValueError(f"{word} has weight 0: leave that source out")
        sources.append(Source((match[2],), Fraction(match[1])))
    return sources


def describe_mix(text: str) -> str:
    """The proportions that `--data` asks for in smallest whole numbers, such as "3:1"; "none" of one source."""
    try:
        weights = [source.weight for source in parse_sources(text) if source.weight is not None]
    except ValueError:
        weights = []
    if len(weights) < 2:
        return "none"
    scale = Fraction(math.lcm(*(w.denominator for w in weights)), math.gcd(*(w.numerator for w in weights)))
    whole = [int(weight * scale) for weight in weights]
    return ":".join(str(count // math.gcd(*whole)) for count in whole)


def open_shards(
    option: str, shards: str, world: World, max_bad_fraction: float, shard_cache: ShardCache | None = None
) -> ShardIndex:
    """Index of the `shards` that `option` names, its ids in the order of the sources.

    The first process of all reads the tars first, then the first one of each other machine, so that the others find
    the index file. Remote shards are fetched by all machines at the same time.

    Raises:
        ValueError: there are no such shards, no sample in them, or other ones on another machine.
        BadDataError: more than `max_bad_fraction` of the samples lack an image or a caption.
    """
    try:
        sources = parse_sources(shards)
        patterns = [pattern for source in sources for pattern in source.patterns]
        remote = [pattern for pattern in patterns if is_remote(pattern)]
        if remote and shard_cache is None:
            raise ValueError(
                f"{shown(remote[0])} is not on this machine; name a folder on a local disk for copies: "
                "--shard-cache DIR"
            )

        def build() -> ShardIndex:
            indexes = [
                ShardIndex.build(source.patterns, progress=_StoppableProgress, shard_cache=shard_cache)
                for source in sources
            ]
            return ShardIndex.concatenate(indexes)

        first_here = int(os.environ.get("LOCAL_RANK", "0")) == 0
        index = in_turns(world, build, turn=0 if world.is_main or (remote and first_here) else 1 if first_here else 2)
    except ValueError as error:
        raise ValueError(f"{option}: {error}{_advice(shards, str(error))}") from None
    except SystemExit:
        say(world, f"stopped by {stop.requested()} before the first step; the same command goes on from there")
        raise
    if len(set(gather_objects(world, index.fingerprint))) > 1:
        raise ValueError(f"{option}: the processes see different files; give all machines the same")
    check_excluded(len(index), index.problems, index.excluded_by_shard, max_bad_fraction)
    say(world, f"{_size(index)}, fingerprint {index.fingerprint[:12]}")
    if len(sources) > 1:
        weights = [source.weight or Fraction(1) for source in sources]
        for source, weight, part in zip(sources, weights, index.parts, strict=True):
            share, name = float(weight / sum(weights)), shown(source.patterns[0])
            say(world, f"  {share:.2%} of the samples from {name}: {_size(part)}")
    if index.problems:
        say(world, "left out: " + ", ".join(f"{count} x {cause}" for cause, count in sorted(index.problems.items())))
    return index


def sample_order(shards: str, index: ShardIndex, global_batch: int, seed: int) -> SampleOrder | MixedOrder:
    """The order of an index that `open_shards` made of `shards`.

    Mixed sources have orders of their own; with one seed, sources of equal size would go in step, and the same pictures
    in two of them would meet in every batch.
    """
    weights = [float(source.weight) for source in parse_sources(shards) if source.weight is not None]
    if len(weights) < 2:
        return SampleOrder(len(index), global_batch, seed)
    orders = [SampleOrder(len(part), global_batch, int(combine(seed, k))) for k, part in enumerate(index.parts)]
    return MixedOrder(orders, weights)


class _StoppableProgress(Progress):
    """Leaves on a stop signal: before the first step nothing has to be saved but what index and cache keep anyway."""

    def update(self, count: int = 1) -> None:
        super().update(count)
        if stop.requested():
            raise SystemExit(0)


def _size(index: ShardIndex) -> str:
    count = len(index.shard_names)
    return f"{len(index):,} pairs in {count:,} shard{'s' * (count > 1)}"


def _advice(shards: str, problem: str) -> str:
    """What may have been meant by a pattern that names nothing."""
    if "no shard matches" not in problem:
        return ""
    if re.search(r"=\d+\.?\d*(\s|$)", shards):
        return "; a weight stands before its source, as in '3=a/*.tar 1=b/*.tar'"
    return "; a path that holds a space needs quotes of its own" if len(shards.split()) > 1 else ""
