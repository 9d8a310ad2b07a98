"""What the picture of `farl.data check` shows: some samples as they are, and bad ones of every cause."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from farl.data.probe import Facts, Prober
from farl.report.shards import BAD_CELLS, GOOD_CELLS, Cell, draw_shards
from farl_engine.data import BadImage, CpuDecoder, CropPlan, ShardIndex
from farl_engine.data.samples import decode_caption

_SIDE = 224
# The central crop of this plan is the whole image.
_WHOLE = CropPlan(scale=(1.0, 1.0), ratio=(1e-4, 1e4), flip=0.0, jpeg_grid=False)
# How far to look for a good sample in place of a bad one.
_TRIES = 5


def draw_sheet(
    index: ShardIndex,
    figures: dict[str, Any],
    examples: Mapping[str, Sequence[int]],
    positions: Sequence[int] | np.ndarray[Any, Any],
    path: str | Path,
) -> Path:
    """Draws `figures` of `farl.data.check` and the samples to a PNG.

    Args:
        examples: cause -> positions of bad samples.
        positions: of the samples that were looked at; those shown lie at equal distances among them.
    """
    prober, decoder = Prober(index, decode=True), CpuDecoder(_SIDE)
    good, count = [], min(GOOD_CELLS, len(positions))
    for k in range(count):
        first, last = k * len(positions) // count, (k + 1) * len(positions) // count
        tries = (int(positions[at]) for at in range((first + last) // 2, min((first + last) // 2 + _TRIES, last)))
        found = next(((i, facts) for i in tries if (facts := prober(i)).cause is None), None)
        if found is not None:
            good.append(_good_cell(index, decoder, *found))
    # One of every cause before a second of any.
    turns = sorted((turn, cause) for cause, found in examples.items() for turn in range(len(found)))[:BAD_CELLS]
    bad = [_bad_cell(index, prober, decoder, cause, examples[cause][turn]) for turn, cause in turns]
    return draw_shards(figures, good, bad, path)


def _good_cell(index: ShardIndex, decoder: CpuDecoder, i: int, facts: Facts) -> Cell:
    note = f"{facts.width:,} × {facts.height:,}  {'progressive ' * facts.progressive}{facts.format}"
    return Cell(_picture(decoder, index.read(i)[0], facts.width / facts.height), facts.caption, note)


def _bad_cell(index: ShardIndex, prober: Prober, decoder: CpuDecoder, cause: str, i: int) -> Cell:
    picture, caption = None, ""
    try:
        image, raw_caption = index.read(i)
        caption, _ = decode_caption(raw_caption)
        picture = _picture(decoder, image, None)
    except (OSError, BadImage):
        pass
    where = f"{index.shard_names[index.shard_of(i)]}: {index.key(i)}"
    return Cell(picture, prober(i).message, where, cause.replace("_", " "), caption)


def _picture(decoder: CpuDecoder, image: bytes, shape: float | None) -> np.ndarray[Any, Any]:
    """The whole picture, uint8 [h, w, 3] with the longer side `_SIDE`; square where its shape is not known."""
    square = decoder.decode(image, _WHOLE)[0]
    if shape is None:
        return square
    size = (_SIDE, max(1, round(_SIDE / shape))) if shape >= 1 else (max(1, round(_SIDE * shape)), _SIDE)
    return np.asarray(Image.fromarray(square).resize(size, Image.Resampling.BICUBIC))
