from __future__ import annotations

import numpy as np
import torch

from farl_kernels.patch_masking import counter_random as cr

# The generator's published sequence for seed 1234567 (rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64).
PUBLISHED = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]


def _as_uint64(values: torch.Tensor) -> list[int]:
    return [int(v) & (2**64 - 1) for v in values.flatten()]


def test_published_sequence() -> None:
    assert _as_uint64(cr.draws(torch.tensor([1234567]), 0, 5)) == PUBLISHED
    assert cr.draws_numpy(np.array([1234567], dtype=np.uint64), 0, 5)[0].tolist() == PUBLISHED
    golden = cr.GOLDEN
    assert [cr.mix64_int(1234567 + (j + 1) * golden) for j in range(5)] == PUBLISHED


def test_draws_do_not_depend_on_where_the_reading_starts() -> None:
    keys = torch.tensor([3, -7, 2**62])
    assert torch.equal(cr.draws(keys, 0, 10)[:, 4:], cr.draws(keys, 4, 6))


def test_numpy_and_torch_keys_are_equal_at_the_ends_of_int64() -> None:
    ids = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63)])
    views = torch.tensor([0, 5, 2**40, -3, 2**63 - 1])
    for seed in (0, 1, -1, 2**63, 2**80 + 5):
        expected = cr.sample_keys_numpy(ids.numpy(), views.numpy(), seed).tolist()
        assert _as_uint64(cr.sample_keys(ids, views, seed)) == expected


def test_id_view_and_seed_all_change_the_key() -> None:
    ids = torch.arange(50).repeat_interleave(50)
    views = torch.arange(50).repeat(50)
    keys = torch.cat([cr.sample_keys(ids, views, seed) for seed in range(4)])
    assert len(keys.unique()) == 4 * 2500
    ones = torch.stack([(keys >> bit) & 1 for bit in range(64)]).double().mean(1)
    assert (ones - 0.5).abs().max() < 5 * 0.5 / 10_000**0.5  # every bit is 1 half of the time
