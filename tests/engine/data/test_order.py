from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farl_engine.data import MixedOrder, SampleOrder
from farl_engine.data.order import permute

GOLDEN_10 = [8, 0, 1, 7, 3, 5, 2, 9, 6, 4, 2, 5, 3, 4, 8, 1, 0, 6, 9, 7]
GOLDEN_50M = [22952127, 9565252, 31781292, 4746326, 5736937, 34560062]
GOLDEN_MIXED = [7, 6, 3, 5, 6, 5, 4, 7]


def stream(order: SampleOrder | MixedOrder, steps: int) -> np.ndarray:
    return np.concatenate([order.ids(step) for step in range(steps)])


def test_the_order_is_pinned():
    # A change here silently reshuffles every run that resumes: never change these numbers.
    order = SampleOrder(10, 4, seed=0)
    assert stream(order, 5).tolist() == GOLDEN_10
    assert order.views(2).tolist() == [0, 0, 1, 1]
    assert SampleOrder(50_000_000, 6, seed=7).ids(12_345_678).tolist() == GOLDEN_50M
    mixed = MixedOrder([SampleOrder(5, 8, seed=1), SampleOrder(3, 8, seed=2)], [1.0, 3.0])
    assert mixed.ids(0).tolist() == GOLDEN_MIXED


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 700), st.integers(1, 97), st.integers(-(2**40), 2**40), st.integers(1, 3))
def test_every_sample_comes_once_an_epoch(num_samples, global_batch, seed, epochs):
    order = SampleOrder(num_samples, global_batch, seed)
    steps = -(-num_samples * epochs // global_batch)
    ids = stream(order, steps)
    views = np.concatenate([order.views(step) for step in range(steps)])
    for epoch in range(epochs):
        part = slice(epoch * num_samples, (epoch + 1) * num_samples)
        assert np.array_equal(np.sort(ids[part]), np.arange(num_samples))
        assert (views[part] == epoch).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**63 - 1))
def test_permutation_of_any_size(size, key):
    values = np.arange(size, dtype=np.uint64)
    result = permute(values, size, np.full(size, key, np.uint64))
    assert np.array_equal(np.sort(result), values)


@pytest.mark.parametrize("size", [2**16, 2**16 + 1, 999_983])
def test_permutation_of_large_sizes(size):
    values = np.arange(size, dtype=np.uint64)
    result = permute(values, size, np.full(size, 5, np.uint64))
    assert np.array_equal(np.sort(result), values)
    # Neighbours are scattered: the mean distance of two random positions is a third of the size.
    distance = np.abs(np.diff(result.astype(np.int64))).mean()
    assert 0.32 < distance / size < 0.35


def test_all_orders_of_four_are_equally_likely():
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(4800):
        key = tuple(SampleOrder(4, 4, seed).ids(0).tolist())
        counts[key] = counts.get(key, 0) + 1
    assert len(counts) == 24
    # 200 expected of each, standard deviation 14.
    assert min(counts.values()) > 130 and max(counts.values()) < 270


def test_world_size_never_shows():
    order = SampleOrder(101, 24, seed=3)
    whole = stream(order, 9)
    for world_size in (1, 2, 3, 4, 8):
        n = 24 // world_size
        parts = [order.ids(step)[r * n : (r + 1) * n] for step in range(9) for r in range(world_size)]
        assert np.array_equal(np.concatenate(parts), whole)


def test_a_sample_of_one_and_of_two():
    assert stream(SampleOrder(1, 3, seed=0), 2).tolist() == [0] * 6
    assert SampleOrder(1, 3, seed=0).views(1).tolist() == [3, 4, 5]
    starts = [SampleOrder(2, 2, seed).ids(0).tolist() for seed in range(40)]
    assert {tuple(ids) for ids in starts} == {(0, 1), (1, 0)}


def test_global_batch_only_cuts_the_stream():
    assert np.array_equal(stream(SampleOrder(57, 10, 1), 12), stream(SampleOrder(57, 24, 1), 5))


def test_epochs_and_seeds_differ():
    order = SampleOrder(1000, 1000, seed=1)
    assert not np.array_equal(order.ids(0), order.ids(1))
    assert not np.array_equal(order.ids(0), SampleOrder(1000, 1000, seed=2).ids(0))
    assert np.array_equal(order.ids(0), SampleOrder(1000, 1000, seed=1).ids(0))


def test_views_count_modulo_num_views():
    order = SampleOrder(3, 3, seed=0, num_views=2)
    assert [order.views(step).tolist() for step in range(3)] == [[0] * 3, [1] * 3, [0] * 3]


def test_a_batch_larger_than_an_epoch_mixes_views():
    order = SampleOrder(3, 8, seed=0)
    assert order.views(0).tolist() == [0, 0, 0, 1, 1, 1, 2, 2]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 400), st.floats(0.01, 10)), min_size=1, max_size=4),
    st.integers(0, 2**32),
)
def test_mixed_sources_keep_their_own_epochs(sources, seed):
    orders = [SampleOrder(size, 1, seed + k) for k, (size, _) in enumerate(sources)]
    mixed = MixedOrder(orders, [weight for _, weight in sources])
    ids, views = mixed.at(np.arange(2000))
    first = 0
    for order in orders:
        mine = (ids >= first) & (ids < first + order.num_samples)
        expected_ids, expected_views = order.at(np.arange(mine.sum()))
        assert np.array_equal(ids[mine] - first, expected_ids)
        assert np.array_equal(views[mine], expected_views)
        first += order.num_samples
    assert ids.max() < first == mixed.num_samples


WEIGHTS = st.lists(
    st.one_of(st.integers(1, 9), st.decimals("0.01", "5", places=2).map(float), st.floats(1e-3, 10)),
    min_size=2,
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(WEIGHTS, st.integers(0, 10**9), st.integers(1, 20_000))
def test_every_source_has_its_share_of_any_window(weights, start, length):
    mixed = MixedOrder([SampleOrder(7 + k, 1, k) for k in range(len(weights))], weights)
    counts = np.bincount(mixed._place(np.arange(start, start + length))[0], minlength=len(weights))
    exact = length * np.array(weights) / sum(weights)
    # Weights that are no small whole numbers are rounded to 1/65,536 of the stream.
    assert (np.abs(counts - exact) <= len(weights) - 1 + length / 65_536 + 1e-6).all()


def test_shares_of_small_whole_numbers_never_drift():
    mixed = MixedOrder([SampleOrder(5, 1, 0), SampleOrder(5, 1, 1), SampleOrder(5, 1, 2)], [0.6, 0.3, 0.1])
    assert np.bincount(mixed._place(np.arange(1_000_000))[0]).tolist() == [600_000, 300_000, 100_000]


def test_a_source_of_a_mix_goes_on_without_a_gap():
    orders = [SampleOrder(1000, 4096, 1), SampleOrder(10, 4096, 2), SampleOrder(70, 4096, 3)]
    # No small whole numbers: the pattern is of 65,536 positions, and this goes over its end.
    mixed = MixedOrder(orders, [math.pi, 1, 0.1])
    sources = np.concatenate([mixed.sources(step) for step in range(32)])
    ids = stream(mixed, 32)
    assert np.array_equal(ids[sources == 0], orders[0].at(np.arange((sources == 0).sum()))[0])
    assert np.array_equal(ids[sources == 1] - 1000, orders[1].at(np.arange((sources == 1).sum()))[0])


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=3),
    WEIGHTS,
    st.integers(1, 72),
    st.integers(0, 40),
    st.integers(0, 2**40),
)
def test_restarts_never_show(sizes, weights, global_batch, start, seed):
    """The order is read from any step on as one process reads it from the beginning."""

    def fresh() -> SampleOrder | MixedOrder:
        orders = [SampleOrder(size, global_batch, seed + k) for k, size in enumerate(sizes)]
        return MixedOrder(orders, (weights * 3)[: len(sizes)]) if len(sizes) > 1 else orders[0]

    order = fresh()
    whole, views = stream(order, start + 3), np.concatenate([order.views(step) for step in range(start + 3)])
    order = fresh()
    for step in range(start, start + 3):
        mine = slice(step * global_batch, (step + 1) * global_batch)
        assert np.array_equal(order.ids(step), whole[mine])
        assert np.array_equal(order.views(step), views[mine])


def test_mixed_weights_default_to_sizes():
    mixed = MixedOrder([SampleOrder(300, 100, 1), SampleOrder(100, 100, 2)])
    assert [np.sum(mixed.sources(step) == 0) for step in range(5)] == [75] * 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SampleOrder(0, 4, 0), "num_samples must be at least 1, got 0"),
        (lambda: SampleOrder(4, 0, 0), "global_batch must be at least 1"),
        (lambda: SampleOrder(4, 4, 0).ids(-1), "step must be 0 or more"),
        (lambda: MixedOrder([]), "at least one"),
        (lambda: MixedOrder([SampleOrder(4, 4, 0)], [0.0]), "positive"),
        (lambda: MixedOrder([SampleOrder(4, 4, 0), SampleOrder(4, 8, 0)]), "one global_batch"),
    ],
)
def test_wrong_arguments_get_one_line(make, message):
    with pytest.raises(ValueError, match=message):
        make()
