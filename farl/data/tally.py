"""Counts over samples that can be added up, saved and read again, in bounded memory."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from farl.data.probe import Facts

PERCENTILES = (0, 5, 50, 95, 100)
# Bad samples of each cause to remember, for the picture.
EXAMPLES = 8
# Above as many different captions their number is estimated, within about 1 %.
EXACT_CAPTIONS = 1 << 16
_HASHES = 1 << 64


class Distinct:
    """How many different texts there were: exact up to `EXACT_CAPTIONS`, then from the smallest of their hashes."""

    def __init__(self, hashes: Iterable[int] = ()) -> None:
        self._smallest: set[int] = set(hashes)
        self._new: list[int] = []

    def add(self, text: str) -> None:
        digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        self._new.append(int.from_bytes(digest, "little"))

    def merge(self, other: Distinct) -> None:
        self._smallest |= other._smallest
        self._smallest.update(other._new, self._new)
        self._new.clear()
        if len(self._smallest) > 2 * EXACT_CAPTIONS:
            self._smallest = set(sorted(self._smallest)[:EXACT_CAPTIONS])

    def hashes(self) -> list[int]:
        """The smallest hashes, ascending, `EXACT_CAPTIONS` at most; they say all that is known."""
        self.merge(Distinct())
        return sorted(self._smallest)[:EXACT_CAPTIONS]

    def count(self) -> int:
        smallest = self.hashes()
        if len(smallest) < EXACT_CAPTIONS:
            return len(smallest)
        # The k-th smallest of n numbers spread evenly over [0, 1) lies near k / n.
        return round((EXACT_CAPTIONS - 1) * _HASHES / smallest[-1])


@dataclass
class Tally:
    """Counts over some samples.

    Attributes:
        checked, good: samples looked at, and those without a fault.
        bad: cause -> count; bad_by_shard: shard number -> cause -> count.
        examples: cause -> positions of the first `EXAMPLES` samples, ascending.
        counters: "format", "decoded_by", "trait", "image_kib", "short_side", "long_side", "percent_wide" (100 x width /
            height), "characters" and "tokens" -> value -> count, over the good samples.
        captions: the different ones.
    """

    checked: int = 0
    good: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    bad_by_shard: dict[int, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    examples: dict[str, list[int]] = field(default_factory=dict)
    counters: dict[str, Counter[Any]] = field(default_factory=lambda: defaultdict(Counter))
    captions: Distinct = field(default_factory=Distinct)

    def add(self, facts: Facts, position: int, shard: int) -> None:
        self.checked += 1
        if facts.cause is not None:
            self.bad[facts.cause] += 1
            self.bad_by_shard[shard][facts.cause] += 1
            examples = self.examples.setdefault(facts.cause, [])
            if len(examples) < EXAMPLES:
                examples.append(position)
            return
        self.good += 1
        counters, width, height = self.counters, facts.width, facts.height
        counters["format"][facts.format] += 1
        counters["decoded_by"][facts.decoded_by] += 1
        counters["image_kib"][-(-facts.image_bytes // 1024)] += 1
        counters["short_side"][min(width, height)] += 1
        counters["long_side"][max(width, height)] += 1
        counters["percent_wide"][round(100 * width / height)] += 1
        counters["characters"][len(facts.caption)] += 1
        counters["tokens"][facts.tokens] += 1
        for trait in facts.traits:
            counters["trait"][trait] += 1
        self.captions.add(facts.caption)

    def merge(self, other: Tally) -> None:
        """Adds what `other` counted over later samples."""
        self.checked += other.checked
        self.good += other.good
        self.bad.update(other.bad)
        for shard, causes in other.bad_by_shard.items():
            self.bad_by_shard[shard].update(causes)
        for cause, positions in other.examples.items():
            self.examples[cause] = (self.examples.get(cause, []) + positions)[:EXAMPLES]
        for name, counter in other.counters.items():
            self.counters[name].update(counter)
        self.captions.merge(other.captions)

    def to_json(self) -> dict[str, Any]:
        return {
            "checked": self.checked,
            "good": self.good,
            "bad": self.bad,
            "bad_by_shard": list(self.bad_by_shard.items()),
            "examples": self.examples,
            "counters": {name: list(counter.items()) for name, counter in self.counters.items()},
            "captions": self.captions.hashes(),
        }

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Tally:
        """What `to_json` gave; KeyError, TypeError or ValueError for anything else."""
        tally = cls(int(saved["checked"]), int(saved["good"]), Counter(saved["bad"]))
        tally.bad_by_shard.update((shard, Counter(causes)) for shard, causes in saved["bad_by_shard"])
        tally.examples.update(saved["examples"])
        tally.counters.update((name, Counter(dict(pairs))) for name, pairs in saved["counters"].items())
        tally.captions = Distinct(saved["captions"])
        return tally


def percentiles(counts: Counter[int]) -> dict[str, int]:
    """Nearest-rank percentiles of counted values: {"0": smallest, "5", "50", "95", "100": largest}; {} of nothing."""
    total, seen, found = counts.total(), 0, {}
    wanted = [(percent, max(1, -(-percent * total // 100))) for percent in PERCENTILES]
    for value in sorted(counts):
        seen += counts[value]
        while wanted and seen >= wanted[0][1]:
            found[str(wanted.pop(0)[0])] = value
    return found


def histogram(counts: Counter[int], edges: NDArray[np.float64]) -> dict[str, list[float]]:
    """{"edges": n + 1 of them, "counts": n}: values in [edge, next edge), those outside in the first and last bin."""
    values = np.fromiter(counts.keys(), np.float64, len(counts))
    bins = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    found = np.bincount(bins, np.fromiter(counts.values(), np.float64, len(counts)), len(edges) - 1)
    return {"edges": edges.tolist(), "counts": found.astype(np.int64).tolist()}
