"""Counter-based random numbers, equal to the last bit on every device, torch and numpy version.

SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014): the generator with state `key`
has `mix64(key + (j + 1) * GOLDEN)` as draw `j`, so draw `j` needs no draw before it. The key of a sample is mixed from
(seed, sample id, view). Everything is 64-bit integer arithmetic with wrap-around: int64 in torch (and Triton), where a
logical right shift is an arithmetic one with the sign bits cleared, uint64 in numpy.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
_FACTOR_1 = 0xBF58476D1CE4E5B9
_FACTOR_2 = 0x94D049BB133111EB
_WORD = (1 << 64) - 1


def signed(value: int) -> int:
    """The int64 with the bits of the low 64 bits of `value`."""
    value &= _WORD
    return value - (1 << 64) if value >> 63 else value


def mix64_int(value: int) -> int:
    """SplitMix64's finaliser of one Python integer, in 0..2^64-1."""
    value &= _WORD
    value = ((value ^ (value >> 30)) * _FACTOR_1) & _WORD
    value = ((value ^ (value >> 27)) * _FACTOR_2) & _WORD
    return value ^ (value >> 31)


def logical_right_shift(values: Tensor, bits: int) -> Tensor:
    """int64 -> int64, zeros shifted in."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def mix64(values: Tensor) -> Tensor:
    """SplitMix64's finaliser of an int64 tensor of any shape."""
    values = (values ^ logical_right_shift(values, 30)) * signed(_FACTOR_1)
    values = (values ^ logical_right_shift(values, 27)) * signed(_FACTOR_2)
    return values ^ logical_right_shift(values, 31)


def seed_state(seed: int) -> int:
    """What every key of a `seed` (any integer) is mixed from, as int64."""
    return signed(mix64_int(seed + GOLDEN))


def sample_keys(sample_ids: Tensor, views: Tensor, seed: int) -> Tensor:
    """int64 [B], int64 [B] -> the generator state of each (seed, sample id, view), int64 [B]."""
    return mix64(mix64(sample_ids + seed_state(seed)) + views)


def draws(keys: Tensor, first: int, count: int) -> Tensor:
    """int64 [B] -> int64 [B, count]: draws `first` .. `first + count - 1` of every generator, 64 random bits each."""
    counters = torch.arange(first + 1, first + count + 1, device=keys.device, dtype=torch.int64) * signed(GOLDEN)
    return mix64(keys[:, None] + counters)


def mix64_numpy(values: np.ndarray) -> np.ndarray:
    """As :func:`mix64`, uint64 array."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_FACTOR_1)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_FACTOR_2)
    return values ^ (values >> np.uint64(31))


def sample_keys_numpy(sample_ids: np.ndarray, views: np.ndarray, seed: int) -> np.ndarray:
    """As :func:`sample_keys`: int64 [B], int64 [B] -> uint64 [B]."""
    first = np.uint64(mix64_int(seed + GOLDEN))
    return mix64_numpy(mix64_numpy(sample_ids.astype(np.uint64) + first) + views.astype(np.uint64))


def draws_numpy(keys: np.ndarray, first: int, count: int) -> np.ndarray:
    """As :func:`draws`: uint64 [B] -> uint64 [B, count]."""
    counters = np.arange(first + 1, first + count + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    return mix64_numpy(keys[:, None] + counters)
