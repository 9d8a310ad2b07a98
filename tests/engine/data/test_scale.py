"""An index of millions of samples: its arrays are made up and written, its shards are empty files of the right size."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from farl_engine.data import SampleOrder, ShardIndex, array_file, index
from farl_engine.data.index_scan import VERSION, ShardRows, assemble
from farl_engine.data.tar_members import BLOCK

GLOBAL_BATCH = 5120
MEGABYTE = 1 << 20


def memory(kind: str) -> int:
    """Resident bytes of this process: RssAnon, RssFile (mapped files), or VmRSS (all)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[kind].split()[0]) * 1024


def write_made_set(folder: Path, samples: int, shards: int) -> None:
    each = samples // shards
    image_size = np.random.default_rng(0).integers(10_000, 30_000, each)
    # A sample is header, image, header, caption.
    blocks = 3 + -(-image_size // BLOCK)
    starts = np.cumsum(np.concatenate([[0], blocks[:-1]]))
    columns = {
        "image_block": starts + 1,
        "image_size": image_size,
        "caption_block": starts + blocks - 1,
        "caption_size": np.full(each, 60),
        "key_ends": np.arange(9, 9 * each + 1, 9),
    }
    columns = {name: column.astype("<u4") for name, column in columns.items()} | {"flags": np.zeros(each, np.uint8)}
    keys = np.frombuffer(b"".join(b"%09d" % i for i in range(each)), np.uint8)
    for shard in range(shards):
        with (folder / f"made-{shard:05d}.tar").open("wb") as file:
            file.truncate(int(blocks.sum() + 2) * BLOCK)
    meta, pieces = assemble([ShardRows(columns, keys, {})] * shards)
    sources, paths = index._resolve(folder, None, False)
    states = index._states(paths, folder)
    path = index._index_path(folder, paths, index._short_names(sources))
    array_file.write(path, {**meta, "state": states, "version": VERSION}, pieces)


@pytest.mark.parametrize(
    ("samples", "shards", "seconds", "megabytes"),
    [(10_000_000, 1_000, 1.0, 200), pytest.param(50_000_000, 10_000, 5.0, 950, marks=pytest.mark.slow)],
)
def test_a_large_index_opens_at_once_and_stays_small(tmp_path, monkeypatch, samples, shards, seconds, megabytes):
    with monkeypatch.context() as patch:
        patch.setattr(array_file.os, "fsync", lambda fd: None)
        write_made_set(tmp_path, samples, shards)
    before, own_before = memory("VmRSS"), memory("RssAnon")
    opened = time.process_time()
    made = ShardIndex.build(tmp_path)
    opened = time.process_time() - opened
    assert len(made) == samples and opened <= seconds, opened

    order = SampleOrder(samples, GLOBAL_BATCH, seed=1)
    order.ids(0)
    assert fastest(lambda: order.ids(7)) / GLOBAL_BATCH <= 1e-6

    for i in order.ids(3)[:500].tolist():
        image, caption = made.read(i)
        assert len(image) == int(made._arrays["image_size"][i]) and len(caption) == 60
    assert made.key(samples - 1) == f"{samples // shards - 1:09d}"
    # In the long run a shuffle touches every page of all that a read looks at; keys are for messages alone.
    for name in ("image_block", "image_size", "caption_block", "caption_size", "flags"):
        made._arrays[name].max()
    assert memory("VmRSS") - before <= megabytes * MEGABYTE
    # The rest is mapped from the file, and one copy of it serves all processes of a machine.
    assert memory("RssAnon") - own_before <= 60 * MEGABYTE


def fastest(function: Callable[[], object]) -> float:
    """Seconds of processor time of the best of several calls: what others do on the machine does not count."""
    times = []
    for _ in range(20):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)
