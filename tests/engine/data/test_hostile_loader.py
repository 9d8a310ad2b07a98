"""One bad sample in a hundred costs one decode in a hundred, and shows in nothing but the counts."""

from __future__ import annotations

import io
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image

from farl_engine.data import CpuDecoder, CropPlan, Loader, SampleOrder, ShardIndex

SAMPLES, BATCH = 1000, 50


class CountingDecoder(CpuDecoder):
    calls = 0

    def decode_into(self, data, plan, parameters, image, tokens):
        self.calls += 1
        super().decode_into(data, plan, parameters, image, tokens)


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> ShardIndex:
    """Bad ones are spread evenly; images of few kinds, because only their number matters here."""
    folder = tmp_path_factory.mktemp("bad")
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(buffer, "JPEG")
    jpeg = buffer.getvalue()
    bad = [(b"<html>", b"c"), (jpeg[:-60], b"c"), (jpeg, b"\n"), (jpeg[:30] + bytes(90), b"c"), (jpeg, b"\0 \0")] * 2
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number in range(SAMPLES):
            contents = bad[number // 100] if number % 100 == 50 else (jpeg, b"caption")
            for extension, content in zip(("jpg", "txt"), contents, strict=True):
                info = tarfile.TarInfo(f"{number:04d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return ShardIndex.build(folder)


EXPECTED = {"not_an_image": 2, "truncated": 2, "corrupt": 2, "missing_caption": 4}


@pytest.mark.parametrize("threads", [0, 3])
def test_one_percent_bad(index, threads, monkeypatch, caplog):
    # Threads wait on conditions; nothing sleeps over an error.
    monkeypatch.setattr(time, "sleep", None)
    decoder, order = CountingDecoder(8), SampleOrder(SAMPLES, BATCH, seed=1)
    steps = SAMPLES // BATCH
    with Loader(index, order, decoder=decoder, plan=CropPlan(), seed=1, threads=threads, end_step=steps) as loader:
        batches = list(loader)
        loader.check_bad()
    assert [len(batch.captions) for batch in batches] == [BATCH] * steps
    assert loader.bad_samples == EXPECTED and loader.samples_seen == SAMPLES
    assert sum(loader.bad_by_shard.values()) == SAMPLES // 100
    # Those without a caption are found before their image is decoded.
    assert decoder.calls == SAMPLES + SAMPLES // 100 - EXPECTED["missing_caption"]
    assert all(set(batch.captions) == {"caption"} for batch in batches)
    ids, used = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("ids", "used_ids"))
    assert sorted(ids[ids != used].tolist()) == list(range(50, SAMPLES, 100))
    assert not (used % 100 == 50).any()
    assert len(caplog.records) == 1
