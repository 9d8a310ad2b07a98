from __future__ import annotations

import pytest
import torch

from farl.buckets import SMALLEST, bucket_of, padded
from farl.step import pack_parts

CAPTIONS = ["a face", "a smiling woman with glasses", "an old man in a red hat", "a child", "two men"]


def test_padding_is_less_than_a_sixteenth() -> None:
    shares = {tokens: (bucket_of(tokens) - tokens) / tokens for tokens in range(256, 20_000)}
    assert min(shares.values()) == 0 and max(shares.values()) < 1 / 16
    for power in range(256, 16_384, 256):
        octave = [shares[tokens] for tokens in range(power, min(2 * power, 20_000))]
        assert sum(octave) / len(octave) < 0.04


def test_buckets_are_few_and_round() -> None:
    assert len({bucket_of(tokens) for tokens in range(8_193, 16_385)}) == 16
    assert all(bucket_of(tokens) % SMALLEST == 0 for tokens in range(1, 5_000))
    assert [bucket_of(tokens) for tokens in (1, 16, 17, 256, 257, 1_025)] == [16, 16, 32, 256, 272, 1_088]


@pytest.mark.parametrize("micro_batch", [0, 2])
def test_padded_captions_are_the_same_captions(micro_batch: int) -> None:
    plain, wide = pack_parts(CAPTIONS, micro_batch).parts, pack_parts(CAPTIONS, micro_batch, pad=True).parts
    (length,) = {len(part.tokens) for part in wide}
    assert length == bucket_of(max(len(part.tokens) for part in plain))
    for before, after in zip(plain, wide, strict=True):
        assert torch.equal(after.cu_seqlens, before.cu_seqlens) and after.max_seqlen == 77
        assert torch.equal(after.tokens[: len(before.tokens)], before.tokens)
        assert after.tokens[len(before.tokens) :].eq(0).all()
    assert padded(wide, 77)[0].tokens.shape == (length,)
