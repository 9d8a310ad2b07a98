"""Which sample comes at which step: a pure function of (seed, position), so nothing has to be saved to resume.

Position p of the global stream belongs to epoch p // N. Within an epoch the stream is a keyed permutation of 0..N-1,
so every sample comes once an epoch; a global batch that crosses the end of an epoch goes on into the next one. World
size, threads and restarts do not appear anywhere: rank r of W takes the r-th of W equal slices of a step's ids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from farl_engine.data.counter_rng import combine, mix

ROUNDS = 8
_MIX_BLOCK = 1 << 16


def permute(
    values: NDArray[np.uint64], size: int, keys: NDArray[np.uint64], rounds: int = ROUNDS
) -> NDArray[np.uint64]:
    """Keyed permutation of 0..size-1, evaluated at `values`, each under its own key.

    The generalised Feistel network FE1 of Black and Rogaway ("Ciphers with arbitrary finite domains", CT-RSA 2002) on
    a x b >= size, with cycle walking: outputs outside the domain are encrypted again until they fall inside.

    Args:
        values: uint64 [n], each below `size`.
        size: number of elements, at least 1.
        keys: uint64 [n]; equal keys give the same permutation.
        rounds: Feistel rounds; even, so that the two halves end where they began.
    """
    if size == 1:
        return np.zeros_like(values)
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    out = values
    walking = np.arange(len(values))
    result = np.empty_like(values)
    # Each element's walk follows a cycle of a permutation of a x b, so it comes back inside after finitely many
    # turns.
    while len(walking):
        out = _feistel(out, keys, a, b, rounds)
        inside = out < size
        result[walking[inside]] = out[inside]
        outside = ~inside
        walking, out, keys = walking[outside], out[outside], keys[outside]
    return result


def _feistel(values: NDArray[np.uint64], keys: NDArray[np.uint64], a: int, b: int, rounds: int) -> NDArray[np.uint64]:
    moduli = (np.uint64(a), np.uint64(b))
    right, left = np.divmod(values, moduli[0])
    for i in range(rounds):
        noise = mix(keys ^ mix(right | np.uint64(i << 48)))
        left, right = right, (left + noise % moduli[i % 2]) % moduli[i % 2]
    # After an even number of rounds `left` counts modulo a again and `right` modulo b.
    return right * moduli[0] + left


class SampleOrder:
    """Order of one source of `num_samples` samples.

    Args:
        num_samples: size of the source, at least 1.
        global_batch: samples of one step over all ranks.
        seed: any integer; another seed is another order.
        num_views: with K given, views count modulo K (for a cache of K views a sample); None counts epochs.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, num_samples: int, global_batch: int, seed: int, num_views: int | None = None) -> None:
        for name, value in (("num_samples", num_samples), ("global_batch", global_batch), ("num_views", num_views)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.num_samples = num_samples
        self.global_batch = global_batch
        self.seed = seed
        self.num_views = num_views

    def ids(self, step: int) -> NDArray[np.int64]:
        """Sample ids of the whole global batch of a step, int64 [global_batch]."""
        return self.at(step_positions(step, self.global_batch))[0]

    def views(self, step: int) -> NDArray[np.int64]:
        """The view (epoch of that sample, modulo `num_views`) of each sample of a step, int64 [global_batch]."""
        return self._views(step_positions(step, self.global_batch) // self.num_samples)

    def at(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids and views, int64 [n] each, at any positions of the stream."""
        epochs, within = np.divmod(np.asarray(positions, np.int64), self.num_samples)
        ids = permute(within.astype(np.uint64), self.num_samples, combine(self.seed, epochs)).astype(np.int64)
        return ids, self._views(epochs)

    def _views(self, epochs: NDArray[np.int64]) -> NDArray[np.int64]:
        return epochs if self.num_views is None else epochs % self.num_views


class MixedOrder:
    """Several sources in given proportions; each source keeps its own order on its own counter.

    The stream repeats a pattern of at most 65,536 positions in which source k has a whole number of them in proportion
    to its weight (exactly where the weights are small whole numbers, else rounded, at least one), at equal distances.
    So in any stretch of the stream every source is within a few samples of its share. Source k's ids start at the sum
    of the sizes of the sources before it, which is how `ShardIndex.concatenate` numbers them.

    Args:
        orders: one order a source; all with the same global batch.
        weights: positive share of each source; None takes the sources' sizes.

    Raises:
        ValueError: no orders, unequal global batches, or weights that do not fit.
    """

    def __init__(self, orders: Sequence[SampleOrder], weights: Sequence[float] | None = None) -> None:
        if not orders:
            raise ValueError("orders must hold at least one SampleOrder")
        if len({order.global_batch for order in orders}) > 1:
            raise ValueError(f"orders must share one global_batch, got {[order.global_batch for order in orders]}")
        weights = [order.num_samples for order in orders] if weights is None else list(weights)
        if len(weights) != len(orders) or not all(math.isfinite(w) and w > 0 for w in weights):
            raise ValueError(f"weights must be {len(orders)} positive numbers, got {weights}")
        self.orders = list(orders)
        self.weights = weights
        self.global_batch = orders[0].global_batch
        self.num_samples = sum(order.num_samples for order in orders)
        self._slots = _apportion(weights)
        self._pattern, self._rank = _pattern(self._slots)
        self._id_offsets = np.cumsum([0] + [order.num_samples for order in orders])[:-1]

    def ids(self, step: int) -> NDArray[np.int64]:
        """Sample ids of the whole global batch of a step, int64 [global_batch]."""
        return self.at(step_positions(step, self.global_batch))[0]

    def views(self, step: int) -> NDArray[np.int64]:
        """The view of each sample of a step, counted within its source, int64 [global_batch]."""
        return self.at(step_positions(step, self.global_batch))[1]

    def sources(self, step: int) -> NDArray[np.int64]:
        """The source of each sample of a step, int64 [global_batch]."""
        return self._place(step_positions(step, self.global_batch))[0]

    def at(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids and views, int64 [n] each, at any positions of the stream."""
        source, counter = self._place(np.asarray(positions, np.int64))
        ids, views = np.empty_like(source), np.empty_like(source)
        for k, order in enumerate(self.orders):
            mine = source == k
            ids[mine], views[mine] = order.at(counter[mine])
            ids[mine] += self._id_offsets[k]
        return ids, views

    def _place(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source of each position, and how many positions before it have the same source."""
        repeats, within = np.divmod(positions, len(self._pattern))
        source = self._pattern[within]
        return source, self._rank[within] + repeats * self._slots[source]


def _pattern(slots: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The source of each position of the pattern, and its number among the positions of that source."""
    rank = np.concatenate([np.arange(count) for count in slots])
    source = np.repeat(np.arange(len(slots)), slots)
    # Sample j of n stands at (j + 1/2) / n of the way; the largest source goes first where two meet.
    order = np.lexsort((source, -slots[source], (rank + 0.5) / slots[source]))
    return source[order], rank[order]


def _apportion(weights: Sequence[float]) -> NDArray[np.int64]:
    """Whole slots in proportion to `weights`, at most 65,536 together; by largest remainder where they must round."""
    if len(weights) > _MIX_BLOCK:
        raise ValueError(f"at most {_MIX_BLOCK} sources can be mixed, got {len(weights)}")
    # As they are written, so that 0.7 and 0.3 are 7 and 3.
    exact = [Fraction(repr(float(weight))) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    divisor = math.gcd(*whole)
    if sum(whole) // divisor <= _MIX_BLOCK:
        return np.array([count // divisor for count in whole], np.int64)
    spare = _MIX_BLOCK - len(weights)
    wanted = np.maximum(np.asarray(weights, np.float64) / math.fsum(weights) * _MIX_BLOCK - 1, 0)
    wanted *= spare / max(wanted.sum(), 1e-300)
    slots = np.floor(wanted).astype(np.int64)
    slots[np.argsort(slots - wanted, kind="stable")[: spare - int(slots.sum())]] += 1
    return slots + 1


def step_positions(step: int, global_batch: int) -> NDArray[np.int64]:
    """Positions of the stream that a step takes, int64 [global_batch]."""
    if step < 0:
        raise ValueError(f"step must be 0 or more, got {step}")
    return np.arange(step * global_batch, (step + 1) * global_batch, dtype=np.int64)
