"""`python -m farl.data check SHARDS`: what shards hold, and which samples training would have to replace."""

from __future__ import annotations

import json
import os
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro

from farl import cli
from farl.progress import Progress

if TYPE_CHECKING:
    from farl.data.probe import Facts, Prober
    from farl_engine.data import ShardIndex

PROG = "farl.data check"
DESCRIPTION = """Counts what shards hold: samples, bad ones by cause, sizes, captions, progressive JPEGs, fingerprint.

Reads the header of every image, and with --decode every pixel. Ends with code 0 whatever it finds in readable shards,
unless --max-bad-fraction is given."""
PERCENTILES = (0, 5, 50, 95, 100)
_CHUNK = 4096


@dataclass(frozen=True)
class CheckOptions:
    shards: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="SHARDS")]
    """Tars, folders of tars, or patterns in quotes such as 'data/train-*.tar' or 'train-{00000..00031}.tar'."""
    json: str | None = None
    """File for the same figures as JSON."""
    max_bad_fraction: float | None = None
    """Fail (code 1) when a larger share of the samples is bad."""
    decode: bool = False
    """Decode every image too, as training does: finds truncated and broken ones."""
    threads: int = os.cpu_count() or 1
    """Threads that read and decode; one a core if not given."""

    def __post_init__(self) -> None:
        if not self.shards:
            raise ValueError("missing SHARDS; see --help")
        if self.max_bad_fraction is not None and not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"--max-bad-fraction is {self.max_bad_fraction}: wanted 0 to 1")
        if self.threads < 1:
            raise ValueError(f"--threads is {self.threads}: wanted 1 or more")


@dataclass
class Tally:
    """Counts over the samples. Sizes are kept as counters of few distinct values, so that memory stays bounded."""

    good: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    bad_by_shard: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    examples: dict[str, str] = field(default_factory=dict)
    formats: Counter[str] = field(default_factory=Counter)
    progressive: int = 0
    image_kib: Counter[int] = field(default_factory=Counter)
    short_side: Counter[int] = field(default_factory=Counter)
    long_side: Counter[int] = field(default_factory=Counter)
    caption_characters: Counter[int] = field(default_factory=Counter)
    not_utf8: int = 0
    caption_hashes: array[int] = field(default_factory=lambda: array("Q"))

    def add(self, facts: Facts, shard: str, key: str) -> None:
        if facts.cause is not None:
            self.bad[facts.cause] += 1
            self.bad_by_shard[shard][facts.cause] += 1
            self.examples.setdefault(facts.cause, f"{shard}: {key}")
            return
        self.good += 1
        self.formats[facts.format] += 1
        self.progressive += facts.progressive
        self.image_kib[-(-facts.image_bytes // 1024)] += 1
        self.short_side[min(facts.width, facts.height)] += 1
        self.long_side[max(facts.width, facts.height)] += 1
        self.caption_characters[len(facts.caption)] += 1
        self.not_utf8 += not facts.utf8
        digest = blake2b(facts.caption.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        self.caption_hashes.append(int.from_bytes(digest, "little"))


def check(options: CheckOptions) -> dict[str, Any]:
    """The figures, as they go to JSON. ValueError if no shard matches or none holds a sample."""
    # Here, so that --help and wrong options do not wait for torch, which the decoder imports.
    from farl.data.probe import Prober
    from farl_engine.data import ShardIndex

    index = ShardIndex.build(options.shards, progress=True)
    prober = Prober(index, decode=options.decode)
    tally = Tally()
    with Progress(len(index), "checking") as progress:
        for i, facts in enumerate(_in_order(prober, len(index), options.threads)):
            tally.add(facts, index.shard_names[index.shard_of(i)], index.key(i))
            progress.update()
    return _figures(index, tally, options.decode)


def _in_order(prober: Prober, count: int, threads: int) -> Iterator[Facts]:
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, count, _CHUNK):
            yield from pool.map(prober, range(start, min(start + _CHUNK, count)))


def _figures(index: ShardIndex, tally: Tally, decoded: bool) -> dict[str, Any]:
    from farl_engine.data.shards import SAMPLE_CAUSES

    bad = tally.bad.copy()
    by_shard = {name: counts.copy() for name, counts in tally.bad_by_shard.items()}
    shard_problems = {}
    for name, causes in index.problems_by_shard.items():
        for cause, count in causes.items():
            if cause in SAMPLE_CAUSES:
                bad[cause] += count
                by_shard.setdefault(name, Counter())[cause] += count
            else:
                shard_problems.setdefault(name, []).append(cause)
    samples = len(index) + index.excluded
    worst = sorted(by_shard, key=lambda name: (-by_shard[name].total(), name))
    jpegs = tally.formats["jpeg"]
    return {
        "shards": len(index.shard_names),
        "shard_bytes": sum(path.stat().st_size for path in index.shard_paths),
        "shard_problems": shard_problems,
        "fingerprint": index.fingerprint,
        "samples": samples,
        "good": tally.good,
        "bad": dict(bad.most_common()),
        "bad_fraction": bad.total() / max(samples, 1),
        "bad_by_shard": {name: dict(by_shard[name].most_common()) for name in worst},
        "bad_examples": tally.examples,
        "decoded": decoded,
        "formats": dict(tally.formats.most_common()),
        "progressive": tally.progressive,
        "progressive_fraction": tally.progressive / jpegs if jpegs else 0.0,
        "image_kib": percentiles(tally.image_kib),
        "short_side": percentiles(tally.short_side),
        "long_side": percentiles(tally.long_side),
        "caption_characters": percentiles(tally.caption_characters),
        "distinct_captions": len(np.unique(np.frombuffer(tally.caption_hashes, dtype=np.uint64))),
        "captions_not_utf8": tally.not_utf8,
    }


def percentiles(counts: Counter[int]) -> dict[str, int]:
    """Nearest-rank percentiles of counted values: {"0": smallest, "5", "50", "95", "100": largest}; {} of nothing."""
    total, seen, found = counts.total(), 0, {}
    wanted = [(percent, max(1, -(-percent * total // 100))) for percent in PERCENTILES]
    for value in sorted(counts):
        seen += counts[value]
        while wanted and seen >= wanted[0][1]:
            found[str(wanted.pop(0)[0])] = value
    return found


def table(figures: dict[str, Any]) -> str:
    """The figures for a person."""
    rows: list[tuple[str, str]] = [
        ("shards", f"{figures['shards']:,} ({figures['shard_bytes'] / 1e6:,.1f} MB)"),
        ("fingerprint", figures["fingerprint"]),
        ("samples", f"{figures['samples']:,}"),
        ("good", f"{figures['good']:,} ({'decoded' if figures['decoded'] else 'headers read; --decode reads all'})"),
        ("bad", f"{sum(figures['bad'].values()):,} ({figures['bad_fraction']:.2%})"),
    ]
    for cause, count in figures["bad"].items():
        example = figures["bad_examples"].get(cause)
        rows.append((f"  {cause}", f"{count:,}" + (f"  such as {example}" if example else "")))
    if len(figures["bad_by_shard"]) > 1:
        worst = [f"{name} ({sum(causes.values()):,})" for name, causes in list(figures["bad_by_shard"].items())[:3]]
        rows.append(("  worst shards", ", ".join(worst)))
    for name, causes in figures["shard_problems"].items():
        rows.append((f"  {', '.join(causes)}", name))
    rows.append(("formats", ", ".join(f"{name} {count:,}" for name, count in figures["formats"].items()) or "none"))
    rows.append(("progressive", f"{figures['progressive']:,} ({figures['progressive_fraction']:.1%} of the JPEGs)"))
    for name, unit in (("image_kib", "KiB"), ("short_side", "px"), ("long_side", "px"), ("caption_characters", "")):
        shown = "  ".join(f"{value:>6,}" for value in figures[name].values())
        rows.append((name.removesuffix("_kib").replace("_", " "), f"{shown}  {unit}".rstrip()))
    rows.insert(-4, ("", "  ".join(f"{head:>6}" for head in ("min", "5 %", "median", "95 %", "max"))))
    rows.append(("captions", f"{figures['distinct_captions']:,} distinct, {figures['captions_not_utf8']:,} not UTF-8"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}".rstrip() for name, text in rows)


def main(argv: list[str] | None = None) -> int | None:
    options = cli.parse(CheckOptions, argv, prog=PROG, description=DESCRIPTION)
    figures = check(options)
    print(table(figures).encode("utf-8", "backslashreplace").decode())
    if options.json is not None:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if options.max_bad_fraction is not None and figures["bad_fraction"] > options.max_bad_fraction:
        from farl_engine.data import BadDataError

        name, causes = next(iter(figures["bad_by_shard"].items()))
        raise BadDataError(
            f"{figures['bad_fraction']:.2%} of the samples are bad, allowed {options.max_bad_fraction:.2%}; "
            f"worst shard {name}: {', '.join(f'{cause} {count:,}' for cause, count in causes.items())}"
        )
    return 0
