"""The sampler's Triton kernels give the reference's masks, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from farl_kernels.launch import recorded_launches
from farl_kernels.patch_masking import custom_ops, launchers, sample_block_masks

Masks = tuple[Tensor, Tensor]


def _sample(ids: Tensor, views: Tensor, backend: str, **options) -> Masks:
    return sample_block_masks(ids, views, backend=backend, **options)


def _assert_equal_to_the_reference(ids: Tensor, views: Tensor, **options) -> Masks:
    mask, positions = _sample(ids, views, "triton", **options)
    # On a CPU the numpy sampler stands for the reference: its own tests show that they are equal.
    other, other_positions = _sample(ids.cpu(), views.cpu(), "numpy", **options)
    assert mask.dtype == torch.bool and positions.dtype == torch.int32
    assert torch.equal(mask.cpu(), other) and torch.equal(positions.cpu(), other_positions)
    assert int(mask.sum(1).max()) <= options["max_masked"]
    return mask, positions


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("mode", ["block", "random"])
def test_64_pairs_are_equal_to_the_reference(device: torch.device, mode: str) -> None:
    """Ids and views from the ends of int64 to small ones."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.cat(
        [
            torch.arange(32),
            torch.tensor([-1, 2**63 - 1, -(2**63), 2**32]),
            torch.randint(-(2**62), 2**62, (28,), generator=generator),
        ]
    )
    views = torch.cat([torch.arange(60) % 7, torch.tensor([-1, 2**40, 2**63 - 1, -(2**63)])])
    options = {"grid": (14, 14), "max_masked": 75, "seed": 1234, "mode": mode}
    mask, positions = _assert_equal_to_the_reference(ids.to(device), views.to(device), **options)
    other = _sample(ids.to(device), views.to(device), "reference", **options)
    assert torch.equal(mask, other[0]) and torch.equal(positions, other[1])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("mode", ["block", "random"])
@pytest.mark.parametrize(
    "grid",
    [
        *((7, 7), (28, 28), (3, 9)),
        *(pytest.param(grid, marks=pytest.mark.slow) for grid in ((2, 2), (8, 8), (16, 16), (5, 33), (17, 3))),
        *(pytest.param(grid, marks=pytest.mark.slow) for grid in ((64, 5), (64, 64))),
    ],
    ids=str,
)
def test_grids_and_seeds(device: torch.device, grid: tuple[int, int], mode: str) -> None:
    patches = grid[0] * grid[1]
    ids = torch.arange(2, device=device)
    for max_masked, seed in ((1, 0), (round(0.4 * patches), -5)):
        _assert_equal_to_the_reference(ids, ids, grid=grid, max_masked=max_masked, seed=seed, mode=mode)
    _assert_equal_to_the_reference(
        ids[:1], ids[1:], grid=grid, max_masked=round(0.6 * patches), seed=2**80 + 1, mode=mode, min_block=200
    )


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_request(data: st.DataObject) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    grid = data.draw(st.integers(2, 20)), data.draw(st.integers(2, 20))
    ids = torch.tensor(data.draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=2)), device=device)
    _assert_equal_to_the_reference(
        ids,
        ids.flip(0),
        grid=grid,
        max_masked=data.draw(st.integers(1, grid[0] * grid[1])),
        min_block=data.draw(st.integers(1, 100)),
        seed=data.draw(st.integers()),
        mode=data.draw(st.sampled_from(["block", "random"])),
    )


def test_strided_ids_and_an_empty_batch(device: torch.device) -> None:
    ids, views = torch.arange(8, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    options = {"grid": (7, 7), "max_masked": 19, "seed": 0}
    _assert_equal_to_the_reference(ids[::2], views.expand(4), **options)
    mask, positions = _sample(ids[:0], ids[:0], "triton", **options)
    assert (mask.shape, positions.shape) == ((0, 49), (0, 19))


@pytest.mark.parametrize("mode", ["block", "random"])
def test_one_launch(mode: str) -> None:
    ids = torch.empty(8, dtype=torch.int64, device="meta")
    with recorded_launches() as launches:
        launchers.sample_block_masks(ids, ids, 14, 14, 75, 16, 64, 0, mode)
    assert len(launches) == 1 and launches[0].grid == (8,)


def test_grids_past_64_are_refused(device: torch.device) -> None:
    ids = torch.arange(2, device=device)
    with pytest.raises(ValueError, match="backend 'triton' cannot run this call: the grid is 65 x 2"):
        _sample(ids, ids, "triton", grid=(65, 2), max_masked=3, seed=0)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("mode", ["block", "random"])
def test_raw_op(device: torch.device, backend: str, mode: str) -> None:
    ids = torch.arange(1, device=device)
    torch.library.opcheck(custom_ops.sample_masks, (ids, ids, 3, 4, 4, 2, 8, 5, mode, backend))


@pytest.mark.parametrize("mode", ["block", "random"])
def test_compiles_without_a_graph_break(device: torch.device, mode: str) -> None:
    options = {"grid": (4, 4), "max_masked": 6, "seed": 3, "mode": mode}
    compiled = torch.compile(_sample, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (2, 3):
        ids = torch.arange(count, device=device)
        found, expected = compiled(ids, ids, "triton", **options), _sample(ids, ids, "triton", **options)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
