"""Random numbers of a batch that do not depend on how it is split over processes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


class Draws:
    """One generator a sample; each draw has a row a sample: float32 [n, *shape] on the CPU.

    Args:
        keys: for each sample the numbers that decide its draws, none negative, such as (seed, step, slot in the batch).
    """

    def __init__(self, keys: Iterable[tuple[int, ...]]) -> None:
        self._generators = [np.random.default_rng(key) for key in keys]

    def __len__(self) -> int:
        return len(self._generators)

    def uniform(self, low: float = 0.0, high: float = 1.0, shape: tuple[int, ...] = ()) -> Tensor:
        """Uniform in [low, high)."""
        return self._stack([generator.uniform(low, high, shape) for generator in self._generators])

    def normal(self, mean: float = 0.0, std: float = 1.0, shape: tuple[int, ...] = ()) -> Tensor:
        """Normal with that mean and standard deviation."""
        return self._stack([generator.normal(mean, std, shape) for generator in self._generators])

    def integers(self, low: int, high: int, shape: tuple[int, ...] = ()) -> Tensor:
        """Whole numbers in low .. high - 1: int64."""
        rows = [generator.integers(low, high, shape) for generator in self._generators]
        return torch.from_numpy(np.asarray(rows, np.int64))

    def chance(self, probability: float) -> Tensor:
        """bool [n], True with that probability."""
        return self.uniform() < probability

    def _stack(self, rows: list[np.ndarray | float]) -> Tensor:
        return torch.from_numpy(np.asarray(rows, np.float32))
