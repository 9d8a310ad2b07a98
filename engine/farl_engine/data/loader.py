"""Batches in step order, made by threads whose timing never shows in them.

Each batch is cut into chunks; threads take chunks in order, at most `prefetch` batches ahead of the consumer, and
write into the batch's own arrays. What is in a batch depends on (seed, order, step, rank, world size) alone.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from farl_engine.data.augment import CropPlan
from farl_engine.data.bad_data import BadSampleLedger, check_excluded
from farl_engine.data.samples import BadSample, Decoder, SampleMaker, Source, Tally
from farl_engine.data.workers import BatchJob, Workers

# Small enough that all threads work on one batch, large enough that taking a chunk costs nothing beside making it.
_CHUNK = 16

TextTransform = Callable[[list[str]], Any]


class Order(Protocol):
    """What the loader needs of a `SampleOrder` or `MixedOrder`."""

    num_samples: int
    global_batch: int

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
    """

    step: int
    ids: torch.Tensor
    used_ids: torch.Tensor
    views: torch.Tensor
    images: torch.Tensor
    token_images: torch.Tensor | None
    captions: list[str]
    text: Any = None

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
        decoder: makes pictures of bytes, a `CpuDecoder`.
        plan: crop, flip and jitter.
        seed: of augmentation and replacement.
        rank, world_size: rank r takes ids [r * n, (r + 1) * n) of a step, n = global_batch / world_size.
        text_transform: called with a batch's captions in a loader thread, e.g. to tokenize and pack.
        threads: number of threads; 0 makes batches in the consumer's own thread.
        prefetch: batches made ahead of the consumer, at most.
        max_bad_fraction: see `check_bad`.
        device: where batches are handed out; None leaves them in ordinary CPU memory.
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
        plan: CropPlan,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        text_transform: TextTransform | None = None,
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
        self._threads = threads
        self._prefetch = prefetch
        self._device = None if device is None else torch.device(device)
        self._stall_timeout = stall_timeout
        self._ledger = BadSampleLedger(max_bad_fraction)
        self._times: Counter[str] = Counter()
        self._times_lock = threading.Lock()
        self._workers: Workers | None = None

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        workers = Workers(
            self._start_batch,
            first_step=self.start_step,
            end_step=self.end_step,
            threads=self._threads,
            prefetch=self._prefetch,
            stall_timeout=self._stall_timeout,
        )
        self._workers = workers
        return self._batches(workers)

    def _batches(self, workers: Workers) -> Iterator[Batch]:
        try:
            while True:
                start = time.perf_counter()
                job = workers.next()
                if job is None:
                    return
                assert isinstance(job, _BatchInProgress)
                self._book(job, time.perf_counter() - start)
                batch = job.batch
                yield batch if self._device is None else batch.to(self._device)
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
            Seconds in "read", "decode" and "text" (summed over threads) and in "wait_for_batch" (the consumer's), and
            "queue_depth", the batches that are ready now.
        """
        with self._times_lock:
            times, self._times = self._times, Counter()
        stages = {stage: float(times[stage]) for stage in ("read", "decode", "text", "wait_for_batch")}
        return {**stages, "queue_depth": float(self._workers.ready_count if self._workers else 0)}

    def _add_times(self, **seconds: float) -> None:
        with self._times_lock:
            self._times.update(seconds)

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
    """A batch that threads fill chunk by chunk."""

    def __init__(self, loader: Loader, step: int) -> None:
        n, size, token_size = loader.batch_size, loader._decoder.image_size, loader._decoder.token_size
        chunks = [slice(start, min(start + _CHUNK, n)) for start in range(0, n, _CHUNK)]
        super().__init__(step, len(chunks))
        self._loader = loader
        self._chunks = chunks
        self._ids = loader.order.ids(step)[loader._slice]
        self._views = loader.order.views(step)[loader._slice]
        self._used = np.empty_like(self._ids)
        self._captions = [""] * n
        self._parameters = loader._maker.parameters(self._ids, self._views)
        pin = loader._device is not None and loader._device.type == "cuda"
        self._images = torch.empty(n, size, size, 3, dtype=torch.uint8, pin_memory=pin)
        self._token_images = None
        if token_size is not None:
            self._token_images = torch.empty(n, token_size, token_size, 3, dtype=torch.uint8, pin_memory=pin)
        self._pin = pin
        self.tallies = [Tally() for _ in chunks]

    def run_chunk(self, number: int, note: Callable[[str, int], None]) -> None:
        tally = self.tallies[number]
        images = self._images.numpy()
        token_images = None if self._token_images is None else self._token_images.numpy()
        for i in range(self._chunks[number].start, self._chunks[number].stop):
            used, image, tokens, caption = self._loader._maker.make(
                int(self._ids[i]), int(self._views[i]), self._parameters[i], tally, note
            )
            self._used[i], images[i], self._captions[i] = used, image, caption
            if token_images is not None:
                token_images[i] = tokens
        self._loader._add_times(read=tally.read_seconds, decode=tally.decode_seconds)

    def finish(self, note: Callable[[str, int], None]) -> None:
        start = time.perf_counter()
        note("text", self.step)
        transform = self._loader._text_transform
        ids, used, views = (torch.from_numpy(array.copy()) for array in (self._ids, self._used, self._views))
        text = None if transform is None else transform(self._captions)
        batch = Batch(self.step, ids, used, views, self._images, self._token_images, self._captions, text)
        self.batch = batch.pin_memory() if self._pin else batch
        self._loader._add_times(text=time.perf_counter() - start)
