"""What --data may say, and what the trainer makes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from farl.shards import describe_mix, open_shards, parse_sources, sample_order
from farl_engine import stop
from farl_engine.data import MixedOrder, SampleOrder, ShardIndex, ShardWriter
from farl_engine.data.shard_cache import ShardCache
from farl_engine.distributed import World

WORLD = World(rank=0, size=1, device=torch.device("cpu"), control=None)


def write(folder: Path, count: int, name: str = "a") -> Path:
    with ShardWriter(folder / name / "s-%d.tar", 5) as writer:
        for i in range(count):
            writer.write(f"{name}{i}", {"jpg": b"1", "txt": "c"})
    return folder / name


@pytest.mark.parametrize(
    ("text", "sources"),
    [
        ("a.tar", [(("a.tar",), None)]),
        ("a/*.tar  b-{00..10}.tar", [(("a/*.tar", "b-{00..10}.tar"), None)]),
        ("3=a/*.tar 1=b/*.tar", [(("a/*.tar",), 3), (("b/*.tar",), 1)]),
        (".5=a 1.=b", [(("a",), 0.5), (("b",), 1)]),
        ("'my faces/*.tar'", [(("my faces/*.tar",), None)]),
        (r"my\ faces/*.tar", [(("my faces/*.tar",), None)]),
        # Nothing of a pattern, URL or command is taken for a weight.
        ("https://h/a.tar?n=3", [(("https://h/a.tar?n=3",), None)]),
        ("2=https://h/a.tar?n=3 1=year=2024/a.tar", [(("https://h/a.tar?n=3",), 2), (("year=2024/a.tar",), 1)]),
        ("./3=a.tar", [(("./3=a.tar",), None)]),
        ("1='pipe:aws s3 cp s3://b/{0..3}.tar -' 1=b", [(("pipe:aws s3 cp s3://b/{0..3}.tar -",), 1), (("b",), 1)]),
        ("3=a/[0-9]?.tar 1=*", [(("a/[0-9]?.tar",), 3), (("*",), 1)]),
    ],
)
def test_sources(text: str, sources: list[tuple[tuple[str, ...], float | None]]) -> None:
    parsed = [(s.patterns, None if s.weight is None else float(s.weight)) for s in parse_sources(text)]
    assert parsed == sources


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no shards given"),
        ("'a", "a quote in 'a has no partner"),
        ("3=a b", "b has no weight: write WEIGHT=SHARDS for each source, or for none"),
        ("0=a 1=b", "0=a has weight 0: leave that source out"),
    ],
)
def test_what_cannot_be_understood_is_said(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_sources(text)
    with pytest.raises(ValueError, match=f"^--data: {problem}"):
        open_shards("--data", text, WORLD, 0.05)


def test_a_mix_is_described_in_smallest_numbers() -> None:
    mixes = {"a b": "none", "3=a": "none", "'": "none", "3=a 1=b": "3:1", "0.7=a 0.30=b": "7:3", "2=a 4=b 6=c": "1:2:3"}
    assert {text: describe_mix(text) for text in mixes} == mixes


def test_a_mix_is_read_in_its_proportions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path, 12), write(tmp_path, 7, "b")
    text = f"3={a}/*.tar 1={b}"
    index = open_shards("--data", text, WORLD, 0.05)
    said = capsys.readouterr().out
    assert "19 pairs in 5 shards" in said
    assert f"75.00% of the samples from {a}/*.tar: 12 pairs in 3 shards" in said
    assert f"25.00% of the samples from {b}: 7 pairs in 2 shards" in said
    order = sample_order(text, index, 8, seed=1)
    assert isinstance(order, MixedOrder)
    for step in range(20):
        keys = [index.key(i) for i in order.ids(step)]
        assert sum(key.startswith("a") for key in keys) == 6
    # Each source has its own epochs.
    views = np.concatenate([order.views(step) for step in range(7)])
    assert views.max() == 3
    again = sample_order(text, open_shards("--data", text, WORLD, 0.05), 8, seed=1)
    assert np.array_equal(again.ids(13), order.ids(13))
    other = open_shards("--data", f"1={b} 3={a}/*.tar", WORLD, 0.05)
    assert other.fingerprint != index.fingerprint


def test_sources_of_equal_size_do_not_go_in_step(tmp_path: Path) -> None:
    text = f"1={write(tmp_path, 40)} 1={write(tmp_path, 40, 'b')}"
    index = open_shards("--data", text, WORLD, 0.05)
    order = sample_order(text, index, 80, seed=0)
    ids = order.ids(0)
    assert not np.array_equal(ids[ids < 40], ids[ids >= 40] - 40)


def test_patterns_without_weights_are_one_set(tmp_path: Path) -> None:
    a, b = write(tmp_path, 12), write(tmp_path, 7, "b")
    index = open_shards("--data", f"{b} {a}/*.tar {a}", WORLD, 0.05)
    assert index.fingerprint == ShardIndex.build([a, b]).fingerprint
    order = sample_order(f"{b} {a}", index, 8, seed=1)
    assert isinstance(order, SampleOrder) and order.num_samples == 19
    single = sample_order(f"3={a}", open_shards("--data", f"3={a}", WORLD, 0.05), 4, seed=1)
    assert isinstance(single, SampleOrder)


def test_advice_for_a_pattern_that_names_nothing(tmp_path: Path) -> None:
    write(tmp_path, 2, "my faces")
    with pytest.raises(ValueError, match="a path that holds a space needs quotes of its own"):
        open_shards("--data", f"{tmp_path}/my faces/*.tar", WORLD, 0.05)
    assert len(open_shards("--data", f"'{tmp_path}/my faces/*.tar'", WORLD, 0.05)) == 2
    with pytest.raises(ValueError, match=r"a weight stands before its source, as in '3=a/\*\.tar 1=b/\*\.tar'"):
        open_shards("--data", f"{tmp_path}/*.tar=3", WORLD, 0.05)


def test_remote_shards_need_a_cache(tmp_path: Path) -> None:
    shard = write(tmp_path, 3) / "s-0.tar"
    with pytest.raises(ValueError, match=r"^--data: pipe:cat .* is not on this machine; .*--shard-cache DIR"):
        open_shards("--data", f"'pipe:cat {shard}'", WORLD, 0.05)
    index = open_shards("--data", f"3='pipe:cat {shard}' 1={shard}", WORLD, 0.05, ShardCache(f"{tmp_path}/cache"))
    assert [part.fingerprint for part in index.parts] == [ShardIndex.build(shard).fingerprint] * 2


def test_a_stop_signal_ends_the_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path, 12)
    monkeypatch.setattr(stop, "requested", lambda: "SIGTERM")
    with pytest.raises(SystemExit) as leaving:
        open_shards("--data", str(folder), WORLD, 0.05)
    assert leaving.value.code == 0 and "stopped by SIGTERM before the first step" in capsys.readouterr().out
    monkeypatch.undo()
    assert list(folder.glob(".*.part-*"))
    assert len(open_shards("--data", str(folder), WORLD, 0.05)) == 12


def test_a_machine_that_sees_other_files_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path, 3)
    gather: Callable[[World, str], list[str]] = lambda world, mine: [mine, "other"]
    monkeypatch.setattr("farl.shards.gather_objects", gather)
    with pytest.raises(ValueError, match="the processes see different files"):
        open_shards("--data", str(folder), WORLD, 0.05)
