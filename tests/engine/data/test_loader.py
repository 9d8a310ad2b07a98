from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from farl_engine.data import BadDataError, Batch, CpuDecoder, CropPlan, Loader, MixedOrder, SampleOrder, ShardIndex
from farl_engine.data.samples import decode_caption, replacement

PLAN = CropPlan(scale=(0.5, 1.0), color_jitter=0.2)


def make_loader(index: ShardIndex, global_batch: int = 8, **options: object) -> Loader:
    order = options.pop("order", None) or SampleOrder(len(index), global_batch, seed=5)
    decoder = options.pop("decoder", None) or CpuDecoder(16, token_size=8)
    return Loader(index, order, decoder=decoder, plan=PLAN, seed=5, **options)


def take(loader: Loader) -> list[Batch]:
    with loader:
        return list(loader)


def same(a: Batch, b: Batch) -> bool:
    tensors = ("ids", "used_ids", "views", "images", "token_images")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors) and (
        a.step,
        a.captions,
        a.text,
    ) == (b.step, b.captions, b.text)


def joined(batches: list[list[Batch]]) -> list[Batch]:
    """The batches of several ranks put together step by step."""
    names = ("ids", "used_ids", "views", "images", "token_images")
    return [
        Batch(
            parts[0].step,
            **{name: torch.cat([getattr(part, name) for part in parts]) for name in names},
            captions=[caption for part in parts for caption in part.captions],
        )
        for parts in zip(*batches, strict=True)
    ]


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("farl-loader")]


@pytest.fixture
def index(make_shards) -> ShardIndex:
    return ShardIndex.build(make_shards([9, 3, 11]))


@pytest.fixture
def faulty(tmp_path: Path, make_shards, tools) -> ShardIndex:
    """40 good samples, and a shard of one bad sample for each cause but 'unreadable'."""
    encode, picture, write_tar = tools
    make_shards([20, 20])
    jpeg = encode(picture(60, 60))
    bad = {
        "html": (b"<html>404</html>", b"c"),
        "cut": (jpeg[: len(jpeg) // 2], b"c"),
        "blank": (jpeg, b" \n\t"),
        "bytes": (b"\xff" * 100, b"c"),
        "latin": (jpeg, "caf\xe9".encode("latin-1")),
    }
    write_tar(
        tmp_path / "z-bad.tar",
        [(f"{k}.{e}", d) for k, pair in bad.items() for e, d in zip(("jpg", "txt"), pair, strict=True)],
    )
    return ShardIndex.build(tmp_path)


def test_a_batch_is_what_its_samples_are(index):
    loader = make_loader(index, text_transform=lambda captions: [len(c) for c in captions], end_step=4)
    order, decoder = loader.order, CpuDecoder(16, token_size=8)
    for step, batch in enumerate(take(loader)):
        assert batch.step == step
        assert np.array_equal(batch.ids, order.ids(step)) and np.array_equal(batch.views, order.views(step))
        assert torch.equal(batch.ids, batch.used_ids) and batch.ids.dtype == torch.int64
        parameters = PLAN.parameters(5, batch.ids.numpy(), batch.views.numpy())
        for i, sample in enumerate(batch.ids.tolist()):
            image, tokens = decoder.decode(index.read(sample)[0], PLAN, parameters[i])
            assert np.array_equal(batch.images[i], image) and np.array_equal(batch.token_images[i], tokens)
            assert batch.captions[i] == f"caption {sample}"
        assert batch.text == [len(c) for c in batch.captions]
    assert step == 3 and loader.samples_seen == 32


@pytest.mark.parametrize("which", ["index", "faulty"])
def test_ranks_threads_and_restarts_never_show(which, request):
    index = request.getfixturevalue(which)
    reference = take(make_loader(index, threads=0, end_step=12))
    assert len(reference) == 12
    for threads, prefetch in ((1, 1), (3, 2), (8, 5)):
        batches = take(make_loader(index, threads=threads, prefetch=prefetch, end_step=12))
        assert all(same(a, b) for a, b in zip(batches, reference, strict=True))
    for world_size in (2, 4, 8):
        ranks = [take(make_loader(index, rank=r, world_size=world_size, end_step=12)) for r in range(world_size)]
        assert all(same(a, b) for a, b in zip(joined(ranks), reference, strict=True))
    for start in (1, 5, 11):
        resumed = take(make_loader(index, start_step=start, end_step=12))
        assert all(same(a, b) for a, b in zip(resumed, reference[start:], strict=True))


def test_global_batches_larger_than_a_chunk(index):
    reference = take(make_loader(index, 80, threads=0, end_step=3))
    batches = take(make_loader(index, 80, threads=4, end_step=3))
    assert all(same(a, b) for a, b in zip(batches, reference, strict=True))


def test_mixed_sources(make_shards):
    indexes = [ShardIndex.build(make_shards([6], name="a")), ShardIndex.build(make_shards([4, 5], name="b"))]
    index = ShardIndex.concatenate(indexes)
    order = MixedOrder([SampleOrder(len(one), 8, seed) for seed, one in enumerate(indexes)], [1, 1])
    for batch in take(make_loader(index, order=order, end_step=5)):
        assert np.array_equal(batch.ids, order.ids(batch.step))
        numbers = [i if i < 6 else i - 6 for i in batch.ids.tolist()]
        assert batch.captions == [f"caption {n}" for n in numbers]


def test_bad_samples_are_replaced_and_counted(faulty, caplog):
    with caplog.at_level(logging.WARNING):
        loader = make_loader(faulty, 9, end_step=5, threads=3)
        batches = take(loader)
    ids = torch.cat([batch.ids for batch in batches])
    used = torch.cat([batch.used_ids for batch in batches])
    assert sorted(ids.tolist()) == list(range(45))
    bad = {i for i in range(45) if faulty.key(i) in ("html", "cut", "blank", "bytes")}
    assert {int(i) for i in ids[ids != used]} == bad and not bad & set(used.tolist())
    for sample in bad:
        stand_in, attempt = replacement(5, sample, 0, 45), 1
        while stand_in in bad:
            stand_in, attempt = replacement(5, sample, attempt, 45), attempt + 1
        assert used[ids == sample].item() == stand_in
    # A stand-in looks as it does in its own right, seen with the view of the one it replaces.
    images = torch.cat([batch.images for batch in batches])
    views = torch.cat([batch.views for batch in batches])
    for i in torch.nonzero(ids != used).flatten().tolist():
        parameters = PLAN.parameters(5, used[i : i + 1].numpy(), views[i : i + 1].numpy())[0]
        assert np.array_equal(images[i], CpuDecoder(16).decode(faulty.read(int(used[i]))[0], PLAN, parameters)[0])
    assert {"not_an_image", "truncated", "missing_caption"} == loader.bad_samples.keys()
    assert sum(loader.bad_samples.values()) >= 4
    assert loader.bad_by_shard == {"z-bad.tar": sum(loader.bad_samples.values())}
    assert (
        loader.repaired_captions == sum(caption == "caf\ufffd" for batch in batches for caption in batch.captions) > 0
    )
    assert caplog.text.count("bad sample no.") == 1 and "z-bad.tar" in caplog.text


def test_visual_tokens_belong_to_the_samples_that_were_used(faulty):
    asked = []

    def tokens(ids: np.ndarray, views: np.ndarray) -> torch.Tensor:
        asked.append((ids.dtype, views.dtype, len(ids)))
        return torch.from_numpy(np.stack([ids, views], axis=1))

    batches = take(make_loader(faulty, 9, end_step=5, visual_tokens=tokens))
    assert len(asked) == 5 and set(asked) == {(np.dtype(np.int64), np.dtype(np.int64), 9)}
    assert any(not torch.equal(batch.ids, batch.used_ids) for batch in batches)
    for batch in batches:
        assert torch.equal(batch.visual_tokens, torch.stack([batch.used_ids, batch.views], dim=1))
    assert take(make_loader(faulty, end_step=1))[0].visual_tokens is None


def test_logging_of_bad_samples_is_bounded(faulty, caplog):
    from farl_engine.data.bad_data import BadSampleLedger

    ledger = BadSampleLedger(1.0)
    for _ in range(250):
        ledger.add(100, [("empty", "s.tar", "m")] * 10)
    assert caplog.text.count("bad sample no.") == 3
    assert len(ledger._recent) <= 101


def test_too_many_bad_samples_stop_the_run(tmp_path, make_shards, tools):
    make_shards([60])
    members = [(f"{i}.{e}", d) for i in range(12) for e, d in (("jpg", b"<html>"), ("txt", b"c"))]
    tools[2](tmp_path / "worst.tar", members)
    index = ShardIndex.build(tmp_path)
    loader = make_loader(index, 12, end_step=30)
    for batch in loader:
        if batch.step == 0:
            loader.check_bad()
    with pytest.raises(BadDataError, match=r"\(1\d\.\d%, allowed 5\.0%\): not_an_image \d+; worst shard worst\.tar"):
        loader.check_bad()
    tolerant = make_loader(index, 12, end_step=30, max_bad_fraction=0.3)
    take(tolerant)
    tolerant.check_bad()
    strict = make_loader(index, 72, end_step=1, max_bad_fraction=0.0)
    take(strict)
    with pytest.raises(BadDataError, match=r"allowed 0\.0%"):
        strict.check_bad()


def test_only_recent_samples_count():
    from farl_engine.data.bad_data import BadSampleLedger

    ledger = BadSampleLedger(0.05)
    ledger.add(1000, [("empty", "a.tar", "m")] * 200)
    with pytest.raises(BadDataError, match=r"200 of 1000"):
        ledger.check()
    for _ in range(10):
        ledger.add(1000, [])
    ledger.check()
    ledger.add(10_000, [("corrupt", "a.tar", "m")] * 300 + [("corrupt", "b.tar", "m")] * 301)
    with pytest.raises(BadDataError, match=r"601 of 10000 .*6\.0%.*worst shard b\.tar \(301\)"):
        ledger.check()


def test_samples_that_the_index_left_out_count_too(tmp_path, make_shards, tools):
    make_shards([30])
    tools[2](tmp_path / "half.tar", [(f"{i}.jpg", b"1") for i in range(25)])
    loader = make_loader(ShardIndex.build(tmp_path))
    with pytest.raises(
        BadDataError, match=r"25 of 55 of the indexed samples.*missing_caption 25; worst shard half\.tar"
    ):
        loader.check_bad()


def test_nothing_but_bad_samples_ends_at_once(tmp_path, tools):
    tools[2](tmp_path / "a.tar", [(f"{i}.{e}", b"?") for i in range(5) for e in ("jpg", "txt")])
    for threads in (0, 2):
        with pytest.raises(BadDataError, match=r"20 replacements in a row were bad.*not_an_image in a\.tar"):
            take(make_loader(ShardIndex.build(tmp_path), threads=threads))
    assert not loader_threads()


def test_a_shard_that_vanishes_becomes_bad_samples(tmp_path, make_shards, monkeypatch):
    paths = make_shards([20, 4])
    index = ShardIndex.build(paths)
    sleeps: list[float] = []
    monkeypatch.setattr("farl_engine.data.shard_files.time.sleep", sleeps.append)
    paths[1].unlink()
    loader = make_loader(index, 8, end_step=3)
    batches = take(loader)
    assert sorted(torch.cat([b.ids for b in batches]).tolist()) == list(range(24))
    assert max(torch.cat([b.used_ids for b in batches]).tolist()) < 20
    assert loader.bad_samples.keys() == {"unreadable"} and loader.bad_by_shard.keys() == {"train-0001.tar"}
    loader = make_loader(index, 8, end_step=20)
    take(loader)
    with pytest.raises(BadDataError, match=r"unreadable \d+; worst shard train-0001\.tar"):
        loader.check_bad()
    # Each thread may have met the shard before it was given up; after that nobody waits for it.
    assert len(sleeps) <= 3 * 2


def test_an_error_in_a_thread_reaches_the_consumer(index):
    class Broken(CpuDecoder):
        def decode_into(self, *args, **kwargs):
            raise ZeroDivisionError("the decoder is broken")

    with pytest.raises(ZeroDivisionError, match="the decoder is broken") as caught:
        take(make_loader(index, decoder=Broken(16)))
    assert "decode of sample" in caught.value.__notes__[0]

    def transform(captions: list[str]) -> None:
        raise KeyError("no such token")

    with pytest.raises(KeyError, match="no such token") as caught:
        take(make_loader(index, text_transform=transform))
    assert "text of step" in caught.value.__notes__[0]
    assert not loader_threads()


def test_an_error_is_known_before_the_batches_ahead_of_it_are_used(index):
    class BrokenLater(SampleOrder):
        def ids(self, step: int) -> np.ndarray:
            if step == 2:
                raise ZeroDivisionError("the order is broken")
            return super().ids(step)

    with make_loader(index, order=BrokenLater(len(index), 8, 0), prefetch=3) as loader:
        assert loader.error is None
        iterator = iter(loader)
        deadline = time.monotonic() + 20
        while not (loader.error and loader.stage_times()["queue_depth"] == 2) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert isinstance(loader.error, ZeroDivisionError)
        assert [next(iterator).step for _ in range(2)] == [0, 1]
        with pytest.raises(ZeroDivisionError):
            next(iterator)


def test_a_hung_stage_is_reported(index):
    release = threading.Event()

    class Hung(CpuDecoder):
        def decode_into(self, *args, **kwargs):
            release.wait(30)
            super().decode_into(*args, **kwargs)

    start = time.monotonic()
    loader = make_loader(index, decoder=Hung(16, token_size=8), stall_timeout=0.3)
    with pytest.raises(TimeoutError, match=r"no batch for step 0 within 0\.3 s .*decode of sample \d+"):
        next(iter(loader))
    loader.close()
    assert time.monotonic() - start < 5
    release.set()


def test_threads_end_with_the_iteration(index):
    take(make_loader(index, threads=3, end_step=2))
    assert not loader_threads()
    loader = make_loader(index, threads=3)
    for batch in loader:
        if batch.step == 1:
            break
    # The `for` held the only reference to the iteration.
    assert not loader_threads()
    iterator = iter(loader)
    assert next(iterator).step == 0 and len(loader_threads()) == 3
    start = time.monotonic()
    loader.close()
    loader.close()
    assert not loader_threads() and time.monotonic() - start < 1
    iterator = iter(loader)
    assert next(iterator).step == 0
    # A second iteration takes the place of the first.
    second = iter(loader)
    assert next(iterator, None) is None and next(second).step == 0
    assert len(loader_threads()) == 3
    del iterator, second
    assert not loader_threads()


def test_no_more_than_prefetch_batches_are_made_ahead(index):
    started: list[int] = []

    class Watched(SampleOrder):
        def ids(self, step: int) -> np.ndarray:
            started.append(step)
            return super().ids(step)

    with make_loader(index, order=Watched(len(index), 8, 0), threads=4, prefetch=3) as loader:
        iterator = iter(loader)
        for step in range(5):
            assert next(iterator).step == step
            time.sleep(0.02)
            assert max(started) <= step + 3
        deadline = time.monotonic() + 20
        while loader.stage_times()["queue_depth"] < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert loader.stage_times()["queue_depth"] == 3 and max(started) == 7


def test_stage_times_say_where_the_time_goes(index):
    def slow(captions: list[str]) -> None:
        time.sleep(0.05)

    with make_loader(index, text_transform=slow, end_step=4, threads=1) as loader:
        for _ in loader:
            pass
        times = loader.stage_times()
        stages = {"read", "decode", "text", "device_decode", "wait_for_batch", "queue_depth"}
        stages |= {"mean_queue_depth", "threads"}
        assert set(times) == stages and times["threads"] == 1 and times["device_decode"] == 0
        assert 0.2 <= times["text"] < 1 and times["wait_for_batch"] > 0.1 and times["read"] > 0 and times["decode"] > 0
        assert sum(loader.stage_times().values()) == times["threads"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world_size": 3}, "global batch 8 is not divisible by the world size 3"),
        ({"rank": 2, "world_size": 2}, r"rank must be in 0\.\.1, got 2"),
        ({"threads": -1}, "threads must be at least 0, got -1"),
        ({"prefetch": 0}, "prefetch must be at least 1"),
        ({"stall_timeout": 0}, "stall_timeout must be above 0"),
        ({"max_bad_fraction": 2}, r"max_bad_fraction must be in 0\.\.1, got 2"),
        ({"order": SampleOrder(7, 8, 0)}, "order is of 7 samples, but the index has 23"),
    ],
)
def test_wrong_arguments_get_one_line(index, options, message):
    with pytest.raises(ValueError, match=message):
        make_loader(index, **options)


def test_captions_are_utf8():
    assert decode_caption(" Ä\n".encode()) == ("Ä", False)
    assert decode_caption(b"\xef\xbb\xbfbom") == ("bom", False)
    assert decode_caption(b"caf\xe9 noir") == ("caf\ufffd noir", True)


def test_batches_move_as_a_whole(index):
    class Text:
        device = "cpu"

        def to(self, device, non_blocking=False):
            self.device = device
            return self

    batch = next(iter(make_loader(index, text_transform=lambda captions: Text(), device="meta")))
    assert {batch.ids.device.type, batch.images.device.type, batch.token_images.device.type} == {"meta"}
    assert batch.text.device.type == "meta" and len(batch.captions) == 8


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_threads_and_files_stay_flat(faulty):
    loader = make_loader(faulty, 45, threads=2)
    steps = iter(loader)
    for _ in range(15):
        next(steps)
    before, files = resident_bytes(), len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(40):
        next(steps)
    assert resident_bytes() - before < 8 << 20
    assert len(list(Path("/proc/self/fd").iterdir())) <= files + 1
    del steps
    loader.close()
    assert not loader_threads()
