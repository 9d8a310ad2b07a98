"""The files of a token cache: what is written is read, whatever stopped the writer, and damage does not pass."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from farl.tokens import DalleEncoder, PatchCodebook, TokenCache, cache
from farl.tokens.cache import MADE, MISSING, CacheWriter, RepeatedCrops, StoredEncoder
from farl.tokens.manifest import (
    MANIFEST,
    Manifest,
    block_samples,
    describe_plan,
    describe_tokenizer,
    differences,
    tokenizer_hash,
)
from farl_engine.data import CropPlan, FaceCropPlan

PATCHES = 6


def manifest(samples: int = 70, views: int = 2, vocab_size: int = 500, **options: Any) -> Manifest:
    made = Manifest(
        fingerprint="0123456789abcdef" * 2,
        samples=samples,
        tokenizer={
            "kind": "dalle",
            "hash": "ab" * 16,
            "vocab_size": vocab_size,
            "token_image_size": 16,
            "file": "/gone",
        },
        seed=3,
        augmentation=describe_plan(CropPlan()),
        views=views,
        image_size=32,
        patches=PATCHES,
        decoder="cpu",
        device="cpu",
        precision="fp32",
        versions={"torch": "2.15"},
        block=32,
        command="python -m farl.data tokenize --out here",
    )
    return replace(made, **options)


def contents(of: Manifest) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Tokens, the last one of the vocabulary among them, and status of all samples, some of which are missing."""
    rows = of.samples * of.views
    tokens = np.random.default_rng(0).integers(0, of.tokenizer["vocab_size"], (rows, of.patches))
    tokens[rows // 2] = of.tokenizer["vocab_size"] - 1
    status = np.where(np.arange(rows) // of.views % 11 == 5, MISSING, MADE).astype(np.uint8)
    return tokens, status


def write(folder: Path, of: Manifest, blocks: list[int] | None = None) -> None:
    if not (folder / MANIFEST).exists():
        CacheWriter.create(folder, of, None)  # type: ignore[arg-type]
    writer = CacheWriter(folder, of)
    tokens, status = contents(of)
    for block in range(of.num_blocks) if blocks is None else blocks:
        rows = slice(*(edge * of.views for edge in of.block_range(block)))
        writer.write(block, tokens[rows], status[rows])


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize(("vocab_size", "dtype"), [(500, "<u2"), (1 << 16, "<u2"), ((1 << 16) + 1, "<u4")])
def test_rows_are_what_was_written(tmp_path: Path, views: int, vocab_size: int, dtype: str) -> None:
    of = manifest(views=views, vocab_size=vocab_size)
    write(tmp_path, of, [2, 0, 1])
    assert (tmp_path / "tokens.bin").stat().st_size == 70 * views * PATCHES * np.dtype(dtype).itemsize
    tokens, status = contents(of)
    ids = np.random.default_rng(1).integers(0, 70, 200)
    epochs = np.random.default_rng(2).integers(0, 9, 200)
    got = TokenCache(tmp_path).rows(ids, epochs)
    rows = ids * views + epochs % views
    assert got.dtype == torch.int32 and got.shape == (200, PATCHES)
    assert torch.equal(got, torch.from_numpy(np.where(status[rows, None] == MADE, tokens[rows], -1).astype(np.int32)))
    assert int(TokenCache(tmp_path).rows(np.arange(70), np.arange(70)).max()) <= vocab_size - 1
    assert TokenCache(tmp_path).missing_rows() == 6 * views


def test_a_token_outside_the_vocabulary_is_not_written(tmp_path: Path) -> None:
    of = manifest(vocab_size=500)
    CacheWriter.create(tmp_path, of, None)  # type: ignore[arg-type]
    tokens, status = contents(of)
    tokens[7, 2] = 500
    with pytest.raises(ValueError, match=r"wanted 0\.\.499, got \d+\.\.500"):
        CacheWriter(tmp_path, of).write(0, tokens[:64], status[:64])


class KilledError(BaseException):
    """Stands for kill -9."""


@pytest.mark.parametrize("half", [False, True])
def test_a_block_is_there_wholly_or_not_at_all(tmp_path: Path, half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before or in the middle of every single write, of a new block and of one that is made again."""
    of, real = manifest(), cache._write_at
    write(tmp_path / "whole", of)
    for again in (False, True):
        for fatal in range(4 if again else 3):
            folder = tmp_path / f"{again}{fatal}"
            write(folder, of, [0, 1, 2] if again else [0, 2])
            calls = 0

            def fail(fd: int, content: bytes, offset: int, fatal: int = fatal) -> None:
                nonlocal calls
                calls += 1
                if calls > fatal:
                    real(fd, content[: len(content) // 2 if half else 0], offset)
                    raise KilledError
                real(fd, content, offset)

            monkeypatch.setattr(cache, "_write_at", fail)
            with pytest.raises(KilledError):
                write(folder, of, [1])
            monkeypatch.setattr(cache, "_write_at", real)
            # Half of a row of zeros leaves half of a row that vouches for nothing.
            untouched = again and fatal == 0 and not half
            assert CacheWriter(folder, of).finished().tolist() == [True, untouched, True]
            if not untouched:
                with pytest.raises(ValueError, match=r"has 2 of 3 blocks: finish it with `python -m farl\.data tok"):
                    TokenCache(folder)
            write(folder, of, [1])
            for name in ("tokens.bin", "status.bin", "blocks.bin"):
                assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("name", ["tokens.bin", "status.bin"])
def test_damage_is_found_when_opened(tmp_path: Path, name: str) -> None:
    write(tmp_path, manifest())
    content = bytearray((tmp_path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged in 1 of 3 blocks: mend it with `python -m farl\.data tokenize"):
        TokenCache(tmp_path)
    assert [CacheWriter(tmp_path, manifest()).is_intact(block) for block in range(3)] == [True, False, True]


@pytest.mark.parametrize("damage", ["token", "hole"])
def test_damage_in_a_large_cache_is_found_when_read(
    tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_CHECK_BYTES", 0)
    write(tmp_path, manifest(views=1))
    name, size = ("tokens.bin", 2 * PATCHES) if damage == "token" else ("status.bin", 1)
    content = bytearray((tmp_path / name).read_bytes())
    content[40 * size : 41 * size] = b"\xff\xff" * PATCHES if damage == "token" else b"\0"
    (tmp_path / name).write_bytes(content)
    opened = TokenCache(tmp_path)
    opened.rows(np.arange(40), np.zeros(40, np.int64))
    with pytest.raises(ValueError, match="is damaged near sample 40: mend it with"):
        opened.rows(np.arange(70), np.zeros(70, np.int64))


@pytest.mark.parametrize("name", ["tokens.bin", "status.bin", "blocks.bin"])
@pytest.mark.parametrize("fault", ["cut", "gone"])
def test_files_that_were_cut_or_lost_are_named(tmp_path: Path, name: str, fault: str) -> None:
    write(tmp_path, manifest())
    if fault == "gone":
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1])
    message = "is gone: delete" if fault == "gone" else r"bytes instead of [\d,]+: it was cut"
    with pytest.raises(ValueError, match=rf"{name} .*{message}.* make the cache again with `python -m farl"):
        TokenCache(tmp_path)


def test_what_is_no_cache_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no token cache: make one with `python -m farl\.data tokenize`"):
        TokenCache(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match="is damaged: delete"):
        TokenCache(tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps({**asdict(manifest()), "format": 2}))
    with pytest.raises(ValueError, match="has format 2, this version reads 1: make the cache again"):
        TokenCache(tmp_path)


def test_missing_tokens_are_logged_at_a_bounded_rate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, manifest(views=1))
    opened = TokenCache(tmp_path)
    with caplog.at_level(logging.WARNING):
        for _ in range(300):
            opened.rows(np.arange(70), np.zeros(70, np.int64))  # 6 of them
    assert [record.args[0] for record in caplog.records] == [6, 1002]  # type: ignore[index]


def test_opening_and_reading_take_no_longer_for_millions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse files of 20 million samples: nothing on the way to a batch looks at more than the batch."""
    samples = 20_000_000
    of = manifest(samples=samples, views=1, patches=196, block=block_samples(samples))
    CacheWriter.create(tmp_path, of, None)  # type: ignore[arg-type]
    records = np.zeros((of.num_blocks, 4), "<u8")
    records[:, 3] = cache._record_hash(np.arange(of.num_blocks), records)
    (tmp_path / "blocks.bin").write_bytes(records.tobytes())
    with (tmp_path / "status.bin").open("r+b") as file:
        file.seek(samples - 640)
        file.write(bytes([MADE]) * 640)
    ids, views = np.arange(samples - 640, samples), np.zeros(640, np.int64)
    opening, reading = [], []
    for _ in range(5):
        start = time.perf_counter()
        opened = TokenCache(tmp_path)
        opening.append(time.perf_counter() - start)
        opened.rows(ids, views)
        start = time.perf_counter()
        opened.rows(ids, views)
        reading.append(time.perf_counter() - start)
    # Ten times what they take on an idle machine: a scan of 8 GB would take seconds.
    assert min(opening) < 0.01 and min(reading) < 0.001


def test_blocks_are_neither_tiny_nor_long_to_make() -> None:
    assert [block_samples(n) for n in (1, 150, 8192, 8193, 100_000, 1 << 20, 50_000_000)] == [
        *(32, 32, 32, 64, 416, 4096, 4096),
    ]


def test_only_repeatable_arithmetic_counts_as_the_same() -> None:
    exact = manifest(precision="exact", device="NVIDIA H200")
    assert not differences(exact.arithmetic(), replace(exact, device="cpu").arithmetic()) and exact.is_reproducible
    assert not replace(exact, decoder="dali").is_reproducible
    network = manifest(precision="fp16", device="NVIDIA H200")
    assert not network.is_reproducible
    assert differences(network.arithmetic(), replace(network, device="NVIDIA A100", precision="fp32").arithmetic()) == (
        "device was NVIDIA H200, is NVIDIA A100; precision was fp16, is fp32"
    )


def test_plans_with_other_faces_are_told_apart() -> None:
    faces = np.array([[0.1, 0.1, 0.5, 0.5], [np.nan] * 4], np.float32)
    plain, kept, moved = CropPlan(), FaceCropPlan(faces=faces), FaceCropPlan(faces=faces + np.float32(0.1))
    described = [json.dumps(describe_plan(plan)) for plan in (plain, kept, moved)]
    assert len(set(described)) == 3 and described[1] == json.dumps(describe_plan(FaceCropPlan(faces=faces.copy())))
    assert all(len(text) < 300 for text in described)


def test_crops_come_again_after_the_views_of_the_cache() -> None:
    plan, ids = CropPlan(), np.arange(5)
    repeated = RepeatedCrops(plan, 2)
    for epoch in range(5):
        wanted = plan.parameters(7, ids, np.full(5, epoch % 2))
        assert np.array_equal(repeated.parameters(7, ids, np.full(5, epoch)), wanted)
    row = plan.parameters(7, ids, ids)[0]
    assert repeated.box(row, 90, 70) == plan.box(row, 90, 70) and repeated.flips(row) == plan.flips(row)


def test_the_tokenizer_comes_back_and_is_the_one(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    codebook, other = (PatchCodebook.fit(images, 8, 16, seed=seed) for seed in (0, 1))
    of = manifest(tokenizer=describe_tokenizer(codebook, "elsewhere"))
    CacheWriter.create(tmp_path, of, codebook)
    write(tmp_path, of)
    again = TokenCache(tmp_path).tokenizer()
    assert isinstance(again, PatchCodebook) and torch.equal(again(images), codebook(images))
    assert (tmp_path / "codebook.safetensors").stat().st_mode & 0o777 == 0o644
    other.save(tmp_path / "codebook.safetensors")
    with pytest.raises(ValueError, match=r"is damaged in codebook\.safetensors: put the one back that made it"):
        TokenCache(tmp_path).tokenizer()
    (tmp_path / "codebook.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"is damaged in codebook\.safetensors"):
        TokenCache(tmp_path).tokenizer()


def test_an_encoder_is_loaded_when_it_is_called(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    encoder, path = (
        DalleEncoder(20, hidden=8, blocks_per_group=1, token_image_size=16),
        tmp_path / "encoder.safetensors",
    )
    stored = StoredEncoder(path, tokenizer_hash(encoder), 20, 16)
    assert not stored.usable("cpu")
    save_file(encoder.state_dict(), path)
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    assert stored.usable("cpu") and torch.equal(stored(images), encoder(images))
    save_file({name: value + 1 for name, value in encoder.state_dict().items()}, path)
    with pytest.raises(ValueError, match="holds other weights than those that made the token cache"):
        StoredEncoder(path, tokenizer_hash(encoder), 20, 16)(images)
