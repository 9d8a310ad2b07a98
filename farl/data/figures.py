"""The figures of `farl.data check` from its counts, and the table that a person reads."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from farl.data.tally import Tally, histogram, percentiles

if TYPE_CHECKING:
    from farl_engine.data import ShardIndex

# Of the histograms: quarters of an octave of pixels, eighths of one of width / height in percent.
_SIDE_EDGES = 2.0 ** np.arange(4, 15.01, 0.25)
_ASPECT_EDGES = 100 * 2.0 ** np.arange(-2, 2.01, 0.125)
_BINS = 40
# Broken shards to name in the table.
SHOWN_SHARDS = 10


def figures_of(index: ShardIndex, tally: Tally, decoded: bool) -> dict[str, Any]:
    """Counts are of the whole set, estimates where only a part of it was looked at."""
    from farl_engine.data.exclusions import CAUSE as FILTERED
    from farl_engine.data.shards import SAMPLE_CAUSES

    scale = len(index) / tally.checked

    def scaled(counts: Counter[Any]) -> dict[Any, int]:
        return {name: round(scale * count) for name, count in counts.most_common()}

    bad = Counter(scaled(tally.bad))
    by_shard = {index.shard_names[shard]: Counter(scaled(causes)) for shard, causes in tally.bad_by_shard.items()}
    shard_problems: dict[str, list[str]] = {}
    for name, causes in index.problems_by_shard.items():
        for cause, count in causes.items():
            if cause in SAMPLE_CAUSES:
                bad[cause] += count
                by_shard.setdefault(name, Counter())[cause] += count
            elif cause != FILTERED:
                shard_problems.setdefault(name, []).append(cause)
    samples = len(index) + index.excluded
    worst = sorted(by_shard, key=lambda name: (-by_shard[name].total(), name))
    traits, characters, tokens = (tally.counters[name] for name in ("trait", "characters", "tokens"))
    low, high = ((share * len(index) + index.excluded) / samples for share in wilson(tally.bad.total(), tally.checked))
    return {
        "shards": len(index.shard_names),
        "shard_bytes": sum(path.stat().st_size for path in index.shard_paths if path.exists()),
        "shard_problems": shard_problems,
        "fingerprint": index.fingerprint,
        "samples": samples,
        "filtered": index.problems.get(FILTERED, 0),
        "checked": tally.checked,
        "sampled": tally.checked < len(index),
        "good": round(scale * tally.good),
        "bad": dict(bad.most_common()),
        "bad_fraction": (tally.bad.total() / tally.checked * len(index) + index.excluded) / samples,
        "bad_fraction_interval": [low, high] if tally.checked < len(index) else None,
        "bad_by_shard": {name: dict(by_shard[name].most_common()) for name in worst},
        "bad_examples": {cause: _name(index, positions[0]) for cause, positions in tally.examples.items()},
        "decoded": decoded,
        "formats": scaled(tally.counters["format"]),
        "decoded_by": {name: round(scale * tally.counters["decoded_by"][name]) for name in ("hardware", "gpu", "cpu")},
        "progressive": round(scale * traits["progressive"]),
        "progressive_fraction": traits["progressive"] / max(tally.counters["format"]["jpeg"], 1),
        "gray": round(scale * traits["gray"]),
        "cmyk": round(scale * traits["cmyk"]),
        "exif_rotated": round(scale * traits["rotated"]),
        "image_kib": percentiles(tally.counters["image_kib"]),
        "short_side": percentiles(tally.counters["short_side"]),
        "long_side": percentiles(tally.counters["long_side"]),
        "caption_characters": percentiles(characters),
        "caption_tokens": percentiles(tokens),
        "captions_cut": round(scale * traits["cut"]),
        "captions_not_utf8": round(scale * traits["not_utf8"]),
        "distinct_captions": tally.captions.count(),
        "histograms": {
            "long_side": histogram(tally.counters["long_side"], _SIDE_EDGES),
            "percent_wide": histogram(tally.counters["percent_wide"], _ASPECT_EDGES),
            "caption_characters": histogram(characters, _edges(characters)),
            "caption_tokens": histogram(tokens, _edges(tokens)),
        },
    }


def _edges(counts: Counter[int]) -> NDArray[np.float64]:
    """Whole numbers from 0 to a little more than all but 1 % of the values; the rest goes into the last bin."""
    values = sorted(counts)
    reached = np.cumsum([counts[value] for value in values]) if values else np.zeros(0)
    most = values[int(np.searchsorted(reached, 0.99 * reached[-1]))] if values else 1
    return np.arange(_BINS + 1, dtype=np.float64) * -(-(most + 1) // _BINS)


def wilson(count: int, total: int) -> tuple[float, float]:
    """95 % interval of a share of which `count` of `total` were seen (Wilson's score interval)."""
    z = 1.96
    share, room = count / total, z * z / total
    middle = (share + room / 2) / (1 + room)
    reach = z / (1 + room) * (share * (1 - share) / total + room / (4 * total)) ** 0.5
    return max(0.0, middle - reach), min(1.0, middle + reach)


def _name(index: ShardIndex, position: int) -> str:
    return f"{index.shard_names[index.shard_of(position)]}: {index.key(position)}"


def table(figures: dict[str, Any]) -> str:
    """The figures for a person."""
    samples, about = figures["samples"], "about " if figures["sampled"] else ""
    looked = "decoded" if figures["decoded"] else "headers read; --decode reads all"
    rows: list[tuple[str, str]] = [
        ("shards", f"{figures['shards']:,} ({figures['shard_bytes'] / 1e6:,.1f} MB)"),
        ("fingerprint", figures["fingerprint"]),
        ("samples", f"{samples:,}"),
    ]
    if figures["filtered"]:
        rows.append(("filtered out", f"{figures['filtered']:,}, by the lists beside the shards"))
    fraction = f"{figures['bad_fraction']:.2%}"
    if figures["sampled"]:
        low, high = figures["bad_fraction_interval"]
        rows.append(("looked at", f"{figures['checked']:,}, spread evenly; --all looks at each"))
        fraction += f", 95 % interval {low:.2%} to {high:.2%}"
    rows += [
        ("good", f"{about}{figures['good']:,} ({looked})"),
        ("bad", f"{about}{sum(figures['bad'].values()):,} ({fraction})"),
    ]
    for cause, count in figures["bad"].items():
        example = figures["bad_examples"].get(cause)
        rows.append((f"  {cause}", f"{about}{count:,}" + (f"  such as {example}" if example else "")))
    if len(figures["bad_by_shard"]) > 1:
        worst = [f"{name} ({sum(causes.values()):,})" for name, causes in list(figures["bad_by_shard"].items())[:3]]
        rows.append(("  worst shards", ", ".join(worst)))
    problems = list(figures["shard_problems"].items())
    rows += [(f"  {', '.join(causes)}", name) for name, causes in problems[:SHOWN_SHARDS]]
    if len(problems) > SHOWN_SHARDS:
        rows.append(("", f"and {len(problems) - SHOWN_SHARDS:,} more shards with such faults"))
    rows.append(("formats", ", ".join(f"{name} {count:,}" for name, count in figures["formats"].items()) or "none"))
    rows.append(("progressive", f"{figures['progressive']:,} ({figures['progressive_fraction']:.1%} of the JPEGs)"))
    kinds = ("gray", "cmyk", "exif_rotated")
    rows.append(("other kinds", ", ".join(f"{kind.replace('_', '-')} {figures[kind]:,}" for kind in kinds)))
    ways = (("hardware", "JPEG engine"), ("gpu", "GPU"), ("cpu", "CPU"))
    shares = (f"{label} {figures['decoded_by'][way] / max(figures['good'], 1):.1%}" for way, label in ways)
    rows.append(("decoded by", ", ".join(shares) + " (with --decoder dali on a GPU that has the engine)"))
    rows.append(("", "  ".join(f"{head:>6}" for head in ("min", "5 %", "median", "95 %", "max"))))
    units = {"image_kib": "KiB", "short_side": "px", "long_side": "px", "caption_characters": "", "caption_tokens": ""}
    for name, unit in units.items():
        shown = "  ".join(f"{value:>6,}" for value in figures[name].values())
        rows.append((name.removesuffix("_kib").replace("_", " "), f"{shown}  {unit}".rstrip()))
    captions = f"{figures['distinct_captions']:,} distinct, {figures['captions_not_utf8']:,} not UTF-8"
    rows.append(("captions", f"{captions}, {figures['captions_cut']:,} of more than 77 tokens (cut in training)"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}".rstrip() for name, text in rows)
