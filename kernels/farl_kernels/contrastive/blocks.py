"""Rows in fixed blocks, for results that do not depend on how rows are spread over ranks.

A matrix product may round a row differently with its shape and with the row's place in it. Blocks begin at multiples
of BLOCK in the *global* batch, with zero rows where other ranks' rows would be, so each row always has the same place
in a product of the same shape. Columns are those of all ranks, in the same chunks everywhere.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from farl_kernels.contrastive.reference import AxisTerms, Statistics, Tile, TileGradients, gradients, statistics

BLOCK = 128


def _split(x: Tensor, offset: int) -> tuple[Tensor, ...]:
    before = offset % BLOCK
    after = -(before + len(x)) % BLOCK
    return F.pad(x, (0, 0) * (x.dim() - 1) + (before, after)).split(BLOCK)


def _tiles(tile: Tile) -> list[Tile]:
    ids = None if tile.row_ids is None else _split(tile.row_ids, tile.offset)
    start = tile.offset - tile.offset % BLOCK
    return [
        replace(tile, rows=rows, row_ids=None if ids is None else ids[k], offset=start + k * BLOCK)
        for k, rows in enumerate(_split(tile.rows, tile.offset))
    ]


def _join(parts: list[Tensor], tile: Tile) -> Tensor:
    before = tile.offset % BLOCK
    return torch.cat(parts)[before : before + len(tile.rows)]


def row_statistics(tile: Tile) -> Statistics:
    """:func:`farl_kernels.contrastive.reference.statistics` along the rows only."""
    parts = [statistics(block, with_columns=False)[0] for block in _tiles(tile)]
    return {key: _join([part[key] for part in parts], tile) for key in parts[0]}


def row_gradients(
    tile: Tile, row: AxisTerms, column: AxisTerms, *, need_rows: bool, need_scalars: bool
) -> TileGradients:
    """:func:`farl_kernels.contrastive.reference.gradients` for the rows only."""
    terms = [None if x is None else _split(x, tile.offset) for x in (row.weight, row.lse, row.same)]
    parts = []
    for k, block in enumerate(_tiles(tile)):
        weight, lse, same = (None if x is None else x[k] for x in terms)
        assert weight is not None
        parts.append(
            gradients(
                block,
                AxisTerms(weight, lse, same),
                column,
                need_rows=need_rows,
                need_columns=False,
                need_scalars=need_scalars,
            )
        )
    rows = [part.rows for part in parts if part.rows is not None]
    return TileGradients(
        _join(rows, tile) if rows else None,
        None,
        torch.stack([part.scale for part in parts]).sum(),
        torch.stack([part.bias for part in parts]).sum(),
    )
