"""Pairs of an index as they are and in order: the centre of each image, its caption; nothing is replaced."""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from farl_engine.data import BadImage
from farl_engine.data.samples import decode_caption

BATCHES_AHEAD = 2

Pixels = NDArray[np.uint8]


@dataclass
class PairBatch:
    """The readable pairs of a batch (n of them) and what was wrong with the others.

    Attributes:
        positions: sample ids in the index.
        images: uint8 [n, S, S, 3]. token_images: uint8 [n, T, T, 3] where the decoder makes them.
        captions: n texts; empty texts where captions were not asked for.
        bad: samples left out, by cause.
    """

    positions: list[int]
    images: Tensor
    token_images: Tensor | None
    captions: list[str]
    bad: Counter[str]


@contextlib.contextmanager
def read_batches(
    index: Any, batches: Sequence[Tensor], decoder: Any, *, threads: int = 2, with_captions: bool = True
) -> Iterator[Iterator[PairBatch]]:
    """An iterator over `batches` (int64 positions each), decoded ahead by threads that end with the context.

    Args:
        index: a `ShardIndex`; decoder: a `CpuDecoder`.
        with_captions: a pair without a caption is bad; else captions are not looked at.
    """
    pool = ThreadPoolExecutor(max(1, threads), thread_name_prefix="evaluation")
    try:
        yield _in_order(pool, index, batches, decoder, with_captions)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(
    pool: ThreadPoolExecutor, index: Any, batches: Sequence[Tensor], decoder: Any, with_captions: bool
) -> Iterator[PairBatch]:
    ahead: deque[tuple[list[int], list[Future[tuple[Pixels, Pixels | None, str] | str]]]] = deque()
    for number in range(len(batches) + BATCHES_AHEAD):
        if number < len(batches):
            positions = batches[number].tolist()
            ahead.append((positions, [pool.submit(_read, index, decoder, i, with_captions) for i in positions]))
        if number >= BATCHES_AHEAD:
            positions, futures = ahead.popleft()
            yield _collect(positions, [future.result() for future in futures], decoder.image_size)


def _read(index: Any, decoder: Any, position: int, with_captions: bool) -> tuple[Pixels, Pixels | None, str] | str:
    """Picture, token picture and caption, or the cause why not."""
    try:
        content, caption_bytes = index.read(position)
        caption = decode_caption(caption_bytes)[0] if with_captions else ""
        if with_captions and not caption:
            return "missing_caption"
        image, token_image = decoder.decode(content)
    except BadImage as error:
        return error.cause
    except OSError:
        return "unreadable"
    return image, token_image, caption


def _collect(
    positions: Sequence[int], results: Sequence[tuple[Pixels, Pixels | None, str] | str], size: int
) -> PairBatch:
    good = [(i, result) for i, result in zip(positions, results, strict=True) if not isinstance(result, str)]
    images = np.stack([image for _, (image, _, _) in good]) if good else np.empty((0, size, size, 3), np.uint8)
    tokens = [token_image for _, (_, token_image, _) in good if token_image is not None]
    return PairBatch(
        positions=[i for i, _ in good],
        images=torch.from_numpy(images),
        token_images=torch.from_numpy(np.stack(tokens)) if tokens else None,
        captions=[caption for _, (_, _, caption) in good],
        bad=Counter(result for result in results if isinstance(result, str)),
    )
