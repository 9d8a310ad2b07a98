"""Little data: a fixed part of a labelled set, repeated so that the number of steps stays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from farl.downstream.task import LabelledSet, Sample
from farl_engine.data import SampleOrder

# FaRL's own seed of its `train_data_ratio`; the samples it picks there are other ones.
FRACTION_SEED = 123


def fraction_indices(size: int, fraction: float, seed: int = FRACTION_SEED) -> list[int]:
    """The first ceil(fraction * size) positions of a permutation that `size` and `seed` alone decide.

    So a smaller fraction lies inside a larger one.

    Raises:
        ValueError: a fraction outside 0 (excluded) to 1, or an empty set.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"the fraction is {fraction}; it must be more than 0 and at most 1")
    # 0.07 * 100 is a little more than 7 in binary.
    count = math.ceil(fraction * size - 1e-9)
    return SampleOrder(size, 1, seed).at(np.arange(max(1, count)))[0].tolist()


class FractionSet:
    """A labelled set of the old length that holds only a fraction of the samples, each again and again.

    Attributes:
        chosen: their positions in `whole`, as `fraction_indices` gives them; at fraction 1 all, in order.
    """

    def __init__(self, whole: LabelledSet, fraction: float, seed: int = FRACTION_SEED) -> None:
        self.whole, self.fraction, self.seed = whole, fraction, seed
        indices = fraction_indices(len(whole), fraction, seed)
        self.chosen = sorted(indices) if fraction == 1 else indices

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(self, index: int) -> Sample:
        return self.whole[self.chosen[index % len(self.chosen)]]

    def about(self) -> dict[str, Any]:
        """The whole set's, and which part of it this is."""
        part = {"fraction": self.fraction, "fraction_seed": self.seed, "samples_used": len(self.chosen)}
        return self.whole.about() | part
