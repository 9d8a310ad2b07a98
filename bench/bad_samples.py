"""What 1 % of bad samples costs the loader: the same photographs with and without them, in turns.

``python -m bench.bad_samples`` prints JSON: the ratio of pictures a second (bad set / clean set) with the smallest and
largest of seven rounds, the extra decodes and the counts by cause. It checks first that batches are full and the
counts exact.
"""

from __future__ import annotations

import io
import itertools
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import machine
from bench.interleaved import Ratio, take_turns
from bench.photographs import made_photograph
from farl_engine.data import Batch, CpuDecoder, CropPlan, Loader, SampleOrder, ShardIndex, write_shards

SAMPLES, BATCH, BATCHES, THREADS = 1000, 100, 10, 2
# One of a hundred, by cause.
CAUSES = ("not_an_image", "truncated", "corrupt", "missing_caption")
BAD = SAMPLES // 100


def write_sets(folder: Path) -> tuple[Path, Path]:
    """A clean set, and the same with every hundredth sample spoiled."""
    rng, images = np.random.default_rng(0), []
    for _ in range(64):
        buffer = io.BytesIO()
        made_photograph(rng, 250, 250).save(buffer, "JPEG", quality=90)
        images.append(buffer.getvalue())
    clean = [{"key": f"{i:06d}", "image": images[i % 64], "caption": f"photograph {i}"} for i in range(SAMPLES)]
    bad = [sample if i % 100 else spoiled(sample, CAUSES[i // 100 % 4]) for i, sample in enumerate(clean)]
    return write_shards(clean, folder / "clean-%d.tar")[0], write_shards(bad, folder / "bad-%d.tar")[0]


def spoiled(sample: dict[str, Any], cause: str) -> dict[str, Any]:
    image = sample["image"]
    return (
        sample
        | {
            "not_an_image": {"image": b"<html>404</html>"},
            "truncated": {"image": image[: len(image) // 2]},
            "corrupt": {"image": image[:20] + bytes(500)},
            "missing_caption": {"caption": "\n"},
        }[cause]
    )


def loader(shard: Path, end_step: int | None = None) -> Loader:
    index = ShardIndex.build(shard)
    order = SampleOrder(len(index), BATCH, seed=0)
    return Loader(
        index, order, decoder=CpuDecoder(224), plan=CropPlan(), seed=0, threads=THREADS, prefetch=4, end_step=end_step
    )


def endless(shard: Path) -> Generator[Batch, None, None]:
    with loader(shard) as batches:
        yield from batches


def one_epoch(shard: Path) -> Counter[str]:
    """Failed attempts by cause over an epoch, each a decode that a clean set would not need."""
    with loader(shard, SAMPLES // BATCH) as batches:
        sizes = [len(batch.captions) for batch in batches]
    if sizes != [BATCH] * (SAMPLES // BATCH):
        raise RuntimeError(f"batches are not full: {sizes}")
    return Counter(batches.bad_samples)


def measured() -> dict[str, Any]:
    torch.set_num_threads(1)
    # The first bad sample of each loader is logged, and each turn has a loader of its own.
    logging.getLogger("farl_engine.data").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        clean, bad = write_sets(Path(folder))
        counts, expected = one_epoch(bad), Counter(itertools.islice(itertools.cycle(CAUSES), BAD))
        # A stand-in may be bad itself, and then counts as well.
        if one_epoch(clean) or not counts >= expected or counts.total() > BAD + 2:
            raise RuntimeError(f"counts are {dict(counts)}, wanted {dict(expected)}")
        times = take_turns({"clean": lambda: endless(clean), "bad": lambda: endless(bad)}, BATCHES)
    ratio = Ratio.of(times["clean"], times["bad"])
    return {
        "throughput_ratio": ratio.median,
        "low": ratio.low,
        "high": ratio.high,
        "rounds": len(times["bad"]),
        "extra_decodes": counts.total() / SAMPLES,
        "bad_samples": dict(counts),
        "pictures_per_second": BATCH / float(np.median(times["bad"])),
        "machine": machine.describe(),
    }


if __name__ == "__main__":
    print(json.dumps(measured(), indent=1))
