"""From a sample's id to its picture and caption, with the rule for bad ones: a pure function of (seed, id, view)."""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from farl_engine.data.augment import Plan
from farl_engine.data.bad_data import BadDataError, BadImage
from farl_engine.data.counter_rng import combine

if TYPE_CHECKING:
    import torch

    from farl_engine.data.decode_stage import Session

MAX_REPLACEMENTS = 20
# Fifty times what the text tower reads: a book for a caption must not hold up the tokenizer.
MAX_CAPTION_CHARACTERS = 4096
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
    def decode_into(
        self,
        data: bytes,
        plan: Plan,
        parameters: NDArray[np.float64] | None,
        image: NDArray[np.uint8],
        tokens: NDArray[np.uint8] | None,
    ) -> None: ...


@runtime_checkable
class BatchDecoder(Protocol):
    """What the loader needs beyond that of a `DaliDecoder`, which decodes whole batches."""

    device: torch.device

    def prepare(self, data: bytes, plan: Plan, parameters: NDArray[np.float64] | None) -> Any | None: ...
    def open(self, batch_size: int) -> Session: ...


# Gives the arrays that take a sample's picture and token picture.
Place = Callable[[], tuple[NDArray[np.uint8], NDArray[np.uint8] | None]]


class BadSample(NamedTuple):
    """One failed attempt: its cause, the shard's name, and a line that names the sample."""

    cause: str
    shard: str
    message: str


@dataclass
class Tally:
    """What making a sample cost and met; one each, so that threads share nothing."""

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

    Captions are UTF-8 (a byte order mark is dropped), or UTF-16 where they begin with its byte order mark. Invalid
    sequences become U+FFFD and NULs blanks. What follows the first MAX_CAPTION_CHARACTERS is cut off.
    """
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    # A character has four bytes at most; one that the cut goes through lies beyond those that are kept.
    head = content[: 4 * MAX_CAPTION_CHARACTERS + 8]
    try:
        text, repaired = codecs.getincrementaldecoder(encoding)().decode(head, final=len(head) == len(content)), False
    except UnicodeDecodeError:
        text, repaired = head.decode(encoding, errors="replace"), True
    if "\0" in text:
        text, repaired = text.replace("\0", " "), True
    return text.strip()[:MAX_CAPTION_CHARACTERS].rstrip(), repaired


class Made(NamedTuple):
    """A sample made: the id that was used, its caption, and what the batch decoder has yet to decode, if anything."""

    used: int
    caption: str
    encoded: Any | None


class _MissingCaptionError(Exception):
    """A caption of nothing but blanks."""


class SampleMaker:
    """Reads, decodes and where necessary replaces samples; safe to share between threads."""

    def __init__(self, source: Source, decoder: Decoder, plan: Plan, seed: int) -> None:
        self._source = source
        self._decoder = decoder
        self._batch_decoder = decoder if isinstance(decoder, BatchDecoder) else None
        self._plan = plan
        self._seed = seed

    def parameters(self, ids: NDArray[np.int64], views: NDArray[np.int64]) -> NDArray[np.float64]:
        """The plan's numbers of several samples at once, float64 [n, K]."""
        return self._plan.parameters(self._seed, ids, views)

    def make(
        self,
        sample_id: int,
        view: int,
        parameters: NDArray[np.float64],
        place: Place,
        tally: Tally,
        note: Callable[[str, int], None],
        *,
        refused: bool = False,
    ) -> Made:
        """Makes one sample: its picture is written into the arrays of `place()`, or left to the batch decoder.

        Args:
            sample_id, view: which one.
            parameters: its row of `parameters`.
            place: called before each decoding, so the last arrays are the ones that hold the picture.
            tally: takes the counts and times.
            note: told (stage, id) of what happens next, for the message about a stall.
            refused: the batch decoder has refused it, so that nothing is left to that.

        Raises:
            BadDataError: 20 samples in a row were bad.
        """
        # Stand-ins are rare, so they do not wait for a batch.
        batch_decoder = None if refused else self._batch_decoder
        used = sample_id
        for attempt in range(MAX_REPLACEMENTS + 1):
            tally.tried += 1
            try:
                return self._make_once(used, parameters, place, tally, note, batch_decoder)
            except BadImage as error:
                cause, message = error.cause, str(error)
            except _MissingCaptionError:
                cause, message = "missing_caption", "the caption is empty"
            except OSError as error:
                cause, message = "unreadable", str(error)
            bad, batch_decoder = used, None
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
        self,
        sample_id: int,
        parameters: NDArray[np.float64],
        place: Place,
        tally: Tally,
        note: Callable[[str, int], None],
        batch_decoder: BatchDecoder | None,
    ) -> Made:
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
            encoded = None
            if batch_decoder is not None:
                encoded = batch_decoder.prepare(image_bytes, self._plan, parameters)
            if encoded is None:
                self._decoder.decode_into(image_bytes, self._plan, parameters, *place())
        finally:
            tally.decode_seconds += time.perf_counter() - read
        tally.repaired += repaired
        return Made(sample_id, caption, encoded)
