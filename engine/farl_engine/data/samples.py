"""From a sample's id to its picture and caption, with the rule for bad ones: a pure function of (seed, id, view)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from farl_engine.data.augment import CropPlan
from farl_engine.data.bad_data import BadDataError, BadImage
from farl_engine.data.counter_rng import combine

MAX_REPLACEMENTS = 20
_REPLACEMENT = 0x5EED


class Source(Protocol):
    """What the loader needs of a `ShardIndex`."""

    shard_names: list[str]
    problems: dict[str, int]
    excluded_by_shard: dict[str, int]

    def __len__(self) -> int: ...
    def read(self, i: int) -> tuple[bytes, bytes]: ...
    def key(self, i: int) -> str: ...
    def shard_of(self, i: int) -> int: ...


class Decoder(Protocol):
    """What the loader needs of a `CpuDecoder`."""

    @property
    def image_size(self) -> int: ...
    @property
    def token_size(self) -> int | None: ...
    def decode(
        self, data: bytes, plan: CropPlan, parameters: NDArray[np.float64] | None
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]: ...


class BadSample(NamedTuple):
    """One failed attempt: its cause, the shard's name, and a line that names the sample."""

    cause: str
    shard: str
    message: str


@dataclass
class Tally:
    """What making some samples cost and met; one a task, so that threads share nothing."""

    read_seconds: float = 0.0
    decode_seconds: float = 0.0
    tried: int = 0
    repaired: int = 0
    bad: list[BadSample] = field(default_factory=list)


def replacement(seed: int, sample_id: int, attempt: int, num_samples: int) -> int:
    """The sample that stands in for `sample_id` after `attempt` + 1 failures: a hash of (seed, id, attempt)."""
    return int(combine(seed, _REPLACEMENT, sample_id, attempt)) % num_samples


def decode_caption(content: bytes) -> tuple[str, bool]:
    """Caption text without surrounding blanks, and whether it had to be repaired.

    Captions are UTF-8 (a byte order mark is dropped). Where they are not, each invalid sequence becomes U+FFFD.
    """
    try:
        return content.decode("utf-8-sig").strip(), False
    except UnicodeDecodeError:
        return content.decode("utf-8-sig", errors="replace").strip(), True


class _MissingCaptionError(Exception):
    """A caption of nothing but blanks."""


class SampleMaker:
    """Reads, decodes and where necessary replaces samples; safe to share between threads."""

    def __init__(self, source: Source, decoder: Decoder, plan: CropPlan, seed: int) -> None:
        self._source = source
        self._decoder = decoder
        self._plan = plan
        self._seed = seed

    def parameters(self, ids: NDArray[np.int64], views: NDArray[np.int64]) -> NDArray[np.float64]:
        """The plan's numbers of several samples at once, float64 [n, K]."""
        return self._plan.parameters(self._seed, ids, views)

    def make(
        self, sample_id: int, view: int, parameters: NDArray[np.float64], tally: Tally, note: Callable[[str, int], None]
    ) -> tuple[int, NDArray[np.uint8], NDArray[np.uint8] | None, str]:
        """The id that was used, its picture, token picture and caption; `tally` takes the counts and times.

        `note(stage, id)` is told what happens next, for the message about a stall.

        Raises:
            BadDataError: 20 samples in a row were bad.
        """
        used = sample_id
        for attempt in range(MAX_REPLACEMENTS + 1):
            tally.tried += 1
            try:
                return used, *self._make_once(used, parameters, tally, note)
            except BadImage as error:
                cause, message = error.cause, str(error)
            except _MissingCaptionError:
                cause, message = "missing_caption", "the caption is empty"
            except OSError as error:
                cause, message = "unreadable", str(error)
            bad = used
            used = replacement(self._seed, sample_id, attempt, len(self._source))
            shard = self._source.shard_names[self._source.shard_of(bad)]
            message = f"sample {bad} (key {self._source.key(bad)}): {message}; sample {used} takes its place"
            tally.bad.append(BadSample(cause, shard, message))
            parameters = self.parameters(np.array([used]), np.array([view]))[0]
        last = tally.bad[-1]
        raise BadDataError(
            f"sample {sample_id} and {MAX_REPLACEMENTS} replacements in a row were bad, the last one: "
            f"{last.cause} in {last.shard}: {last.message}"
        )

    def _make_once(
        self, sample_id: int, parameters: NDArray[np.float64], tally: Tally, note: Callable[[str, int], None]
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None, str]:
        start = time.perf_counter()
        note("read", sample_id)
        try:
            image_bytes, caption_bytes = self._source.read(sample_id)
        finally:
            read = time.perf_counter()
            tally.read_seconds += read - start
        note("decode", sample_id)
        try:
            caption, repaired = decode_caption(caption_bytes)
            if not caption:
                raise _MissingCaptionError
            image, tokens = self._decoder.decode(image_bytes, self._plan, parameters)
        finally:
            tally.decode_seconds += time.perf_counter() - read
        tally.repaired += repaired
        return image, tokens, caption
