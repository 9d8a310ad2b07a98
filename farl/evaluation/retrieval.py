"""Image-text retrieval over pairs with repeated captions, in blocks and over any number of ranks.

Captions that are equal but for case and white space (`farl.evaluation.captions`) are one caption: whatever carries it
is a hit. The rank of a query is

    1 + number of wrong items that score at least as high as the best right item

so a tie with a wrong item counts against the model (a model that maps everything to one point gets 0, not 1), and so
does a score that is not a number. Two ways of counting come out of the same scores:

- over pairs: N image queries among N captions, N caption queries among N images, repeats included;
- over distinct captions: N image queries among U captions, U caption queries among N images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from farl.evaluation.captions import group_captions
from farl.evaluation.features import Features, extract_features, gather_rows, spread_positions

RECALL_AT = (1, 5, 10)
TIES = "a wrong item that scores as high as the best right one is ranked before it"


def image_ranks(images: Tensor, texts: Tensor, groups: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks of the right caption for a block of images.

    Args:
        images: [b, E] and texts: [U, E], L2-normalised; groups: int64 [b], the right row of `texts` for each image;
        sizes: float32 [U], how many pairs carry each caption (exact up to 2**24 pairs).

    Returns:
        int64 [b] over pairs and int64 [b] over distinct captions.
    """
    scores = images @ texts.T
    right = scores.gather(1, groups[:, None])
    # "Not below" rather than "at least": a NaN must lose.
    ahead = (~(scores < right)).scatter_(1, groups[:, None], False)
    return 1 + (ahead.float() @ sizes).long(), 1 + ahead.sum(1)


def text_ranks(texts: Tensor, images: Tensor, groups: Tensor, first_group: int) -> Tensor:
    """Ranks of the best right image for captions first_group .. first_group + b - 1.

    Args:
        texts: [b, E] and images: [N, E], L2-normalised; groups: int64 [N], the caption of each image.

    Returns:
        int64 [b].
    """
    scores = texts @ images.T
    own = torch.arange(first_group, first_group + len(texts), device=texts.device)
    is_right = groups[None, :] == own[:, None]
    right = scores.masked_fill(~is_right, -torch.inf).amax(1, keepdim=True)
    return 1 + (~(scores < right) & ~is_right).sum(1)


def retrieval_figures(
    image_features: Tensor,
    text_features: Tensor,
    digests: Tensor,
    *,
    device: torch.device | str = "cpu",
    chunk_bytes: int = 64 << 20,
    rank: int = 0,
    world_size: int = 1,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Recall and median rank both ways, beside what guessing gives.

    Args:
        image_features, text_features: [N, E], row i of both is pair i, in any scale; the same on every rank.
        digests: int64 [N, 2] from `farl.evaluation.captions.caption_digest`.
        device: where the scores are computed, in blocks of rows of at most `chunk_bytes`; N x N is never stored.
        rank, world_size, group: the blocks are dealt out over the ranks; every rank returns the same figures.

    Returns:
        image_to_text_r1, _r5, _r10, _median_rank, the same for text_to_image, and chance_r1, _r5, _r10 (over pairs);
        `pairs`, `distinct_captions`, `largest_caption_group`; `distinct`: the same figures over distinct
        captions (with a chance a direction); `ties`: the rule. No pairs at all: recalls of 0.

    Raises:
        ValueError: the shapes do not fit together.
    """
    if image_features.shape != text_features.shape or digests.shape != (len(image_features), 2):
        raise ValueError(
            f"image_features {tuple(image_features.shape)}, text_features {tuple(text_features.shape)} and digests "
            f"{tuple(digests.shape)} do not fit; wanted [N, E], [N, E] and [N, 2]"
        )
    groups, first = group_captions(digests.cpu())
    sizes = torch.bincount(groups, minlength=len(first))
    images = F.normalize(image_features.to(device, torch.float32), dim=1)
    texts = F.normalize(text_features.to(device, torch.float32)[first.to(text_features.device)], dim=1)
    # The blocks depend on the data alone, so that every world size multiplies the same matrices.
    image_blocks = _blocks(len(images), len(texts), chunk_bytes)
    text_blocks = _blocks(len(texts), len(images), chunk_bytes)
    on_device = groups.to(device)
    sizes_on_device = sizes.to(device, torch.float32)
    by_image = [
        torch.stack(image_ranks(images[block], texts, on_device[block], sizes_on_device), 1).cpu()
        for block in image_blocks[rank::world_size]
    ]
    by_text = [
        text_ranks(texts[block], images, on_device, block.start)[:, None].cpu()
        for block in text_blocks[rank::world_size]
    ]
    image_rank = _together(by_image, image_blocks, 2, rank, world_size, group)
    text_rank = _together(by_text, text_blocks, 1, rank, world_size, group)[:, 0]

    pairs, distinct = len(groups), len(first)
    figures: dict[str, Any] = {}
    figures |= _direction("image_to_text", image_rank[:, 0])
    figures |= _direction("text_to_image", text_rank[groups])
    figures |= {f"chance_r{k}": _chance(sizes[groups], pairs, k) for k in RECALL_AT}
    figures |= {
        "pairs": pairs,
        "distinct_captions": distinct,
        "largest_caption_group": int(sizes.max()) if pairs else 0,
    }
    figures["distinct"] = {
        **_direction("image_to_text", image_rank[:, 1]),
        **_direction("text_to_image", text_rank),
        **{f"image_to_text_chance_r{k}": _chance(torch.ones_like(groups), distinct, k) for k in RECALL_AT},
        **{f"text_to_image_chance_r{k}": _chance(sizes, pairs, k) for k in RECALL_AT},
    }
    figures["ties"] = TIES
    return figures


def evaluate_retrieval(
    model: Any,
    index: Any,
    tokenizer: Callable[[list[str]], Any],
    device: torch.device | str,
    *,
    rank: int = 0,
    world_size: int = 1,
    group: dist.ProcessGroup | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    max_pairs: int | None = None,
    batch_size: int = 64,
    threads: int = 2,
    autocast: torch.dtype | None = None,
    progress: bool = False,
) -> dict[str, Any] | None:
    """Retrieval on held-out shards, over all ranks of a run.

    Args:
        model: a `FaRL` (not wrapped in DDP); its training mode is restored.
        index: a `ShardIndex`; its samples are taken in order, or `max_pairs` of them at equal distances.
        tokenizer: captions -> `PackedText`, as `farl.tokenizer.pack`.
        rank, world_size, group: batches are dealt out by number, so that a batch holds the same samples, and a feature
            is the same, at every world size. `group` carries CPU tensors unless its backend is NCCL.
        should_stop: asked once a batch and once at the end, equally often on every rank, so it may be
            collective; all ranks must get the same answer.
        autocast: compute dtype, such as `torch.bfloat16`; None computes in the model's own.

    Returns:
        The figures of `retrieval_figures` on every rank, and `bad` {cause: count} of pairs left out because they cannot
        be read; None when `should_stop` said so.
    """
    features = extract_features(
        model,
        index,
        device=device,
        positions=spread_positions(len(index), max_pairs),
        tokenizer=tokenizer,
        batch_size=batch_size,
        threads=threads,
        rank=rank,
        world_size=world_size,
        group=group,
        should_stop=should_stop,
        autocast=autocast,
        progress="evaluate" if progress else None,
    )
    if features is None:
        return None
    return figures_of(features, device=device, rank=rank, world_size=world_size, group=group)


def figures_of(features: Features, **where: Any) -> dict[str, Any]:
    """`retrieval_figures` of extracted features, with the pairs that had to be left out."""
    assert features.text is not None and features.digests is not None
    figures = retrieval_figures(features.image, features.text, features.digests, **where)
    return {**figures, "bad": features.bad}


def _blocks(rows: int, columns: int, chunk_bytes: int) -> list[slice]:
    # A score is 4 bytes, its comparison with the right one about 8 more while it is counted.
    step = max(1, min(rows, chunk_bytes // (12 * max(1, columns))))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _together(
    parts: list[Tensor],
    blocks: Sequence[slice],
    width: int,
    rank: int,
    world_size: int,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """The rows of all blocks in order, from the blocks rank, rank + world_size, ... of each rank."""
    rows = torch.cat([torch.empty(0, width, dtype=torch.int64), *parts])
    if world_size == 1:
        return rows
    gathered = gather_rows(rows, group)
    where = [i for r in range(world_size) for block in blocks[r::world_size] for i in range(block.start, block.stop)]
    ordered = torch.empty_like(gathered)
    ordered[torch.tensor(where, dtype=torch.int64)] = gathered
    return ordered


def _direction(name: str, ranks: Tensor) -> dict[str, float]:
    empty = len(ranks) == 0
    figures = {f"{name}_r{k}": 0.0 if empty else (ranks <= k).double().mean().item() for k in RECALL_AT}
    # The lower of the two middle ranks where their number is even.
    figures[f"{name}_median_rank"] = 0.0 if empty else float(ranks.median())
    return figures


def _chance(right: Tensor, items: int, k: int) -> float:
    """Mean over queries of 1 - C(items - right, k) / C(items, k): at least one right item among k drawn at random."""
    if len(right) == 0:
        return 0.0
    if k >= items:
        return 1.0
    right = right.double()
    miss = torch.ones_like(right)
    for drawn in range(k):
        miss *= ((items - right - drawn) / (items - drawn)).clamp_min(0)
    return (1 - miss).mean().item()
