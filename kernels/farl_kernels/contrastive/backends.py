"""The tile functions of each backend, under one contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from farl_kernels.contrastive import blocks, reference
from farl_kernels.contrastive.pairs import Pairs
from farl_kernels.contrastive.pairs import finish as plain_finish
from farl_kernels.contrastive.pairs import pairs as plain_pairs
from farl_kernels.contrastive.reference import Statistics, TileGradients


class Backend(NamedTuple):
    """What a backend does with a tile and with the pairs.

    `statistics` and `gradients` have the contracts of those in ``reference.py``; `row_statistics` and `row_gradients`
    those in ``blocks.py``: along the rows only, with bits that do not depend on how rows are spread over ranks.
    """

    statistics: Callable[..., tuple[Statistics, Statistics]]
    gradients: Callable[..., TileGradients]
    row_statistics: Callable[..., Statistics]
    row_gradients: Callable[..., TileGradients]
    pairs: Callable[..., Pairs]
    finish: Callable[..., Tensor]


REFERENCE = Backend(
    reference.statistics,
    reference.gradients,
    blocks.row_statistics,
    blocks.row_gradients,
    plain_pairs,
    plain_finish,
)


def backend(name: str) -> Backend:
    """The backend `name`: "triton" or "reference". Kernels are imported when they are first wanted."""
    if name == "reference":
        return REFERENCE
    from farl_kernels.contrastive import launchers

    def row_statistics(tile: reference.Tile) -> Statistics:
        return launchers.statistics(tile, with_columns=False)[0]

    def row_gradients(*args: Any, **needs: bool) -> TileGradients:
        return launchers.gradients(*args, need_columns=False, **needs)

    return Backend(
        launchers.statistics,
        launchers.gradients,
        row_statistics,
        row_gradients,
        launchers.pairs,
        launchers.finish,
    )
