"""Bad samples: what is counted, what is logged, and when a run has too many of them.

Rules: a sample that cannot be read or decoded, or has no caption, is replaced by another one chosen by hash and
counted by cause and shard. The first is logged, then every 1,000th. A run has too many when, over the last 10,000
samples tried, at least 20 were bad (any, if the allowed fraction is 0) and their share exceeds the allowed fraction.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Mapping, Sequence

WINDOW = 10_000
MIN_BAD = 20
LOG_EVERY = 1000
MAX_MESSAGE = 500
# Why an image cannot be decoded.
CAUSES = ("empty", "not_an_image", "truncated", "corrupt", "too_many_pixels", "unsupported")

logger = logging.getLogger("farl_engine.data")


class BadImage(ValueError):  # noqa: N818
    """Bytes that give no picture; `cause` is one of CAUSES."""

    def __init__(self, cause: str, message: str) -> None:
        assert cause in CAUSES
        super().__init__(message)
        self.cause = cause


class BadDataError(RuntimeError):
    """Too many bad samples; the message names the fraction, the causes and the worst shard."""


class BadSampleLedger:
    """Counts of bad samples in the order in which batches are handed out; used by one thread."""

    def __init__(self, max_fraction: float) -> None:
        if not 0 <= max_fraction <= 1:
            raise ValueError(f"max_bad_fraction must be in 0..1, got {max_fraction}")
        self.max_fraction = max_fraction
        self.by_cause: Counter[str] = Counter()
        self.by_shard: Counter[str] = Counter()
        self._recent: deque[tuple[int, list[tuple[str, str]]]] = deque()
        self._tried = 0

    def add(self, tried: int, bad: Sequence[tuple[str, str, str]]) -> None:
        """Books one batch: samples tried, and (cause, shard, message) of each bad one."""
        self._recent.append((tried, [(cause, shard) for cause, shard, _ in bad]))
        self._tried += tried
        while len(self._recent) > 1 and self._tried - self._recent[0][0] >= WINDOW:
            self._tried -= self._recent.popleft()[0]
        for cause, shard, message in bad:
            self.by_cause[cause] += 1
            self.by_shard[shard] += 1
            total = self.by_cause.total()
            if total == 1 or total % LOG_EVERY == 0:
                logger.warning("bad sample no. %d (%s) in %s: %s", total, cause, *map(one_line, (shard, message)))

    def check(self) -> None:
        """Raises BadDataError if the recent share of bad samples exceeds the allowed fraction."""
        bad = [entry for _, entries in self._recent for entry in entries]
        if exceeds(len(bad), self._tried, self.max_fraction):
            causes, shards = Counter(cause for cause, _ in bad), Counter(shard for _, shard in bad)
            raise _error(len(bad), self._tried, self.max_fraction, causes, shards, "the last samples tried")


def check_excluded(
    num_samples: int, causes: Mapping[str, int], excluded_by_shard: Mapping[str, int], max_fraction: float
) -> None:
    """Raises BadDataError if an index had to leave out more than the allowed fraction of what it saw."""
    bad = sum(excluded_by_shard.values())
    if exceeds(bad, bad + num_samples, max_fraction):
        shards = Counter(excluded_by_shard)
        raise _error(bad, bad + num_samples, max_fraction, Counter(causes), shards, "the indexed samples")


def exceeds(bad: int, tried: int, max_fraction: float) -> bool:
    """The rule: enough bad ones to judge, and a share above the allowed one."""
    return bad >= (1 if max_fraction == 0 else MIN_BAD) and bad > max_fraction * tried


def one_line(text: str) -> str:
    """Text that data had a part in (keys, what a parser quotes), bounded and without line breaks or escape codes."""
    text = text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _error(bad: int, tried: int, allowed: float, causes: Counter[str], shards: Counter[str], what: str) -> BadDataError:
    reasons = ", ".join(f"{cause} {count}" for cause, count in causes.most_common())
    worst, count = shards.most_common(1)[0]
    worst = one_line(worst)
    return BadDataError(
        f"{bad} of {tried} of {what} are bad ({bad / tried:.1%}, allowed {allowed:.1%}): {reasons}; "
        f"worst shard {worst} ({count}). Repair or leave out that shard, or allow more with max_bad_fraction."
    )
