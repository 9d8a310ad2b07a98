"""A list beside a shard takes samples out of the index, and only those."""

from __future__ import annotations

import os

import pytest

from farl_engine.data import ShardIndex
from farl_engine.data.exclusions import exclusion_path, read_exclusions, write_exclusions


def test_listed_samples_are_left_out_but_not_bad(make_shards):
    first, second = make_shards([3, 3])
    whole = ShardIndex.build([first, second])
    write_exclusions(first, {"000001": "small", "nothing": "small"})
    write_exclusions(second, {"000003": "nsfw", "000005": "nsfw"})
    index = ShardIndex.build([first, second])
    assert [index.key(i) for i in range(len(index))] == ["000000", "000002", "000004"]
    assert index.problems == {"filtered": 3} and index.excluded == 0
    assert index.fingerprint != whole.fingerprint
    assert index.read(2) == whole.read(4)

    for shard in (first, second):
        write_exclusions(shard, {})
        assert not exclusion_path(shard).exists()
    assert ShardIndex.build([first, second]).fingerprint == whole.fingerprint


def test_the_list_reads_back_and_an_equal_one_is_not_written_again(tmp_path):
    shard = tmp_path / "a.b.tar"
    causes = {"x/1": "small", 'q"\n2': "nsfw", "ä": "small"}
    write_exclusions(shard, causes)
    assert exclusion_path(shard).name == "a.b.exclude.jsonl"
    assert read_exclusions(shard) == {key.encode(): cause for key, cause in causes.items()}
    os.utime(exclusion_path(shard), ns=(5, 5))
    write_exclusions(shard, causes)
    assert exclusion_path(shard).stat().st_mtime_ns == 5
    assert list(tmp_path.iterdir()) == [exclusion_path(shard)]


@pytest.mark.parametrize("line", ["", "{}", '["a"]', '[1, "x"]', "nonsense", '["a", "b"'])
def test_a_damaged_list_does_not_pass_for_an_empty_one(make_shards, line):
    (shard,) = make_shards([2])
    exclusion_path(shard).write_text('["000000", "small"]\n' + line + "\n")
    with pytest.raises(ValueError, match="line 2 is not"):
        ShardIndex.build([shard])
