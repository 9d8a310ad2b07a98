from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farl_engine.data import MixedOrder, SampleOrder
from farl_engine.data.order import permute

GOLDEN_10 = [8, 0, 1, 7, 3, 5, 2, 9, 6, 4, 2, 5, 3, 4, 8, 1, 0, 6, 9, 7]
GOLDEN_50M = [22952127, 9565252, 31781292, 4746326, 5736937, 34560062]
GOLDEN_MIXED = [7, 6, 5, 6, 5, 7, 6, 7]


def stream(order: SampleOrder | MixedOrder, steps: int) -> np.ndarray:
    return np.concatenate([order.ids(step) for step in range(steps)])


def test_the_order_is_pinned():
    # A change here silently reshuffles every run that resumes: never change these numbers.
    order = SampleOrder(10, 4, seed=0)
    assert stream(order, 5).tolist() == GOLDEN_10
    assert order.views(2).tolist() == [0, 0, 1, 1]
    assert SampleOrder(50_000_000, 6, seed=7).ids(12_345_678).tolist() == GOLDEN_50M
    mixed = MixedOrder([SampleOrder(5, 8, seed=1), SampleOrder(3, 8, seed=2)], [1.0, 3.0], seed=3)
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
    st.integers(1, 300),
    st.integers(0, 2**32),
)
def test_mixed_sources_keep_their_own_epochs(sources, global_batch, seed):
    orders = [SampleOrder(size, global_batch, seed + k) for k, (size, _) in enumerate(sources)]
    mixed = MixedOrder(orders, [weight for _, weight in sources], seed)
    steps = 2000 // global_batch + 1
    ids, views = stream(mixed, steps), np.concatenate([mixed.views(step) for step in range(steps)])
    first = 0
    for order in orders:
        mine = (ids >= first) & (ids < first + order.num_samples)
        expected_ids, expected_views = order.at(np.arange(mine.sum()))
        assert np.array_equal(ids[mine] - first, expected_ids)
        assert np.array_equal(views[mine], expected_views)
        first += order.num_samples
    assert ids.max() < first == mixed.num_samples


def test_mixed_shares_hold_and_carry_on_over_blocks():
    orders = [SampleOrder(1000, 4096, 1), SampleOrder(10, 4096, 2), SampleOrder(70, 4096, 3)]
    mixed = MixedOrder(orders, [0.7, 0.2, 0.1], seed=0)
    sources = np.concatenate([mixed.sources(step) for step in range(32)])
    assert len(sources) == 2 * 65536
    assert np.allclose(np.bincount(sources) / len(sources), [0.7, 0.2, 0.1], atol=1e-4)
    # A source's counter goes on from block to block: its stream is its own order without a gap.
    ids = stream(mixed, 32)
    assert np.array_equal(ids[sources == 0], orders[0].at(np.arange((sources == 0).sum()))[0])


def test_mixed_weights_default_to_sizes():
    mixed = MixedOrder([SampleOrder(300, 100, 1), SampleOrder(100, 100, 2)], seed=0)
    assert np.mean(np.concatenate([mixed.sources(step) for step in range(200)]) == 0) == pytest.approx(0.75, abs=0.01)


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
