"""DALI against the CPU decoder, whose verdict is the rule: pixels, ids, causes, counts, and refused images."""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from farl_engine.data import (
    BadImage,
    Batch,
    CpuDecoder,
    CropPlan,
    Loader,
    SampleOrder,
    ShardIndex,
    augment,
    choose_decoder,
)

pytest.importorskip("nvidia.dali", reason="nvidia-dali is not installed")
from farl_engine.data import decode_dali
from farl_engine.data.decode_dali import DaliDecoder, DaliSession, Encoded, color_jitter

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

PLAN = CropPlan(scale=(0.5, 1.0), color_jitter=0.2)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def take(index: ShardIndex, decoder: object, steps: int = 4, global_batch: int = 16, **options: object):
    """All batches of a loader, and the loader."""
    order = SampleOrder(len(index), global_batch, seed=5)
    device = getattr(decoder, "device", None)
    settings = {"plan": PLAN, "seed": 5, "max_bad_fraction": 1.0, "end_step": steps, "device": device}
    loader = Loader(index, order, decoder=decoder, **settings | options)
    with loader:
        return [batch.to("cpu") for batch in loader], loader


def verdicts(taken: tuple[list[Batch], Loader]) -> tuple[object, ...]:
    """All that must not depend on the decoder."""
    batches, loader = taken
    return (
        [(b.step, b.ids.tolist(), b.used_ids.tolist(), b.views.tolist(), b.captions) for b in batches],
        list(loader.bad_samples.items()),
        list(loader.bad_by_shard.items()),
        loader.repaired_captions,
        loader.samples_seen,
        loader._ledger._tried,
    )


def distances(a: list[Batch], b: list[Batch], name: str = "images") -> np.ndarray:
    """Mean absolute difference of each picture in 1/255."""
    one, other = (torch.cat([getattr(batch, name) for batch in batches]).int() for batches in (a, b))
    return (one - other).abs().double().mean(dim=(1, 2, 3)).numpy()


def same(a: list[Batch], b: list[Batch]) -> bool:
    names = ("used_ids", "images", "token_images")
    return all(torch.equal(getattr(x, name), getattr(y, name)) for x, y in zip(a, b, strict=True) for name in names)


@pytest.fixture
def mixed(tmp_path, encode, picture, tools) -> ShardIndex:
    """48 samples: JPEGs for DALI, images for the CPU decoder alone, and bad ones."""
    turned = Image.Exif()
    turned[0x0112] = 6
    kinds = [
        lambda image: encode(image),
        lambda image: encode(image, progressive=True),
        lambda image: encode(image.convert("L")),
        lambda image: encode(image, subsampling=0),
        lambda image: encode(image, exif=turned),
        lambda image: encode(image, "PNG"),
        lambda image: encode(image.convert("CMYK")),
        lambda image: encode(image),
    ]
    jpeg = encode(picture(60, 60))
    bad = {7: b"<html>404</html>", 15: jpeg[: len(jpeg) // 2], 23: b"", 31: jpeg[:-2], 39: b"\xff\xd8" + bytes(99)}
    members = []
    for i in range(48):
        content = bad.get(i) if i in bad else kinds[i % 8](picture(70 + i, 90 - i, i))
        caption = b" " if i == 46 else b"caf\xe9" if i == 44 else f"caption {i}".encode()
        members += [(f"{i:03d}.jpg", content), (f"{i:03d}.txt", caption)]
    tools[2](tmp_path / "mixed-0.tar", members[:40])
    tools[2](tmp_path / "mixed-1.tar", members[40:])
    return ShardIndex.build(tmp_path)


@pytest.mark.parametrize("device", DEVICES)
def test_ids_causes_and_counts_are_the_cpu_decoders(mixed, device):
    rule = take(mixed, CpuDecoder(32, 24))
    got = take(mixed, DaliDecoder(32, 24, device))
    assert verdicts(got) == verdicts(rule) and sum(got[1].bad_samples.values()) > 6
    for name in ("images", "token_images"):
        assert distances(got[0], rule[0], name).max() <= (0.75 if device == "cpu" else 2)


def test_ranks_threads_and_restarts_never_show(mixed):
    decoder = DaliDecoder(32, 24, threads=1)
    reference, _ = take(mixed, decoder, threads=0)
    for threads, prefetch in ((1, 1), (8, 4)):
        assert same(take(mixed, decoder, threads=threads, prefetch=prefetch)[0], reference)
    ranks = [take(mixed, decoder, rank=rank, world_size=4)[0] for rank in range(4)]
    for step, whole in enumerate(reference):
        assert torch.equal(torch.cat([batches[step].images for batches in ranks]), whole.images)
    assert same(take(mixed, decoder, start_step=3)[0], reference[3:])


def let_pass(monkeypatch: pytest.MonkeyPatch, index: ShardIndex, key: str) -> None:
    """Hands the sample of this key to DALI, whatever the check says of it."""
    content = next(index.read(i)[0] for i in range(len(index)) if index.key(i) == key)
    check = decode_dali.plain_jpeg_size
    monkeypatch.setattr(decode_dali, "plain_jpeg_size", lambda data: (60, 60) if data == content else check(data))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("threads", [0, 2])
def test_an_image_that_dali_refuses_costs_itself_alone(mixed, device, threads, monkeypatch, caplog):
    decoder = DaliDecoder(32, 24, device)
    usual = take(mixed, decoder, threads=threads)

    let_pass(monkeypatch, mixed, "015")
    with caplog.at_level(logging.WARNING):
        got = take(mixed, decoder, threads=threads)
    assert "refusal no. 1 by DALI" in caplog.text
    assert verdicts(got) == verdicts(usual) and got[1].bad_samples["truncated"] >= 1
    assert same(got[0], usual[0])


def test_text_and_tokens_are_those_of_the_stand_in(mixed, monkeypatch):
    options = {
        "text_transform": lambda captions: list(captions),
        "visual_tokens": lambda ids, views: torch.from_numpy(np.stack([ids, views], 1)),
    }
    let_pass(monkeypatch, mixed, "015")
    batches, loader = take(mixed, DaliDecoder(32), **options)
    assert loader.bad_samples["truncated"]
    for batch in batches:
        assert batch.text == batch.captions
        assert torch.equal(batch.visual_tokens, torch.stack([batch.used_ids, batch.views], 1))


def test_too_many_pixels_are_for_the_cpu_decoder_to_refuse(encode, picture):
    decoder, row = DaliDecoder(16, max_pixels=1200), PLAN.parameters(0, [0], [0])[0]
    assert decoder.prepare(encode(picture(40, 30)), PLAN, row) is not None
    large = encode(picture(41, 30))
    assert decoder.prepare(large, PLAN, row) is None
    with pytest.raises(BadImage, match="more than 1200 pixels"):
        decoder.decode_into(large, PLAN, row, np.empty((16, 16, 3), np.uint8), None)


@pytest.mark.parametrize("threads", [0, 3])
def test_leaving_early_and_starting_again(mixed, threads, monkeypatch):
    def threads_there() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("farl-loader")]

    closed: list[DaliSession] = []
    close = DaliSession.close
    monkeypatch.setattr(DaliSession, "close", lambda session: (close(session), closed.append(session)))
    decoder = DaliDecoder(32, threads=1)
    reference, _ = take(mixed, decoder, steps=2)
    loader = Loader(mixed, SampleOrder(len(mixed), 16, 5), decoder=decoder, plan=PLAN, seed=5, threads=threads)
    for _ in range(3):
        with loader:
            for batch, expected in zip(loader, reference, strict=False):
                assert torch.equal(batch.images, expected.images)
                assert len(threads_there()) == (threads + 1 if threads else 0)
        assert not threads_there()
    assert len(set(closed)) == len(closed) == 4


def test_time_in_dali_is_told(mixed):
    order = SampleOrder(len(mixed), 16, 0)
    with Loader(mixed, order, decoder=DaliDecoder(32), plan=PLAN, seed=0, threads=2, end_step=3) as loader:
        steps = [batch.step for batch in loader]
        times = loader.stage_times()
        assert steps == [0, 1, 2] and times["device_decode"] > 0 and times["threads"] == 2
        assert loader.stage_times()["device_decode"] == 0


def test_color_jitter_is_the_cpu_decoders():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 12, 11, 3), dtype=np.uint8)
    factors = rng.uniform(0.6, 1.4, (5, 3))
    got = color_jitter(torch.from_numpy(images), torch.tensor(factors, dtype=torch.float32)).numpy()
    for one, image, row in zip(got, images, factors, strict=True):
        difference = np.abs(one.astype(int) - augment.color_jitter(image, tuple(row)))
        assert difference.max() <= 1 and difference.mean() < 0.01
    unchanged = color_jitter(torch.from_numpy(images), torch.ones(5, 3))
    assert np.array_equal(unchanged, images)


def photographs(count: int) -> list[bytes]:
    folder = Path(os.environ["FARL_DATA"])
    paths = [sorted((folder / kind).rglob("*.jpg"))[: count // 2] for kind in ("faces", "landmarks")]
    return [path.read_bytes() for kind in paths for path in kind]


needs_photographs = pytest.mark.skipif(
    not os.environ.get("FARL_DATA"), reason="FARL_DATA names no folder of photographs"
)


def decode_batch(decoder: DaliDecoder, data: list[bytes], plan: CropPlan, rows: np.ndarray) -> list[torch.Tensor]:
    session = decoder.open(len(data))
    images, tokens = session.empty(len(data))
    encoded = [decoder.prepare(item, plan, row) for item, row in zip(data, rows, strict=True)]
    session.submit(encoded)
    assert session.collect(range(len(data)), images, tokens)
    session.synchronize()
    session.close()
    return [images.cpu(), tokens.cpu()]


def decode_each(decoder: CpuDecoder, data: list[bytes], plan: CropPlan, rows: np.ndarray) -> list[torch.Tensor]:
    pictures = [decoder.decode(item, plan, row) for item, row in zip(data, rows, strict=True)]
    return [torch.from_numpy(np.stack(kind)) for kind in zip(*pictures, strict=True)]


@needs_photographs
@pytest.mark.parametrize("device", DEVICES)
def test_64_photographs(device):
    data = photographs(64)
    plan = CropPlan(scale=(0.4, 1.0))
    rows = plan.parameters(0, np.arange(64), np.zeros(64, np.int64))
    got = decode_batch(DaliDecoder(112, 64, device), data, plan, rows)
    rule = decode_each(CpuDecoder(112, 64, reduce=False), data, plan, rows)
    for one, other in zip(got, rule, strict=True):
        assert (one.int() - other.int()).abs().double().mean() <= (0.5 if device == "cpu" else 2)


@needs_photographs
@pytest.mark.parametrize("side", [600, 1200])
def test_photographs_that_the_cpu_decoder_takes_at_reduced_size(side):
    data = []
    for photograph in photographs(16):
        image = Image.open(io.BytesIO(photograph)).resize((side, side + 40), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        data.append(buffer.getvalue())
    plan = CropPlan(scale=(0.9, 1.0))
    rows = plan.parameters(0, np.arange(16), np.zeros(16, np.int64))
    got = decode_batch(DaliDecoder(112, 64), data, plan, rows)
    rule = decode_each(CpuDecoder(112, 64), data, plan, rows)
    for one, other in zip(got, rule, strict=True):
        assert (one.int() - other.int()).abs().double().mean() <= 2


@needs_photographs
@pytest.mark.parametrize("device", DEVICES)
def test_odd_images(tmp_path, tools, device):
    folder = Path(os.environ["FARL_DATA"]) / "odd_images"
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.csv")
    assert len(files) == 58
    members = [
        (f"{i:02d}.{suffix}", content)
        for i, path in enumerate(files)
        for suffix, content in (("jpg", path.read_bytes()), ("txt", path.name.encode()))
    ]
    tools[2](tmp_path / "odd.tar", members)
    index = ShardIndex.build(tmp_path)
    rule = take(index, CpuDecoder(48, 32, reduce=False), steps=2, global_batch=29)
    got = take(index, DaliDecoder(48, 32, device), steps=2, global_batch=29)
    assert verdicts(got) == verdicts(rule) and len(index) + sum(index.excluded_by_shard.values()) == 58
    far = distances(got[0], rule[0])
    print({rule[0][i // 29].captions[i % 29]: round(far[i], 2) for i in np.flatnonzero(far > 0.5)})
    assert far.max() <= 2


def test_decoders_by_name(monkeypatch):
    assert isinstance(choose_decoder("auto", 32, device="cpu"), CpuDecoder)
    assert isinstance(choose_decoder("cpu", 32, 24, "cuda"), CpuDecoder)
    chosen = choose_decoder("auto", 32, 24, "cuda", threads=3)
    assert isinstance(chosen, DaliDecoder) and (chosen.image_size, chosen.token_size, chosen.threads) == (32, 24, 3)
    assert chosen.device.type == "cuda" and isinstance(choose_decoder("dali", 32), DaliDecoder)
    with pytest.raises(ValueError, match="decoder is 'nvjpeg'; use auto, dali or cpu"):
        choose_decoder("nvjpeg", 32)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert isinstance(choose_decoder("auto", 32, device="cuda"), CpuDecoder)
    with pytest.raises(ValueError, match=r"pip install 'farl-engine\[dali\]'") as caught:
        choose_decoder("dali", 32)
    assert "\n" not in str(caught.value)


def test_dali_is_not_imported_unless_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    for name in ("decode_dali", "decoders", "decode_stage", "samples", "loader"):
        found = importlib.util.find_spec(f"farl_engine.data.{name}")
        module = importlib.util.module_from_spec(found)
        monkeypatch.setitem(sys.modules, found.name, module)
        found.loader.exec_module(module)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hw_decoder_load": 1.5}, r"hw_decoder_load must be in 0\.\.1, got 1\.5"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"image_size": 0}, "image_size must be at least 1"),
    ],
)
def test_wrong_arguments_get_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        DaliDecoder(**{"image_size": 32} | options)


def test_a_decoder_on_a_gpu_wants_its_batches_there(mixed):
    with pytest.raises(ValueError, match="the decoder is on cuda, so device must be too, got cpu"):
        take(mixed, DaliDecoder(32, device="cuda"), device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_device_that_dali_cannot_use_gets_one_line():
    decoder = DaliDecoder(32)
    decoder.device = torch.device("cuda")
    with pytest.raises(ValueError, match="--decoder cpu"):
        decoder.open(4)


@pytest.mark.gpu
def test_gpu_memory_stays_flat_over_1000_batches(tmp_path, encode, picture, tools):
    members = [
        (f"{i:03d}.{suffix}", content)
        for i in range(256)
        for suffix, content in (("jpg", encode(picture(200 + 3 * i, 700 - 2 * i, i))), ("txt", b"c"))
    ]
    tools[2](tmp_path / "a.tar", members)
    index = ShardIndex.build(tmp_path)
    loader = Loader(
        index,
        SampleOrder(256, 64, 0),
        decoder=DaliDecoder(224, 112, "cuda"),
        plan=CropPlan(),
        seed=0,
        threads=4,
        device="cuda",
        end_step=1000,
    )
    used = []
    with loader:
        for batch in loader:
            assert batch.images.is_cuda and batch.images.float().mean() > 0
            if batch.step in (99, 999):
                torch.cuda.synchronize()
                free, total = torch.cuda.mem_get_info()
                used.append(total - free)
    assert used[1] - used[0] <= 64 << 20


@pytest.mark.gpu
def test_the_step_does_not_wait_for_the_host(mixed):
    order, decoder = SampleOrder(len(mixed), 16, 0), DaliDecoder(32, 24, "cuda")
    with Loader(mixed, order, decoder=decoder, plan=PLAN, seed=0, threads=2, device="cuda", end_step=20) as loader:
        batches = iter(loader)
        next(batches)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in batches:
                batch.images.float().mean()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_runs_of_one_and_of_all(encode, picture):
    decoder = DaliDecoder(16, threads=1)
    data = [encode(picture(40, 30, i)) for i in range(4)]
    rows = PLAN.parameters(0, np.arange(4), np.zeros(4, np.int64))
    session = decoder.open(4)
    encoded = [decoder.prepare(item, PLAN, row) for item, row in zip(data, rows, strict=True)]
    assert all(isinstance(item, Encoded) for item in encoded)
    together, _ = session.empty(4)
    apart, _ = session.empty(4)
    session.submit(encoded)
    assert session.collect(range(4), together, None)
    for start in (0, 3):
        session.submit(encoded[start : start + 3])
    for start in (0, 3):
        assert session.collect(range(start, min(start + 3, 4)), apart, None)
    assert torch.equal(together, apart) and not torch.equal(together[0], together[1])
    session.submit(encoded)
    session.close()
