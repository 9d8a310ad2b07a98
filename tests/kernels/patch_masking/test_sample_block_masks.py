from __future__ import annotations

import hashlib
import importlib.util
import math
import random
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farl_kernels.patch_masking import mask_positions, numpy_sampler, reference, sample_block_masks
from farl_kernels.patch_masking.block_plan import ASPECT_COUNT, ASPECT_TABLE, BlockPlan, side_thresholds

BACKENDS = ["numpy", "reference"]


def _load_beit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("beit_sampler", Path(__file__).with_name("beit_sampler.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


beit = _load_beit()


def _masks(
    count: int, grid: tuple[int, int], max_masked: int, *, first: int = 0, view: int = 0, **options
) -> np.ndarray:
    ids = torch.arange(first, first + count)
    options.setdefault("seed", 0)
    mask, _ = sample_block_masks(ids, torch.full_like(ids, view), grid=grid, max_masked=max_masked, **options)
    return mask.numpy().reshape(count, *grid)


def _assert_same_distribution(a: np.ndarray, b: np.ndarray, bins: int = 12) -> None:
    """Two-sample chi-square over quantile bins of two integer samples of equal size; fails beyond 4 sigma."""
    pooled = np.sort(np.concatenate([a, b]))
    edges = np.unique(pooled[np.linspace(0, len(pooled) - 1, bins + 1).astype(int)[1:]])
    counts = [np.bincount(np.searchsorted(edges, x), minlength=len(edges)) for x in (a, b)]
    total = counts[0] + counts[1]
    used = total >= 10
    degrees = int(used.sum()) - 1
    if degrees < 1:
        assert abs(int(a.sum()) - int(b.sum())) <= 0.01 * abs(int(b.sum()))
        return
    statistic = ((counts[0] - counts[1])[used] ** 2 / total[used]).sum()
    # Wilson-Hilferty: the cube root of chi-square / degrees is close to normal.
    z = ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))
    assert z < 4, f"chi-square {statistic:.1f} at {degrees} degrees of freedom"


def _statistics(masks: np.ndarray) -> dict[str, np.ndarray]:
    """One integer a mask: size, outline (how blocky), extent, centre."""
    rows, columns = np.arange(masks.shape[1]), np.arange(masks.shape[2])
    edges = (masks[:, 1:] ^ masks[:, :-1]).sum((1, 2)) + (masks[:, :, 1:] ^ masks[:, :, :-1]).sum((1, 2))
    return {
        "count": masks.sum((1, 2)),
        "outline": edges,
        "rows touched": masks.any(2).sum(1),
        "columns touched": masks.any(1).sum(1),
        "row centre": (masks * rows[:, None]).sum((1, 2)),
        "column centre": (masks * columns).sum((1, 2)),
    }


def _compare_with_beit(grid: tuple[int, int], max_masked: int, min_block: int, count: int) -> None:
    rng = random.Random(1)
    expected = np.stack([beit.sample(*grid, max_masked, min_block, rng) for _ in range(count)])
    masks = _masks(count, grid, max_masked, min_block=min_block, seed=5)
    found = _statistics(masks)
    for name, values in _statistics(expected).items():
        try:
            _assert_same_distribution(found[name], values)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    a, b = masks.mean(0), expected.mean(0)
    z = (a - b) / np.sqrt((a * (1 - a) + b * (1 - b)) / count)
    assert np.abs(z).max() < 4.7, "how often each patch is masked"


@pytest.mark.parametrize(("grid", "max_masked", "min_block"), [((14, 14), 75, 16), ((8, 8), 24, 4), ((7, 10), 26, 6)])
def test_distribution_is_that_of_the_plain_sampler(grid: tuple[int, int], max_masked: int, min_block: int) -> None:
    _compare_with_beit(grid, max_masked, min_block, 2000)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("grid", "max_masked", "min_block"),
    [((14, 14), 75, 16), ((14, 14), 150, 16), ((7, 7), 19, 8), ((8, 8), 24, 16), ((28, 28), 300, 16)],
)
def test_distribution_of_many_draws(grid: tuple[int, int], max_masked: int, min_block: int) -> None:
    _compare_with_beit(grid, max_masked, min_block, 10_000)


@pytest.mark.parametrize("count", [4000, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_first_try_has_the_plain_sampler_s_areas_sides_and_positions(backend: str, count: int) -> None:
    rng = random.Random(2)
    blocks = []
    for _ in range(count):
        _, block = beit.one_try(np.zeros((14, 14), dtype=bool), 75, 16, rng)
        blocks.append(block or (-1, -1, 0, 0))
    expected = np.array(blocks)
    plan = BlockPlan(14, 14, 75, 16, tries=1)
    ids = torch.arange(count)
    sampler = numpy_sampler if backend == "numpy" else reference
    mask = sampler.sample_block_masks(ids, ids, plan, 3, "block")[0].numpy().reshape(count, 14, 14)
    heights, widths = mask.any(2).sum(1), mask.any(1).sum(1)
    assert (mask.sum((1, 2)) == heights * widths).all(), "one try gives one rectangle or nothing"
    some = heights > 0
    assert abs(some.mean() - (expected[:, 2] > 0).mean()) < 0.02
    _assert_same_distribution(heights * widths, expected[:, 2] * expected[:, 3], bins=20)
    _assert_same_distribution(heights, expected[:, 2])
    _assert_same_distribution(widths, expected[:, 3])
    _assert_same_distribution(np.where(some, mask.any(2).argmax(1), -1), expected[:, 0])
    _assert_same_distribution(np.where(some, mask.any(1).argmax(1), -1), expected[:, 1])


def test_sides_are_the_rounded_square_roots() -> None:
    table, thresholds = ASPECT_TABLE, side_thresholds(28)
    assert len(table) == ASPECT_COUNT and list(table) == sorted(table)
    assert table[0] / 2**16 == pytest.approx(0.3, rel=1e-3) and table[-1] / 2**16 == pytest.approx(1 / 0.3, rel=1e-3)
    for low, high in zip(table, reversed(table), strict=True):
        assert low * high / 2**32 == pytest.approx(1, rel=1e-4)
    rng = random.Random(0)
    for _ in range(20_000):
        area, aspect = rng.uniform(1, 300), rng.choice(table)
        product = 4 * int(area * 2**24) * aspect
        side = sum(product >= threshold for threshold in thresholds)
        assert side == min(28, math.floor(math.sqrt(int(area * 2**24) / 2**24 * aspect / 2**16) + 0.5))


@pytest.mark.parametrize("mode", ["block", "random"])
@pytest.mark.parametrize("grid", [(7, 7), (8, 8), (14, 14), (28, 28), (2, 2), (4, 4), (5, 33), (17, 3)])
def test_backends_are_equal_to_the_last_bit(grid: tuple[int, int], mode: str) -> None:
    patches = grid[0] * grid[1]
    ids = torch.randint(-(2**62), 2**62, (33,), generator=torch.Generator().manual_seed(0))
    for max_masked in sorted({1, round(0.4 * patches), round(0.8 * patches)}):
        options = {"grid": grid, "max_masked": max_masked, "seed": 11, "mode": mode}
        mask, positions = sample_block_masks(ids, ids % 5, backend="numpy", **options)
        other_mask, other_positions = sample_block_masks(ids, ids % 5, backend="reference", **options)
        assert torch.equal(mask, other_mask) and torch.equal(positions, other_positions)
        assert mask.dtype == other_mask.dtype == torch.bool and positions.dtype == other_positions.dtype == torch.int32


def test_masks_are_pinned() -> None:
    """A run resumed with a later version must see the masks that it began with."""
    digests = {}
    for mode in ("block", "random"):
        mask = _masks(64, (14, 14), 75, first=1000, view=2, seed=1234, mode=mode)
        digests[mode] = hashlib.sha256(np.packbits(mask).tobytes()).hexdigest()[:16]
    assert digests == {"block": "5dd2ec85ca4cda6b", "random": "f8ee22def9a973ac"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["block", "random"])
def test_a_mask_depends_on_seed_id_and_view_alone(mode: str, backend: str) -> None:
    options = {"mode": mode, "backend": backend}
    whole = _masks(40, (14, 14), 75, **options)
    assert (_masks(7, (14, 14), 75, first=20, **options) == whole[20:27]).all(), "not on the batch it comes in"
    for other in (_masks(40, (14, 14), 75, view=1, **options), _masks(40, (14, 14), 75, seed=1, **options)):
        assert (other != whole).any((1, 2)).all()
    assert len(np.unique(whole.reshape(40, -1), axis=0)) == 40


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["block", "random"])
def test_positions_list_the_mask(mode: str, backend: str) -> None:
    ids = torch.arange(50)
    mask, positions = sample_block_masks(
        ids, ids, grid=(14, 14), max_masked=75, seed=0, mode=mode, backend=backend, min_block=16
    )
    assert positions.shape == (50, 75) and mask.shape == (50, 196)
    for row, listed in zip(mask, positions, strict=True):
        indices = row.nonzero().flatten()
        assert len(indices) <= 75
        assert listed[: len(indices)].tolist() == indices.tolist() and (listed[len(indices) :] == -1).all()
    if mode == "block":
        assert (mask.sum(1) < 75).any(), "at most, not always, max_masked"
        assert mask.sum(1).min() > 50
    else:
        assert (mask.sum(1) == 75).all()


def test_random_mode_masks_every_patch_equally_often() -> None:
    share = _masks(4000, (7, 7), 19, mode="random").mean(0)
    expected = 19 / 49
    assert np.abs(share - expected).max() < 4.5 * math.sqrt(expected * (1 - expected) / 4000)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_grid_gives_a_mask_within_the_limit(data: st.DataObject) -> None:
    grid = data.draw(st.integers(2, 20)), data.draw(st.integers(2, 20))
    max_masked = data.draw(st.integers(1, grid[0] * grid[1]))
    min_block = data.draw(st.integers(1, 400))
    masks = _masks(16, grid, max_masked, min_block=min_block, seed=data.draw(st.integers()))
    assert (masks.sum((1, 2)) <= max_masked).all()
    assert masks.any(), "small grids get smaller blocks"


def test_min_block_is_lowered_for_small_grids_only() -> None:
    assert BlockPlan.build((14, 14), 75, 16).min_block == 16
    assert BlockPlan.build((4, 4), 6, 16).min_block == 6
    assert BlockPlan.build((3, 9), 20, 16).min_block == 4


def test_reference_needs_no_values_on_the_host() -> None:
    """A meta tensor has no values: any host sync or data-dependent shape raises."""
    ids = torch.empty(5, dtype=torch.int64, device="meta")
    for mode in ("block", "random"):
        mask, positions = sample_block_masks(ids, ids, grid=(8, 8), max_masked=20, seed=0, mode=mode)
        assert (mask.shape, positions.shape) == ((5, 64), (5, 20))
    ids = torch.arange(3)
    sample_block_masks(ids, ids, grid=(8, 8), max_masked=20, seed=0, backend="reference")


def test_strided_ids_and_an_empty_batch() -> None:
    ids = torch.arange(20)
    views = torch.zeros(1, dtype=torch.int64).expand(10)
    mask, _ = sample_block_masks(ids[::2], views, grid=(14, 14), max_masked=75, seed=0)
    assert (mask.numpy().reshape(10, 14, 14) == _masks(20, (14, 14), 75)[::2]).all()
    mask, positions = sample_block_masks(ids[:0], ids[:0], grid=(14, 14), max_masked=75, seed=0)
    assert (mask.shape, positions.shape) == ((0, 196), (0, 75))


def test_mask_positions_cuts_at_count() -> None:
    mask = torch.tensor([[True, False, True, True], [False, False, False, True]])
    assert mask_positions(mask, 2).tolist() == [[0, 2], [3, -1]]
    assert mask_positions(~mask, 4).tolist() == [[1, -1, -1, -1], [0, 1, 2, -1]]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"sample_ids": torch.zeros(3)}, "sample_ids"),
        ({"sample_ids": torch.zeros(3, 1, dtype=torch.int64)}, "sample_ids"),
        ({"views": torch.zeros(2, dtype=torch.int64)}, "views"),
        ({"views": torch.zeros(3, dtype=torch.int32)}, "views"),
        ({"grid": (0, 4)}, "grid"),
        ({"grid": (1, 40), "max_masked": 4}, "grid"),
        ({"grid": (1024, 1024)}, "grid"),
        ({"max_masked": 0}, "max_masked"),
        ({"max_masked": 197}, "max_masked"),
        ({"min_block": 0}, "min_block"),
        ({"mode": "blocks"}, "mode"),
        ({"backend": "nonsense"}, "backend"),
    ],
)
def test_wrong_arguments_are_named(change: dict, name: str) -> None:
    ids = torch.zeros(3, dtype=torch.int64)
    arguments = {"sample_ids": ids, "views": ids, "grid": (14, 14), "max_masked": 75, "seed": 0} | change
    with pytest.raises(ValueError, match=f"^sample_block_masks: {name} "):
        sample_block_masks(arguments.pop("sample_ids"), arguments.pop("views"), **arguments)


@pytest.mark.slow
def test_compiles_without_a_graph_break() -> None:
    ids = torch.arange(6)

    def sample(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return sample_block_masks(ids, ids, grid=(8, 8), max_masked=20, seed=3, min_block=4)

    expected = sample(ids)
    found = torch.compile(sample, fullgraph=True, backend="eager")(ids)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
