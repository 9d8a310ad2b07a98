"""Memory over many epochs: what one epoch needs is all that twenty need."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

from farl_engine.data import CpuDecoder, CropPlan, Loader, SampleOrder, ShardIndex

BATCH = 16


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def mixed_shards(folder: Path, tools, copies: int) -> Path:
    """Every kind of path through the decoder, sizes far apart, and one bad sample in eight."""
    encode, picture, write_tar = tools
    members = []
    for copy in range(copies):
        images = [
            encode(picture(90 + 7 * copy, 80, copy)),
            encode(picture(400, 300, copy)),
            encode(picture(700, 560, copy), progressive=True),
            encode(picture(200, 200, copy), "PNG"),
            encode(picture(120, 160, copy), "WEBP"),
            encode(picture(100, 100, copy).convert("CMYK")),
            encode(picture(300, 300, copy).convert("L")),
            encode(picture(500, 500, copy))[:3000],
        ]
        for number, image in enumerate(images):
            members += [(f"{copy}-{number}.jpg", image), (f"{copy}-{number}.txt", b"caption " * (1 + 9 * number))]
    write_tar(folder / "a.tar", members)
    return folder


def growth(folder: Path, epochs: int, after: int) -> float:
    """Resident memory after `epochs` over that after `after`, minus 1."""
    index = ShardIndex.build(folder)
    # Small batches: how many of them are in flight when the memory is read must not show.
    order, steps = SampleOrder(len(index), BATCH, seed=0), len(index) // BATCH
    decoder, sizes = CpuDecoder(112, token_size=56), []
    options = {"decoder": decoder, "plan": CropPlan(color_jitter=0.1), "seed": 0, "threads": 2, "max_bad_fraction": 1.0}
    with Loader(index, order, end_step=steps * epochs, **options) as loader:
        for step, _ in enumerate(loader, 1):
            if step in (steps * after, steps * epochs):
                sizes.append(resident_bytes())
        assert loader.bad_samples.keys() == {"truncated"}
    return sizes[1] / sizes[0] - 1


def test_twenty_epochs_of_a_small_set(tmp_path, tools):
    assert growth(mixed_shards(tmp_path, tools, 4), 20, 5) <= 0.01


@pytest.mark.slow
def test_twenty_epochs_of_a_larger_set(tmp_path, tools):
    assert growth(mixed_shards(tmp_path, tools, 40), 20, 5) <= 0.01
