"""Frozen features of the pairs of an index: decoded at the centre, encoded in batches, gathered over ranks."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from farl.evaluation.captions import caption_digest
from farl.evaluation.pair_reader import read_batches
from farl.progress import Progress
from farl_engine.data import CpuDecoder


@dataclass
class Features:
    """Features of the readable pairs, ascending by position (N of them), all on the CPU.

    Attributes:
        positions: int64 [N], sample ids in the index.
        image: float32 [N, E], as the model gives them (not normalised).
        text: float32 [N, E], or None where only images were encoded.
        digests: int64 [N, 2] of the captions (see `caption_digest`), or None.
        bad: pairs left out, by cause.
    """

    positions: Tensor
    image: Tensor
    text: Tensor | None
    digests: Tensor | None
    bad: dict[str, int] = field(default_factory=dict)


def extract_features(
    model: Any,
    index: Any,
    *,
    device: torch.device | str,
    positions: Tensor | None = None,
    tokenizer: Callable[[list[str]], Any] | None = None,
    batch_size: int = 64,
    threads: int = 2,
    rank: int = 0,
    world_size: int = 1,
    group: dist.ProcessGroup | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    autocast: torch.dtype | None = None,
    progress: str | None = None,
) -> Features | None:
    """Encode pairs of `index` (all, or those at `positions`), the same on every rank.

    Args:
        tokenizer: captions -> `PackedText`; None encodes images alone and asks for no captions.
        batch_size: pairs a forward pass; batch j goes to rank j modulo world_size, so a feature never depends on the
            world size.
        threads: decoding threads of this rank.
        should_stop: asked once before each batch and once at the end, equally often on every rank; if True, None is
            returned.
        progress: the name of a progress bar, or None for silence.
    """
    if positions is None:
        positions = torch.arange(len(index))
    device = torch.device(device)
    batches = list(positions.split(batch_size))
    mine = batches[rank::world_size]
    rounds = -(-len(batches) // world_size)
    with_text = tokenizer is not None
    bad: Counter[str] = Counter()
    kept: list[Tensor] = []
    images: list[Tensor] = []
    texts: list[Tensor] = []
    digests: list[Tensor] = []
    bar = Progress(len(positions), progress, unit="pairs") if progress else contextlib.nullcontext()
    was_training = model.training
    model.eval()
    try:
        decoder = CpuDecoder(model.config.vision.image_size)
        reader = read_batches(index, mine, decoder, threads=threads, with_captions=with_text)
        with torch.no_grad(), bar, reader as read:
            for number in range(rounds):
                if should_stop():
                    return None
                if number >= len(mine):
                    continue  # this rank has no batch in the last round, but asked with the others
                batch = next(read)
                bad += batch.bad
                if isinstance(bar, Progress):
                    bar.update(sum(len(b) for b in batches[number * world_size : (number + 1) * world_size]))
                if not batch.positions:
                    continue
                kept.append(torch.tensor(batch.positions, dtype=torch.int64))
                with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                    images.append(model.encode_image(batch.images.to(device)).float().cpu())
                    if tokenizer is not None:
                        texts.append(model.encode_text_packed(tokenizer(batch.captions).to(device)).float().cpu())
                        digests.append(torch.tensor([caption_digest(caption) for caption in batch.captions]))
        if should_stop():
            return None
    finally:
        model.train(was_training)
    width = model.config.embed_dim
    return _gather(
        torch.cat([torch.empty(0, dtype=torch.int64), *kept]),
        torch.cat([torch.empty(0, width), *images]),
        torch.cat([torch.empty(0, width), *texts]) if with_text else None,
        torch.cat([torch.empty(0, 2, dtype=torch.int64), *digests]) if with_text else None,
        bad,
        world_size,
        group,
    )


def spread_positions(count: int, limit: int | None) -> Tensor:
    """int64 positions of all `count` samples, or of `limit` of them at equal distances, ascending.

    Raises:
        ValueError: `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"max_pairs is {limit}; wanted at least 1, or None for all")
    if limit is None or limit >= count:
        return torch.arange(count)
    return torch.arange(limit) * count // limit


def encode_captions(
    model: Any,
    captions: Sequence[str],
    tokenizer: Callable[[list[str]], Any],
    *,
    device: torch.device | str,
    batch_size: int = 256,
) -> Tensor:
    """Text features of any captions, float32 [len(captions), E] on the CPU (not normalised)."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            parts = [
                model.encode_text_packed(tokenizer(list(captions[i : i + batch_size])).to(device)).float().cpu()
                for i in range(0, len(captions), batch_size)
            ]
    finally:
        model.train(was_training)
    return torch.cat([torch.empty(0, model.config.embed_dim), *parts])


def gather_rows(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The rows of all ranks in rank order; a rank may hold any number of them. CPU tensor in, CPU tensor out."""
    place = torch.device("cuda") if dist.get_backend(group) == "nccl" else torch.device("cpu")
    world_size = dist.get_world_size(group)
    counts = [torch.zeros(1, dtype=torch.int64, device=place) for _ in range(world_size)]
    dist.all_gather(counts, torch.tensor([len(rows)], device=place), group=group)
    most = int(torch.cat(counts).max())
    padded = torch.zeros(most, *rows.shape[1:], dtype=rows.dtype, device=place)
    padded[: len(rows)] = rows.to(place)
    gathered = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(gathered, padded, group=group)
    return torch.cat([part[: int(count)] for part, count in zip(gathered, counts, strict=True)]).cpu()


def _gather(
    positions: Tensor,
    image: Tensor,
    text: Tensor | None,
    digests: Tensor | None,
    bad: Counter[str],
    world_size: int,
    group: dist.ProcessGroup | None,
) -> Features:
    if world_size > 1:
        everywhere: list[Any] = [None] * world_size
        dist.all_gather_object(everywhere, dict(bad), group=group)
        bad = sum((Counter(part) for part in everywhere), Counter())
        positions, image = gather_rows(positions, group), gather_rows(image, group)
        text = None if text is None else gather_rows(text, group)
        digests = None if digests is None else gather_rows(digests, group)
    order = positions.argsort()
    return Features(
        positions[order],
        image[order],
        None if text is None else text[order],
        None if digests is None else digests[order],
        dict(sorted(bad.items())),
    )
