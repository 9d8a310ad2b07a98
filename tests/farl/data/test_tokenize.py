"""The token cache from the command to the training: the same tokens, losses and bits as without it."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from farl import cli, report
from farl.cached_tokens import check_token_cache, open_token_cache
from farl.config import TrainConfig
from farl.data import tokenize as command
from farl.data.tokenize import TokenizeOptions, tokenize
from farl.faces import draw
from farl.initialize import crop_plan, fit_codebook
from farl.pretrain import pretrain
from farl.resume import check_resumable
from farl.shards import open_shards
from farl.tokens import DalleEncoder, PatchCodebook, TokenCache, cache
from farl.tokens.cache import MISSING, CacheWriter, RepeatedCrops
from farl.tokens.make import measure_agreement
from farl.tokens.manifest import MANIFEST, tokenizer_hash
from farl_engine.checkpoint import CheckpointStore
from farl_engine.data import CpuDecoder, Loader, SampleOrder, ShardIndex, ShardWriter, choose_decoder
from farl_engine.distributed import World

FACES, BAD = 70, {5: b"<html>", 17: None, 41: b""}  # not an image, a truncated one, no caption
WORLD = World(rank=0, size=1, device=torch.device("cpu"), control=None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 70 faces, three of them bad, and an encoder beside them."""
    folder = tmp_path_factory.mktemp("data")
    with ShardWriter(folder / "faces-%02d.tar", samples_per_shard=30) as writer:
        for number in range(FACES):
            buffer = io.BytesIO()
            face = draw(number, size=40)
            Image.fromarray(face.image).save(buffer, "JPEG", quality=90)
            image, caption = buffer.getvalue(), face.caption
            if number in BAD:
                image, caption = BAD[number] or image[: len(image) // 2 if number == 17 else None], caption
                caption = " " if number == 41 else caption
            writer.write(f"{number:03d}", {"jpg": image, "txt": caption})
    torch.manual_seed(0)
    encoder = DalleEncoder(20, hidden=8, blocks_per_group=1)
    save_file(encoder.state_dict(), folder / "encoder.safetensors")
    return folder


@pytest.fixture(scope="module")
def shards(data: Path) -> str:
    return str(data / "*.tar")


@pytest.fixture(scope="module")
def index(shards: str) -> ShardIndex:
    return open_shards("--data", shards, WORLD, 1.0)


@pytest.fixture(scope="module")
def make(data: Path, shards: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make(tokenizer="codebook", views=2, ...) gives a finished cache, made once for each set of options."""
    made: dict[str, Path] = {}

    def cached(**options: Any) -> Path:
        name = json.dumps(options, sort_keys=True)
        if name not in made:
            made[name] = tmp_path_factory.mktemp("caches") / "cache"
            tokenize(settings(shards, made[name], data, **options), "python -m farl.data tokenize SAME")
        return made[name]

    return cached


def settings(shards: str, out: Path, data: Path, *, tokenizer: str = "codebook", **options: Any) -> TokenizeOptions:
    if tokenizer == "dalle":
        tokenizer = f"dalle:{data / 'encoder.safetensors'}"
    values = {"views": 2, "model": "farl-micro", "device": "cpu", "batch_size": 24, "threads": 1, "decoder": "cpu"}
    values["max_bad_fraction"] = 0.5
    return TokenizeOptions(data=shards, out=str(out), tokenizer=tokenizer, **{**values, **options})


def training(shards: str, run_dir: Path, tokens: str, **options: Any) -> TrainConfig:
    values = {"model": "farl-micro", "device": "cpu", "steps": 20, "warmup": 2, "stop_at": 3, "global_batch": 36}
    values |= {"log_every": 1, "eval_every": 0, "save_minutes": 0, "threads": 1, "max_bad_fraction": 0.5}
    return TrainConfig(data=shards, run_dir=str(run_dir), visual_tokens=tokens, **{**values, **options})


def losses(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "loss", "loss_contrastive", "loss_mim", "accuracy_mim", "grad_norm")
    return [{name: line[name] for name in names} for line in lines if "loss" in line]


@pytest.mark.parametrize("tokenizer", ["codebook", "dalle"])
def test_training_is_the_same_to_the_last_digit(
    tokenizer: str,
    data: Path,
    shards: str,
    make: Callable[..., Path],
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three steps, from the first epoch into the second, bad samples among them; then from a checkpoint in between."""
    online = "codebook" if tokenizer == "codebook" else f"dalle:{data / 'encoder.safetensors'}"
    kept = f"cache:{make(tokenizer=tokenizer)}"
    pretrain(training(shards, tmp_path / "online", online))
    assert "fitting" in capsys.readouterr().out or tokenizer == "dalle"

    def computed(*_: Any) -> None:
        raise AssertionError("tokens are computed in spite of the cache")

    monkeypatch.setattr(PatchCodebook, "__call__", computed)
    monkeypatch.setattr(DalleEncoder, "forward", computed)
    pretrain(training(shards, tmp_path / "cached", kept, stop_at=2))
    said = capsys.readouterr().out
    assert f"/cache: {tokenizer} " in said and "2 views a sample, the same to the bit as computed here" in said
    assert "fitting" not in said
    pretrain(training(shards, tmp_path / "cached", kept))
    wanted, got = losses(tmp_path / "online"), losses(tmp_path / "cached")
    assert got == wanted and [line["step"] for line in got] == [1, 2, 3]
    # The last of a run's checkpoints goes on either way.
    state = [CheckpointStore(tmp_path / run / "checkpoints").load() for run in ("online", "cached")]
    assert all(torch.equal(value, state[1]["model"][name]) for name, value in state[0]["model"].items())
    assert state[1]["visual_tokens_kind"] == tokenizer and (state[1]["visual_tokens"] is None) == (tokenizer == "dalle")


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Takes the decoder and the tokenizer that a run gives its report, which is not drawn."""
    given: list[Any] = []

    def report_run(*arguments: Any, **options: Any) -> str:
        given.extend(arguments[3:])
        return "no page"

    monkeypatch.setattr(report, "report_run", report_run)
    return given


def test_a_run_may_change_to_a_cache_and_back(
    shards: str, make: Callable[..., Path], index: ShardIndex, tmp_path: Path, reported: list[Any]
) -> None:
    pretrain(training(shards, tmp_path, "codebook", stop_at=1))
    kept = training(shards, tmp_path, f"cache:{make(tokenizer=f'codebook:{tmp_path}')}", steps=2, warmup=1, stop_at=0)
    pretrain(kept)
    decoder, tokenizer = reported
    assert isinstance(tokenizer, PatchCodebook) and decoder.token_size is None
    saved = CheckpointStore(tmp_path / "checkpoints").load()
    check_resumable(saved, replace(kept, visual_tokens="codebook"), index, None)
    for other, message in (("dalle", "is dalle"), ("codebook", r"was codebook \w{12}, is codebook \w{12}")):
        options = {"seed": 1} if other == "codebook" else {}
        opened = TokenCache(make(tokenizer=other, **options))
        with pytest.raises(ValueError, match=rf"belongs to another run: visual tokens .*{message}"):
            check_resumable(saved, kept, index, opened)


@pytest.mark.parametrize(
    ("tokenizer", "views", "decoder"),
    [
        *(("codebook", 1, "cpu"), ("codebook", 2, "cpu"), ("dalle", 1, "cpu"), ("dalle", 2, "cpu")),
        ("dalle", 2, "dali"),
    ],
)
def test_tokens_are_those_of_the_crops_that_training_sees(
    tokenizer: str, views: int, decoder: str, make: Callable[..., Path], index: ShardIndex
) -> None:
    """Over four epochs; a bad sample has the tokens of the one in its place."""
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    opened = TokenCache(make(tokenizer=tokenizer, views=views, decoder=decoder))
    assert opened.manifest.decoder == decoder
    online = opened.tokenizer()
    loader = Loader(
        index,
        SampleOrder(len(index), 47, seed=0),
        decoder=choose_decoder(decoder, 32, online.token_image_size),
        plan=RepeatedCrops(crop_plan(training("", Path(), "codebook"), index), views),
        seed=0,
        threads=0,
        visual_tokens=opened.rows,
        max_bad_fraction=1.0,
        end_step=6,
    )
    replaced, seen = 0, {}
    for batch in loader:
        source = batch.images if batch.token_images is None else batch.token_images
        assert batch.visual_tokens is not None and torch.equal(batch.visual_tokens.long(), online(source))
        replaced += int((batch.ids != batch.used_ids).sum())
        for used, view, tokens in zip(batch.used_ids.tolist(), batch.views.tolist(), batch.visual_tokens, strict=True):
            seen.setdefault(used, {})[view] = tokens
    assert replaced >= 9  # three bad ones in each epoch
    epochs = [tokens for tokens in seen.values() if len(tokens) == 4]
    assert len(epochs) > 60 and all(torch.equal(tokens[0], tokens[2]) == (views <= 2) for tokens in epochs)
    distinct = sum(not torch.equal(tokens[0], tokens[1]) for tokens in epochs)
    assert distinct > 50 if views == 2 else distinct == 0


def test_bad_samples_are_marked_and_counted(make: Callable[..., Path], index: ShardIndex) -> None:
    status = np.fromfile(make() / "status.bin", np.uint8).reshape(FACES, 2)
    assert [index.key(i) for i in np.flatnonzero((status == MISSING).all(1))] == [f"{bad:03d}" for bad in BAD]
    assert int((status == MISSING).sum()) == 6 == TokenCache(make()).missing_rows()


class KilledError(BaseException):
    """Stands for kill -9."""


@pytest.mark.parametrize("fatal", range(0, 9, 2))
def test_a_killed_job_goes_on(
    fatal: int, data: Path, shards: str, make: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of a write: at most one block more is made than without."""
    real_write_at, real_write = cache._write_at, CacheWriter.write
    calls, blocks = 0, []

    def write_at(fd: int, content: bytes, offset: int) -> None:
        nonlocal calls
        calls += 1
        if calls == fatal + 1:
            real_write_at(fd, content[: len(content) // 2], offset)
            raise KilledError
        real_write_at(fd, content, offset)

    def write(self: CacheWriter, block: int, *content: Any) -> None:
        blocks.append(block)
        real_write(self, block, *content)

    monkeypatch.setattr(cache, "_write_at", write_at)
    monkeypatch.setattr(CacheWriter, "write", write)
    out = tmp_path / "cache"
    options = settings(shards, out, data)
    with pytest.raises(KilledError):
        tokenize(options, "the command")
    # Three writes a block: what was finished before is not made again, nor with other batches made otherwise.
    assert blocks == list(range(fatal // 3 + 1))
    with pytest.raises(ValueError, match=rf"has {fatal // 3} of 3 blocks: finish it with `the command`"):
        open_token_cache(training(shards, tmp_path, f"cache:{out}"))
    tokenize(replace(options, batch_size=7, threads=0), "the command")
    assert blocks == [*range(fatal // 3 + 1), *range(fatal // 3, 3)]
    for name in ("tokens.bin", "status.bin", "blocks.bin"):
        assert (out / name).read_bytes() == (make() / name).read_bytes()


def test_a_damaged_block_is_found_and_made_again(
    data: Path, shards: str, make: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    out = shutil.copytree(make(), tmp_path / "cache")
    content = bytearray((out / "tokens.bin").read_bytes())
    content[-1] ^= 1
    (out / "tokens.bin").write_bytes(content)
    tokenize(settings(shards, out, data), "the command")
    assert "3 of 3 blocks are there, 1 of them damaged; 1 to make" in capsys.readouterr().out
    assert (out / "tokens.bin").read_bytes() == (make() / "tokens.bin").read_bytes()


def test_samples_that_could_not_be_read_are_tried_again(
    data: Path, shards: str, make: Callable[..., Path], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard that is away for a while is no verdict on its samples."""
    real, out = ShardIndex.read, tmp_path / "cache"

    def read(self: ShardIndex, i: int) -> tuple[bytes, bytes]:
        if 33 <= i < 38:
            raise OSError("stale file handle")
        return real(self, i)

    words = ["--data", shards, "--out", str(out), "--model", "farl-micro", "--device", "cpu", "--views", "2"]
    words += ["--max-bad-fraction", "0.5", "--threads", "1", "--batch-size", "16"]
    words += ["--tokenizer", f"codebook:{make() / 'codebook.safetensors'}"]
    monkeypatch.setattr(ShardIndex, "read", read)
    assert command.main(words) == 0
    assert "reads failed; the same command tries those again" in capsys.readouterr().out
    before = TokenCache(out)
    assert before.missing_rows() == 16 and before.unreadable_reads >= 10
    monkeypatch.setattr(ShardIndex, "read", real)
    assert command.main(words) == 0
    said = capsys.readouterr().out
    assert "3 of 3 blocks are there; 1 to make" in said and "reads failed" not in said
    assert f"use it with --visual-tokens cache:{out}" in said
    assert (out / "tokens.bin").read_bytes() == (make() / "tokens.bin").read_bytes()


def test_a_failed_read_counts_in_its_own_block(
    data: Path, shards: str, make: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a batch ends one block and begins the next: there the other one would be tried again in vain."""
    real, out = ShardIndex.read, tmp_path / "cache"

    def read(self: ShardIndex, i: int) -> tuple[bytes, bytes]:
        if i == 32:
            raise OSError("stale file handle")
        return real(self, i)

    options = settings(shards, out, data, tokenizer=f"codebook:{make() / 'codebook.safetensors'}")
    monkeypatch.setattr(ShardIndex, "read", read)
    tokenize(options, "the command")
    assert CacheWriter(out, TokenCache(out).manifest).unreadable().tolist() == [0, 2, 0]
    monkeypatch.setattr(ShardIndex, "read", real)
    tokenize(options, "the command")
    assert (out / "status.bin").read_bytes() == (make() / "status.bin").read_bytes()


def test_filling_up_the_last_batch_makes_no_bad_samples(
    data: Path, shards: str, make: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ShardIndex.read

    def read(self: ShardIndex, i: int) -> tuple[bytes, bytes]:
        return (b"<html>", b"the last one") if i == FACES - 1 else real(self, i)

    monkeypatch.setattr(ShardIndex, "read", read)
    tokenizer = f"codebook:{make() / 'codebook.safetensors'}"
    options = settings(shards, tmp_path / "cache", data, tokenizer=tokenizer, batch_size=128, max_bad_fraction=0.1)
    tokenize(options, "the command")
    assert TokenCache(tmp_path / "cache").missing_rows() == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, "seed was 0, is 1. Use the old settings, or make a new cache: python -m farl.data tokenize"),
        ({"crop_scale": 0.5}, r"augmentation was scale \[0.9, 1.0\], .* is scale \[0.5, 1.0\].*--crop-scale 0.5"),
        ({"model": "farl-tiny"}, "image size was 32, is 64; patches was 16, is 64. Use .* --model farl-tiny"),
    ],
)
def test_a_cache_of_another_run_is_refused(
    options: dict[str, Any], message: str, shards: str, make: Callable[..., Path], index: ShardIndex
) -> None:
    config = training(shards, Path("run"), f"cache:{make()}", **options)
    with pytest.raises(ValueError, match=message) as caught:
        opened = open_token_cache(config)
        assert opened is not None
        check_token_cache(config, opened, index, crop_plan(config, index), CpuDecoder(32), WORLD)
    assert "\n" not in str(caught.value) and f"--visual-tokens cache:{make()} is of another run" in str(caught.value)


def test_a_cache_of_other_data_is_refused(data: Path, make: Callable[..., Path]) -> None:
    shard = str(data / "faces-00.tar")
    config, other = training(shard, Path("run"), f"cache:{make()}"), open_shards("--data", shard, WORLD, 1.0)
    opened = open_token_cache(config)
    assert opened is not None
    with pytest.raises(ValueError, match=r"data fingerprint was \w{12}, is \w{12}; samples was 70, is 30\. Use"):
        check_token_cache(config, opened, other, crop_plan(config, other), CpuDecoder(32), WORLD)


def test_contrast_alone_needs_no_cache(shards: str) -> None:
    assert open_token_cache(training(shards, Path("run"), "cache:gone", mim_weight=0.0)) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"views": 3}, "views was 2, is 3"),
        ({"tokenizer": "dalle"}, r"tokenizer was codebook \w{12}, is dalle \w{12}"),
        ({"crop_scale": 0.8}, r"augmentation was scale \[0.9"),
        ({"data": "faces-01.tar"}, r"data fingerprint was \w{12}, is \w{12}; samples was 70, is 30"),
    ],
)
def test_going_on_with_other_settings_is_refused(
    options: dict[str, Any], message: str, data: Path, shards: str, make: Callable[..., Path]
) -> None:
    shards = str(data / options.pop("data")) if "data" in options else shards
    before = (make() / MANIFEST).read_bytes()
    with pytest.raises(
        ValueError, match=rf"was begun with other settings: {message}.*Use the old ones, or another --out"
    ):
        tokenize(settings(shards, make(), data, **options), "the command")
    assert (make() / MANIFEST).read_bytes() == before


def test_a_codebook_for_other_patches_is_refused(
    data: Path, shards: str, make: Callable[..., Path], tmp_path: Path
) -> None:
    tokenizer = f"codebook:{make() / 'codebook.safetensors'}"
    with pytest.raises(ValueError, match=r"is of patches of 8 pixels, --model farl-b16 has 16: fit one with"):
        tokenize(settings(shards, tmp_path / "out", data, tokenizer=tokenizer, model="farl-b16"), "")


def test_too_little_space_is_said_before_the_work(
    data: Path, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 500, 500))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="GB are free there: use another disk or fewer --views"):
        tokenize(settings(shards, tmp_path / "out", data), "")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokenizer", "vqgan"], "--tokenizer is 'vqgan'; use codebook, codebook:FILE or dalle:FILE"),
        (["--views", "0"], "--views is 0; it must be 1 or more"),
        (["--crop-scale", "2"], "--crop-scale is 2.0; it must be more than 0 and at most 1"),
    ],
)
def test_wrong_options_get_one_line(words: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as leaving:
        cli.run(lambda: command.main(["--data", "x.tar", "--out", "y", *words]), "farl.data tokenize")
    assert leaving.value.code == 2
    assert capsys.readouterr().err == f"farl.data tokenize: {message}\n"


def test_agreement_is_measured_where_bits_may_differ(
    shards: str, make: Callable[..., Path], index: ShardIndex, tmp_path: Path, capsys: Any
) -> None:
    out = shutil.copytree(make(), tmp_path / "cache")
    values = json.loads((out / MANIFEST).read_text())
    (out / MANIFEST).write_text(json.dumps({**values, "decoder": "dali", "device": "NVIDIA H200"}))
    config = training(shards, tmp_path, f"cache:{out}")
    plan = crop_plan(config, index)

    def say() -> str:
        opened = open_token_cache(config)
        assert opened is not None
        check_token_cache(config, opened, index, plan, CpuDecoder(32), WORLD)
        return capsys.readouterr().out

    assert "; 100.00% are the same as computed here (decoder was dali, is cpu; device was NVIDIA H200" in say()
    # All 16 tokens of view 0 of sample 64 and half of those of view 1 of sample 65, of 70 samples in one view each.
    tokens, status = np.fromfile(out / "tokens.bin", "<u2").reshape(-1, 16), np.fromfile(out / "status.bin", np.uint8)
    tokens[128], tokens[131, :8] = (tokens[128] + 1) % 16, (tokens[131, :8] + 1) % 16
    CacheWriter(out, TokenCache(out).manifest).write(2, tokens[128:], status[128:])
    shown = float(say().split("; ")[1].split("%")[0])
    assert shown == round(100 - 100 * 24 / (70 * 16), 2)
    opened, online = TokenCache(out), TokenCache(make()).tokenizer()
    rate = measure_agreement(
        *(opened, index, online), decoder=CpuDecoder(32), plan=plan, device=WORLD.device, threads=0
    )
    assert shown == round(100 * rate, 2)


def test_what_other_versions_went_on_with_is_never_called_the_same_to_the_bit(
    data: Path, shards: str, make: Callable[..., Path], tmp_path: Path, capsys: Any, index: ShardIndex
) -> None:
    """Versions of torch differ by a bit in the Lanczos filter of the token picture."""
    out = shutil.copytree(make(), tmp_path / "cache")
    config, values = training(shards, tmp_path, f"cache:{out}"), json.loads((out / MANIFEST).read_text())
    here = values["versions"]["torch"]

    def said() -> str:
        capsys.readouterr()
        opened = open_token_cache(config)
        assert opened is not None
        check_token_cache(config, opened, index, crop_plan(config, index), CpuDecoder(32), WORLD)
        return capsys.readouterr().out

    assert "the same to the bit" in said()
    values["versions"]["torch"] = "1.0"
    (out / MANIFEST).write_text(json.dumps(values))
    assert f"are the same as computed here (torch was 1.0, is {here})" in said()
    # Nothing to make: what is there was made with the old version alone.
    tokenize(settings(shards, out, data), "the command")
    assert f"(torch was 1.0, is {here})" in said()
    for _ in range(2):
        content = bytearray((out / "tokens.bin").read_bytes())
        content[-1] ^= 1
        (out / "tokens.bin").write_bytes(content)
        tokenize(settings(shards, out, data), "the command")
        assert f"(torch was 1.0 and {here}, is {here})" in said()


def test_an_encoder_that_is_gone_is_no_obstacle(
    data: Path, shards: str, tmp_path: Path, capsys: Any, index: ShardIndex, reported: list[Any]
) -> None:
    shutil.copy(data / "encoder.safetensors", tmp_path)
    tokenizer = f"dalle:{tmp_path / 'encoder.safetensors'}"
    tokenize(settings(shards, tmp_path / "cache", data, tokenizer=tokenizer), "")
    (tmp_path / "encoder.safetensors").unlink()
    config = training(shards, tmp_path / "run", f"cache:{tmp_path / 'cache'}", steps=1, warmup=0, stop_at=0)
    pretrain(config)
    said = capsys.readouterr().out
    assert "no picture of the masked branch" in said and "done after step 1" in said
    assert reported[0].token_size == 32 and reported[1] is None
    # Computing goes on with the same weights wherever they lie, and with no others.
    torch.manual_seed(1)
    save_file(DalleEncoder(20, hidden=8, blocks_per_group=1).state_dict(), tmp_path / "other.safetensors")
    moved, other = (
        f"dalle:{folder / name}" for folder, name in ((data, "encoder.safetensors"), (tmp_path, "other.safetensors"))
    )
    with pytest.raises(ValueError, match=r"another run: visual tokens was dalle \w{12}, is dalle \w{12}\. Use another"):
        pretrain(replace(config, visual_tokens=other, steps=2))
    pretrain(replace(config, visual_tokens=moved, steps=2))
    assert "done after step 2" in capsys.readouterr().out
    values = json.loads((tmp_path / "cache" / MANIFEST).read_text())
    (tmp_path / "cache" / MANIFEST).write_text(json.dumps({**values, "precision": "fp16"}))
    opened = open_token_cache(config)
    assert opened is not None
    check_token_cache(config, opened, index, crop_plan(config, index), CpuDecoder(32), WORLD)
    assert "how many are the same here (precision was fp16, is fp32) is not known without" in capsys.readouterr().out


def test_fit_makes_the_codebook_of_the_training(shards: str, index: ShardIndex, tmp_path: Path, capsys: Any) -> None:
    from farl.tokens.__main__ import main

    out = tmp_path / "codebook.safetensors"
    assert main(["fit", "--data", shards, "--out", str(out), "--model", "farl-micro"]) == 0
    assert f"{out}: 16 tokens for patches of 8 pixels" in capsys.readouterr().out
    fitted = fit_codebook(training(shards, tmp_path, "codebook"), index, WORLD)
    assert tokenizer_hash(command.read_codebook(str(out))) == tokenizer_hash(fitted)
    with pytest.raises(ValueError, match="has no checkpoint with a codebook"):
        command.read_codebook(str(tmp_path))


@pytest.mark.slow
def test_the_report_of_a_run_from_a_cache_shows_its_tokens(
    shards: str, make: Callable[..., Path], tmp_path: Path
) -> None:
    for tokenizer in ("codebook", "dalle"):
        run_dir = tmp_path / tokenizer
        tokens = f"cache:{make(tokenizer=tokenizer)}"
        pretrain(training(shards, run_dir, tokens, steps=1, warmup=0, stop_at=0))
        assert (run_dir / "report" / "masked_patches.png").is_file()
