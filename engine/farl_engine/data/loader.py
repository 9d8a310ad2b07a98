"""Batches in step order, made by threads whose timing never shows in them.

Each batch is cut into chunks; threads take chunks in order, at most `prefetch` batches ahead of the consumer, and
decode into the batch's own arrays. A decoder of whole batches gets them one stage later, in a thread of its own, and
writes into memory of its device. What is in a batch depends on (seed, order, step, rank, world size) alone.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from farl_engine.data.augment import Plan
from farl_engine.data.bad_data import BadSampleLedger, check_excluded
from farl_engine.data.decode_stage import DecodeStage, Session
from farl_engine.data.samples import BadSample, BatchDecoder, Decoder, SampleMaker, Source, Tally
from farl_engine.data.workers import BatchJob, Workers
from farl_engine.profiler import part

# Small enough that all threads work on one batch, large enough that taking a chunk costs nothing beside making it.
_CHUNK = 16

TextTransform = Callable[[list[str]], Any]
VisualTokens = Callable[[NDArray[np.int64], NDArray[np.int64]], torch.Tensor]


class Order(Protocol):
    """What the loader needs of a `SampleOrder` or `MixedOrder`."""

    @property
    def num_samples(self) -> int: ...
    @property
    def global_batch(self) -> int: ...
    def ids(self, step: int) -> NDArray[np.int64]: ...
    def views(self, step: int) -> NDArray[np.int64]: ...


@dataclass
class Batch:
    """This rank's n samples of one step.

    Attributes:
        step: the step they belong to.
        ids: int64 [n], as the order says.
        used_ids: int64 [n], the same but for bad samples, which others replace.
        views: int64 [n].
        images: uint8 [n, S, S, 3].
        token_images: uint8 [n, T, T, 3], or None without a token size.
        captions: n strings.
        text: what `text_transform` made of the captions, or None.
        visual_tokens: what `visual_tokens` gave for the used ids and the views, or None.
    """

    step: int
    ids: torch.Tensor
    used_ids: torch.Tensor
    views: torch.Tensor
    images: torch.Tensor
    token_images: torch.Tensor | None
    captions: list[str]
    text: Any = None
    visual_tokens: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The batch with every tensor on `device`; copies from pinned memory do not wait for their end."""
        return self._mapped(lambda value: value.to(device, non_blocking=True), "to")

    def pin_memory(self) -> Batch:
        """The batch with every tensor in page-locked memory."""
        return self._mapped(lambda value: value.pin_memory(), "pin_memory")

    def _mapped(self, function: Callable[[Any], Any], method: str) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: function(value) for name, value in values.items() if hasattr(value, method)})


class Loader:
    """Iterates over this rank's batches from `start_step` on; endless without `end_step`.

    `iter(loader)` starts the threads; they end with the iteration, with `close()`, or on leaving a `with` block.

    Args:
        index: where samples are read from, a `ShardIndex`.
        order: which samples a step takes; of as many samples as the index has.
        decoder: makes pictures of bytes, a `CpuDecoder` or `DaliDecoder`; ids, causes and counts are the same.
        plan: crop, flip and jitter.
        seed: of augmentation and replacement.
        rank, world_size: rank r takes ids [r * n, (r + 1) * n) of a step, n = global_batch / world_size.
        text_transform: called with a batch's captions in a loader thread, e.g. to tokenize and pack.
        visual_tokens: called with a batch's used ids and views (int64 [n] each) in a loader thread, for tokens that
            were made before.
        threads: number of threads; 0 makes batches in the consumer's own thread.
        prefetch: batches made ahead of the consumer, at most.
        max_bad_fraction: see `check_bad`.
        device: where batches are handed out; None leaves them in ordinary CPU memory. A decoder on a GPU wants the
            same one.
        start_step, end_step: first step, and the step before which to stop.
        stall_timeout: seconds without a batch after which stacks are dumped and TimeoutError is raised.

    Raises:
        ValueError: arguments that do not fit together.
    """

    def __init__(
        self,
        index: Source,
        order: Order,
        *,
        decoder: Decoder,
        plan: Plan,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        text_transform: TextTransform | None = None,
        visual_tokens: VisualTokens | None = None,
        threads: int = 2,
        prefetch: int = 3,
        max_bad_fraction: float = 0.05,
        device: torch.device | str | None = None,
        start_step: int = 0,
        end_step: int | None = None,
        stall_timeout: float = 300.0,
    ) -> None:
        if order.num_samples != len(index):
            raise ValueError(f"order is of {order.num_samples} samples, but the index has {len(index)}")
        if order.global_batch % world_size:
            raise ValueError(
                f"global batch {order.global_batch} is not divisible by the world size {world_size}: "
                f"take a multiple of {world_size}"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0..{world_size - 1}, got {rank}")
        for name, value, least in (("threads", threads, 0), ("prefetch", prefetch, 1), ("start_step", start_step, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if stall_timeout <= 0:
            raise ValueError(f"stall_timeout must be above 0 seconds, got {stall_timeout}")
        self._device = None if device is None else torch.device(device)
        self._batch_decoder = decoder if isinstance(decoder, BatchDecoder) else None
        if self._batch_decoder is not None and self._batch_decoder.device.type == "cuda":
            wanted = self._batch_decoder.device.type
            if self._device is None or self._device.type != wanted:
                raise ValueError(f"the decoder is on {self._batch_decoder.device}, so device must be too, got {device}")
        self.index = index
        self.order = order
        self.batch_size = order.global_batch // world_size
        self.start_step = start_step
        self.end_step = end_step
        self.samples_seen = 0
        self.repaired_captions = 0
        self._slice = slice(rank * self.batch_size, (rank + 1) * self.batch_size)
        self._decoder = decoder
        self._maker = SampleMaker(index, decoder, plan, seed)
        self._text_transform = text_transform
        self._visual_tokens = visual_tokens
        self._threads = threads
        self._prefetch = prefetch
        self._stall_timeout = stall_timeout
        self._ledger = BadSampleLedger(max_bad_fraction)
        self._times: defaultdict[str, float] = defaultdict(float)
        self._times_lock = threading.Lock()
        self._workers: Workers | None = None
        self._stage: DecodeStage | None = None
        self._stage_seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        if self._batch_decoder is not None:
            self._stage, self._stage_seconds = DecodeStage(self._batch_decoder.open(self.batch_size)), 0.0
        workers = Workers(
            self._start_batch,
            first_step=self.start_step,
            end_step=self.end_step,
            threads=self._threads,
            prefetch=self._prefetch,
            stall_timeout=self._stall_timeout,
            stage=self._stage,
        )
        self._workers = workers
        return self._batches(workers)

    def _batches(self, workers: Workers) -> Iterator[Batch]:
        try:
            while True:
                ready, start = workers.ready_count, time.perf_counter()
                job = workers.next()
                if job is None:
                    return
                assert isinstance(job, _BatchInProgress)
                self._book(job, time.perf_counter() - start)
                self._add_times(ready=ready, batches=1)
                batch = job.batch()
                if self._device is not None:
                    with part("copy to device"):
                        batch = batch.to(self._device)
                yield batch
        finally:
            workers.close()

    def close(self) -> None:
        """Ends the threads and the iteration; calling it again does nothing."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def error(self) -> BaseException | None:
        """What a thread has met, ahead of the iteration, which raises it once it runs out of batches made before."""
        return self._workers.error if self._workers else None

    @property
    def bad_samples(self) -> dict[str, int]:
        """Failed attempts by cause, over the batches handed out so far."""
        return dict(self._ledger.by_cause)

    @property
    def bad_by_shard(self) -> dict[str, int]:
        """Failed attempts by shard name."""
        return dict(self._ledger.by_shard)

    def check_bad(self) -> None:
        """Raises BadDataError when too many samples are bad, naming the fraction, the causes and the worst shard.

        That is when their share exceeds `max_bad_fraction` among the last 10,000 samples tried, or among all that the
        index saw (those it left out); and at least 20 are bad, or any if the fraction is 0.
        """
        index = self.index
        check_excluded(len(index), index.problems, index.excluded_by_shard, self._ledger.max_fraction)
        self._ledger.check()

    def stage_times(self) -> dict[str, float]:
        """Where the time went since the last call.

        Returns:
            Seconds in "read", "decode" and "text" (summed over threads), in "device_decode" (decoding of whole batches)
            and in "wait_for_batch" (the consumer's); "queue_depth", the batches that are ready now, and
            "mean_queue_depth", those that were when one was asked for; and "threads".
        """
        with self._times_lock:
            times, self._times = self._times, defaultdict(float)
        if self._stage is not None:
            before, self._stage_seconds = self._stage_seconds, self._stage.seconds
            times["device_decode"] = self._stage_seconds - before
        stages = ("read", "decode", "text", "device_decode", "wait_for_batch")
        return {stage: times[stage] for stage in stages} | {
            "queue_depth": float(self._workers.ready_count if self._workers else 0),
            "mean_queue_depth": times["ready"] / max(times["batches"], 1),
            "threads": float(self._threads),
        }

    def _add_times(self, **seconds: float) -> None:
        with self._times_lock:
            for stage, value in seconds.items():
                self._times[stage] += value

    def _book(self, job: _BatchInProgress, waited: float) -> None:
        self._add_times(wait_for_batch=waited)
        bad: list[BadSample] = []
        for tally in job.tallies:
            bad += tally.bad
            self.repaired_captions += tally.repaired
        self._ledger.add(sum(tally.tried for tally in job.tallies), bad)
        self.samples_seen += self.batch_size

    def _start_batch(self, step: int) -> BatchJob:
        return _BatchInProgress(self, step)


class _BatchInProgress(BatchJob):
    """A batch that threads fill chunk by chunk, and the decode stage, if there is one, to the end.

    Attributes:
        encoded: what the decode stage has to decode, by row.
        images, token_images: of the `Batch`; None until the decode stage has made room for them.
        tallies: one a sample.
    """

    def __init__(self, loader: Loader, step: int) -> None:
        n = loader.batch_size
        chunks = [slice(start, min(start + _CHUNK, n)) for start in range(0, n, _CHUNK)]
        super().__init__(step, len(chunks))
        self._loader = loader
        self._chunks = chunks
        self._ids = loader.order.ids(step)[loader._slice]
        self._views = loader.order.views(step)[loader._slice]
        self._used = np.empty_like(self._ids)
        self._captions = [""] * n
        self._parameters = loader._maker.parameters(self._ids, self._views)
        self._pin = loader._device is not None and loader._device.type == "cuda"
        self._numbers: list[torch.Tensor] = []
        self._text: Any = None
        self._visual_tokens: torch.Tensor | None = None
        self._replaced_late = False
        self.encoded: dict[int, Any] = {}
        self._decoded_alone: dict[int, tuple[NDArray[np.uint8], NDArray[np.uint8] | None]] = {}
        self.images: torch.Tensor | None = None
        self.token_images: torch.Tensor | None = None
        if loader._batch_decoder is None:
            self.images = self._empty(loader._decoder.image_size)
            if loader._decoder.token_size is not None:
                self.token_images = self._empty(loader._decoder.token_size)
        self.tallies = [Tally() for _ in range(n)]

    def run_chunk(self, number: int, note: Callable[[str, int], None]) -> None:
        rows = self._chunks[number]
        for row in range(rows.start, rows.stop):
            self._make(row, note)
        self._loader._add_times(
            read=sum(tally.read_seconds for tally in self.tallies[rows]),
            decode=sum(tally.decode_seconds for tally in self.tallies[rows]),
        )

    def finish(self, note: Callable[[str, int], None]) -> None:
        note("text", self.step)
        loader, start = self._loader, time.perf_counter()
        self._numbers = [self._pinned(torch.from_numpy(a.copy())) for a in (self._ids, self._used, self._views)]
        if loader._text_transform is not None:
            self._text = self._pinned(loader._text_transform(self._captions))
        texts_made = time.perf_counter()
        if loader._visual_tokens is not None:
            note("visual_tokens", self.step)
            self._visual_tokens = self._pinned(loader._visual_tokens(self._used, self._views))
        loader._add_times(text=texts_made - start, read=time.perf_counter() - texts_made)

    def begin(self, session: Session) -> None:
        self.images, self.token_images = session.empty(len(self._ids), pin=self._pin)

    def refuse(self, row: int, note: Callable[[str, int], None]) -> None:
        before = self._used[row]
        del self.encoded[row]
        self._make(row, note, refused=True)
        self._replaced_late |= bool(before != self._used[row])

    def complete(self, session: Session, note: Callable[[str, int], None]) -> None:
        assert self.images is not None
        if self._decoded_alone:
            rows, pictures = zip(*sorted(self._decoded_alone.items()), strict=True)
            session.fill(rows, pictures, self.images, self.token_images)
        session.synchronize()
        self.encoded, self._decoded_alone = {}, {}
        if self._replaced_late:
            self.finish(note)

    def batch(self) -> Batch:
        """The finished batch, for the consumer's stream."""
        assert self.images is not None
        for images in (self.images, self.token_images):
            if images is not None and images.is_cuda:
                # It was made on another stream, to which its memory must not return too early.
                images.record_stream(torch.cuda.current_stream(images.device))
        ids, used, views = self._numbers
        return Batch(
            self.step,
            ids,
            used,
            views,
            self.images,
            self.token_images,
            self._captions,
            self._text,
            self._visual_tokens,
        )

    def _make(self, row: int, note: Callable[[str, int], None], *, refused: bool = False) -> None:
        tally = self.tallies[row] = Tally()
        ids = int(self._ids[row]), int(self._views[row])
        place = partial(self._place, row)
        made = self._loader._maker.make(*ids, self._parameters[row], place, tally, note, refused=refused)
        self._used[row], self._captions[row] = made.used, made.caption
        if made.encoded is not None:
            self.encoded[row] = made.encoded

    def _place(self, row: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
        """Where the CPU decoder puts the picture of a row: into the batch, or beside what the stage decodes."""
        decoder = self._loader._decoder
        if self._loader._batch_decoder is None:
            assert self.images is not None
            return self.images[row].numpy(), None if self.token_images is None else self.token_images[row].numpy()
        sizes = decoder.image_size, decoder.token_size
        image, tokens = (None if size is None else np.empty((size, size, 3), np.uint8) for size in sizes)
        assert image is not None
        self._decoded_alone[row] = image, tokens
        return image, tokens

    def _empty(self, size: int) -> torch.Tensor:
        return torch.empty(len(self._ids), size, size, 3, dtype=torch.uint8, pin_memory=self._pin)

    def _pinned(self, value: Any) -> Any:
        return value.pin_memory() if self._pin and hasattr(value, "pin_memory") else value
