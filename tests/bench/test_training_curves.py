"""Curves made by hand: equal, off by a known amount, cut, broken, and as far apart as chance puts them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bench.training_curves import Curve, compare_exact, compare_rounded, windows


def curve(updates: int = 100, start: float = 1) -> dict[int, float]:
    return {step: start + 8 * math.exp(-step / 200) for step in range(1, updates + 1)}


def noisy(size: float, seed: int, updates: int = 500) -> dict[int, float]:
    """A curve with independent errors that grow from a hundredth of `size` to `size`, as chaos lets them."""
    rng = np.random.default_rng(seed)
    grown = size * np.minimum(1, 0.01 * np.exp(np.arange(updates) / 40))
    errors = grown * rng.standard_normal(updates)
    return {step: loss * (1 + error) for (step, loss), error in zip(curve(updates).items(), errors, strict=True)}


def test_the_largest_difference_is_found_with_its_place_and_sign() -> None:
    other = curve()
    other[7] *= 1 - 5e-5
    found = compare_exact("fused", other, "eager", curve())
    assert found.largest == pytest.approx(5e-5, rel=1e-9) and found.at == 7 and found.updates == 100
    assert found.passed and found.rms == pytest.approx(5e-6, rel=1e-9) and found.drift == 0
    shifted = {step: loss * (1 - 2e-5) for step, loss in curve().items()}
    assert compare_exact("fused", shifted, "eager", curve()).drift == pytest.approx(-2e-5, rel=1e-6)


def test_one_update_past_the_bound_fails() -> None:
    other = curve()
    other[100] *= 1 + 1.1e-4
    assert not compare_exact("fused", other, "eager", curve()).passed
    # The rule says nothing of later updates.
    assert compare_exact("fused", other, "eager", curve(), asked=99).passed


def test_a_cut_run_is_compared_as_far_as_it_went() -> None:
    found = compare_exact("fused", curve(40), "eager", curve())
    assert (found.updates, found.asked) == (40, 100) and found.passed


@pytest.mark.parametrize("broken", [{}, {3: math.nan, 4: 1.0}, {3: math.inf}], ids=["empty", "nan", "inf"])
def test_nothing_and_what_is_no_number_never_pass(broken: Curve) -> None:
    assert not compare_exact("fused", broken, "eager", curve()).passed
    assert not compare_rounded("fused", broken, curve(), curve()).passed


@pytest.mark.parametrize("seed", range(20))
def test_errors_as_large_as_eagers_pass_whatever_the_chance(seed: int) -> None:
    plain, other = noisy(5e-3, 2 * seed), noisy(5e-3, 2 * seed + 1)
    found = compare_rounded("fused", other, plain, curve(500))
    assert found.passed and found.ratio == pytest.approx(1, abs=0.35)
    # At one update a ratio is a matter of luck.
    lucky = [abs(other[s] - curve(500)[s]) / abs(plain[s] - curve(500)[s]) for s in plain]
    assert max(lucky) > 10


def test_errors_three_times_as_large_fail() -> None:
    found = compare_rounded("fused", noisy(1.5e-2, 0), noisy(5e-3, 1), curve(500))
    assert not found.passed and found.ratio == pytest.approx(3, rel=0.2)


def test_a_wrong_engine_that_only_the_first_updates_show_fails() -> None:
    """An offset below what chaos does later, far above what rounding does at first."""
    other = {step: loss * 1.002 for step, loss in noisy(5e-3, 0).items()}
    found = compare_rounded("fused", other, noisy(5e-3, 1), curve(500))
    assert not found.passed
    assert found.rms == pytest.approx(5e-3, rel=0.2) and found.drift == pytest.approx(2e-3, abs=1e-3)


def test_a_better_engine_passes_and_one_without_any_error_has_ratio_zero() -> None:
    plain = noisy(5e-3, 1)
    assert compare_rounded("fused", noisy(1e-3, 0), plain, curve(500)).ratio == pytest.approx(0.2, rel=0.3)
    assert compare_rounded("fused", curve(500), plain, curve(500)).ratio == 0
    # An eager run without error, on the other hand, is met only by another one without.
    assert compare_rounded("fused", curve(500), curve(500), curve(500)).passed
    assert not compare_rounded("fused", plain, curve(500), curve(500)).passed


@pytest.mark.parametrize(
    ("updates", "ends"),
    [(0, []), (1, [1]), (15, [15]), (16, [16]), (20, [20]), (24, [16, 24]), (100, [16, 32, 64, 100])],
)
def test_windows_double_and_cover_every_update_once(updates: int, ends: list[int]) -> None:
    parts = windows(updates)
    assert [part.stop for part in parts] == ends
    assert [place for part in parts for place in range(part.start, part.stop)] == list(range(updates))


def test_differences_that_hang_together_pass_too() -> None:
    """Errors of neighbouring updates are alike, so a window holds only a few independent ones."""

    def smooth(seed: int) -> dict[int, float]:
        drawn = np.random.default_rng(seed).standard_normal(507)
        errors = 5e-3 * np.convolve(drawn, np.ones(8) / 8**0.5, mode="valid")
        return {step: loss * (1 + errors[step - 1]) for step, loss in curve(500).items()}

    assert all(compare_rounded("fused", smooth(2 * n), smooth(2 * n + 1), curve(500)).passed for n in range(40))
