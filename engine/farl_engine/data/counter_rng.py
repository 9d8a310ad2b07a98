"""Counter-based random numbers: the same counters give the same numbers, in any order, on any machine.

Built on the finaliser of splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014).
All arithmetic is uint64 modulo 2^64, vectorised in numpy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def as_words(values: ArrayLike) -> NDArray[np.uint64]:
    """Integers of any kind, negative ones included, as uint64 words (two's complement)."""
    if isinstance(values, int):
        return np.array(values & 0xFFFFFFFFFFFFFFFF, dtype=np.uint64)
    return np.asarray(values).astype(np.int64, copy=False).view(np.uint64)


def mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One splitmix64 output for each counter; a bijection of 64-bit words."""
    # A 0-d input turns into a numpy scalar on the way, and scalars warn when they wrap; arrays do not.
    z = np.atleast_1d(words) + _GOLDEN
    z ^= z >> np.uint64(30)
    z *= _MIX_1
    z ^= z >> np.uint64(27)
    z *= _MIX_2
    z ^= z >> np.uint64(31)
    return z.reshape(np.shape(words))


def combine(*counters: ArrayLike) -> NDArray[np.uint64]:
    """A hash of several broadcastable integer counters, e.g. `combine(seed, epoch)`; their order matters."""
    state = np.zeros((), np.uint64)
    for counter in counters:
        state = mix(state ^ mix(as_words(counter)))
    return state


def unit_floats(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Words to float64 in [0, 1): the top 53 bits."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
