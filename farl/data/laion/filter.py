"""`python -m farl.data laion filter SHARDS`: takes samples out of downloaded shards without writing these again.

What is taken out stands in a small list beside each shard (farl_engine/data/exclusions.py), which the index honours.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro
from numpy.typing import NDArray

from farl import cli
from farl.data.laion.downloads import compute, each_shard, numbers, read_downloads, strings
from farl.data.laion.select import nsfw_tags
from farl_engine.data.exclusions import write_exclusions
from farl_engine.data.shards import expand_paths

if TYPE_CHECKING:
    from farl.data.laion.detections import Detections

PROG = "farl.data laion filter"
DESCRIPTION = """Takes samples out of shards that img2dataset made.

Reads the .parquet files beside the shards and writes NNNNN.exclude.jsonl beside each; training, check and build leave
these samples out. The tars stay as they are: other limits replace the lists, and without any limit (and --duplicates
keep) the lists are removed. A run that was interrupted is simply run again."""
SUMMARY = "laion-filter.json"
# Position = code in the arrays; the first that applies counts.
CAUSES = (
    "",
    "unknown_size",
    "small",
    "short_caption",
    "long_caption",
    "nsfw",
    "no_face",
    "duplicate",
    "near_duplicate",
)


@dataclass(frozen=True)
class FilterOptions:
    shards: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="SHARDS")]
    """Tars, folders of tars, or patterns in quotes such as 'laion-face/split_*/*.tar'."""
    min_side: int = 0
    """Leave out images whose smaller side is below this many pixels."""
    min_caption: int = 0
    """Leave out captions with fewer characters."""
    max_caption: int = 0
    """Leave out captions with more characters; 0 for no limit."""
    drop_nsfw: str = ""
    """Tags of the NSFW column to leave out, with commas between, such as NSFW or NSFW,UNSURE."""
    detections: str = ""
    """Folder of LAION-Face's sample2detect_N.pth, for --min-face-score; each is read once, up to four at a time, which
    takes about 3 GB each."""
    min_face_score: float = 0.0
    """Leave out images in which no face has this score; needs --detections."""
    duplicates: Literal["keep", "exact", "near"] = "exact"
    """Of equal images the first stays: exact compares hashes of the files, near also those of small gray copies, for
    which every image is read and decoded once."""
    workers: int = os.cpu_count() or 1
    """Threads; one a core if not given."""

    def __post_init__(self) -> None:
        if not self.shards:
            raise ValueError("missing SHARDS; see --help")
        for name in ("min_side", "min_caption", "max_caption", "min_face_score"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}: wanted 0 or more")
        if bool(self.min_face_score) != bool(self.detections):
            raise ValueError("--min-face-score and --detections go together: give both or neither")
        if self.workers < 1:
            raise ValueError(f"--workers is {self.workers}: wanted 1 or more")

    @property
    def columns(self) -> list[str]:
        """What the limits need to know of a sample."""
        wanted = {
            ("width", "height"): self.min_side,
            ("caption",): self.min_caption or self.max_caption,
            ("NSFW",): self.drop_nsfw,
            ("SAMPLE_ID",): self.min_face_score,
        }
        return [name for names, needed in wanted.items() if needed for name in names]


@dataclass
class ShardFacts:
    """One shard's samples, in the order of its parquet file: uint8 codes of CAUSES, and hashes (0 for none)."""

    causes: NDArray[np.uint8]
    exact: NDArray[np.uint64]
    near: NDArray[np.uint64]


def filter_shards(options: FilterOptions) -> dict[str, Any]:
    """Writes the lists and returns counts: samples, kept, left out by cause.

    Raises:
        ValueError: no such shards, or files beside them that are not img2dataset's or lack what a limit needs.
    """
    shards = expand_paths(options.shards)
    faces = None
    if options.detections:
        from farl.data.laion.detections import load_detections

        faces = load_detections(Path(options.detections), min(options.workers, 4))
    look = partial(_look, options=options, faces=faces)
    facts = each_shard(look, shards, workers=options.workers, description="looking")
    if options.duplicates != "keep":
        _mark_repeats(facts, "duplicate")
    if options.duplicates == "near":
        _mark_repeats(facts, "near_duplicate")
    each_shard(_write_list, shards, facts, workers=options.workers, description="writing lists")
    lost: Counter[str] = Counter()
    for found in facts:
        for code, count in zip(*np.unique(found.causes, return_counts=True), strict=True):
            lost[CAUSES[code]] += int(count)
    kept = lost.pop("", 0)
    result = {
        "samples": kept + lost.total(),
        "kept": kept,
        "lost": dict(lost.most_common()),
        "shards": len(shards),
        "shards_without_metadata": sum(not len(found.causes) for found in facts),
        "settings": {name: value for name, value in asdict(options).items() if name not in ("shards", "workers")},
    }
    summary_path(shards).write_text(json.dumps(result, indent=1) + "\n")
    return result


def summary_path(shards: list[Path]) -> Path:
    """Where the counts of the last filtering lie: in the folder that the shards have in common."""
    return Path(os.path.commonpath([shard.absolute().parent for shard in shards])) / SUMMARY


def _look(shard: Path, options: FilterOptions, faces: Detections | None) -> ShardFacts:
    hashes = [] if options.duplicates == "keep" else ["sha256", "md5"]
    table = read_downloads(shard, [*options.columns, *hashes])
    if missing := [name for name in options.columns if name not in table.column_names and len(table)]:
        raise ValueError(f"{shard.with_suffix('.parquet')} has no column {missing[0]}, which a limit needs")
    causes = np.zeros(len(table), np.uint8)
    none = np.zeros(len(table), np.uint64)
    if not len(table):
        return ShardFacts(causes, none, none)

    def drop(cause: str, bad: NDArray[np.bool_]) -> None:
        causes[(causes == 0) & bad] = CAUSES.index(cause)

    if options.min_side:
        side = np.minimum(numbers(table, "width"), numbers(table, "height"))
        drop("unknown_size", side <= 0)
        drop("small", side < options.min_side)
    if options.min_caption or options.max_caption:
        length = caption_lengths(table)
        drop("short_caption", length < options.min_caption)
        drop("long_caption", (length > options.max_caption) & (options.max_caption > 0))
    if tags := nsfw_tags(options.drop_nsfw):
        drop("nsfw", np.isin(np.array(strings(table, "NSFW"), np.str_), tags))
    if faces is not None:
        # NaN, of an image without a face, is not at least the limit either.
        drop("no_face", ~(faces.find(numbers(table, "SAMPLE_ID"))[:, 14] >= options.min_face_score))
    exact = near = none
    if options.duplicates != "keep":
        name = next((name for name in hashes if name in table.column_names), None)
        if name is None:
            raise ValueError(
                f"{shard.with_suffix('.parquet')} has neither sha256 nor md5: download with --compute_hash sha256, "
                "or use --duplicates keep"
            )
        exact = np.fromiter(map(_hash_word, strings(table, name)), np.uint64, len(table))
    if options.duplicates == "near":
        from farl.data.laion.near import shard_hashes

        by_key = shard_hashes(shard)
        near = np.fromiter((by_key.get(key, 0) for key in strings(table, "key")), np.uint64, len(table))
    return ShardFacts(causes, exact, near)


def caption_lengths(table: Any) -> NDArray[np.int64]:
    """Characters of each caption without surrounding blanks, int64 [n]."""
    pc = compute()

    return pc.fill_null(pc.utf8_length(pc.utf8_trim_whitespace(table.column("caption"))), 0).to_numpy().astype(np.int64)


def _hash_word(digest: str) -> int:
    """The first 64 bits of a hash in hex, 0 if it is none."""
    try:
        return int(digest[:16], 16) if len(digest) >= 32 else 0
    except ValueError:
        return 0


def _mark_repeats(facts: list[ShardFacts], cause: str) -> None:
    """Of the samples still in that share a hash, all but the first get `cause`."""
    hashes = [found.exact if cause == "duplicate" else found.near for found in facts]
    alive = [np.flatnonzero((found.causes == 0) & (words != 0)) for found, words in zip(facts, hashes, strict=True)]
    owners = np.repeat(np.arange(len(facts)), [len(rows) for rows in alive])
    places = np.concatenate(alive)
    words = np.concatenate([words[rows] for words, rows in zip(hashes, alive, strict=True)])
    # A stable sort keeps the order of shards and samples among equals.
    order = np.argsort(words, kind="stable")
    repeats = order[1:][words[order][1:] == words[order][:-1]]
    repeats.sort()
    bounds = np.searchsorted(owners[repeats], np.arange(len(facts) + 1))
    for owner, found in enumerate(facts):
        found.causes[places[repeats[bounds[owner] : bounds[owner + 1]]]] = CAUSES.index(cause)


def _write_list(shard: Path, facts: ShardFacts) -> None:
    keys = strings(read_downloads(shard, []), "key")
    if len(keys) != len(facts.causes):
        raise ValueError(f"{shard.with_suffix('.parquet')} changed meanwhile: filter again when nothing writes it")
    write_exclusions(shard, {keys[i]: CAUSES[facts.causes[i]] for i in np.flatnonzero(facts.causes).tolist()})


def summary(result: dict[str, Any]) -> str:
    """What a person reads at the end."""
    share = result["kept"] / max(result["samples"], 1)
    lines = [f"{result['kept']:,} of {result['samples']:,} samples kept ({share:.1%}) in {result['shards']:,} shards"]
    lines += [f"  {cause:<16} {count:>12,}" for cause, count in result["lost"].items()]
    if result["shards_without_metadata"]:
        lines.append(f"{result['shards_without_metadata']:,} shards say nothing of their samples: all of these stay")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int | None:
    print(summary(filter_shards(cli.parse(FilterOptions, argv, prog=PROG, description=DESCRIPTION))))
    return 0
