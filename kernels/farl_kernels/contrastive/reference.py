"""The chunked contrastive tile in plain PyTorch: the truth, the CPU path, and the baseline of the fused kernels.

One tile holds the cosines of n rows with all N columns and serves both directions. It is visited by column chunks
of bounded size and never stored; the backward pass computes it again, writes the logit gradient over the chunk and
feeds two matrix products: 8nND FLOP in all. The diagonal (the pairs) stays out of the tile. Its loss is
``softplus(lse_neg - x_ii)``, which keeps its digits however confident the pair is, and its gradient is added
outside in the accumulation dtype, so that the large positive coefficient is never rounded to 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from farl_kernels.contrastive.options import Options
from farl_kernels.gemm import logit_chunk_bytes, matmul, matmul_add_
from farl_kernels.precision import accumulation_dtype

Statistics = dict[str, Tensor]

# How the statistics of two disjoint sets of logits become those of their union.
COMBINE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "lse": torch.logaddexp,  # log-sum-exp of the negatives
    "loss": torch.add,  # sigmoid: sum of the losses off the diagonal
    "same": torch.add,  # sum of the cosines with other items of the same id
    "best": torch.maximum,  # largest negative logit
    "best_same": torch.maximum,  # largest logit of another item of the same id
}


@dataclass(frozen=True)
class Tile:
    """Cosines of `rows` [n, D] with `columns` [N, D]: row i meets its own pair at column ``offset + i``.

    `scale` and `bias` are 0-d in the accumulation dtype; `row_ids` [n] and `column_ids` [N] are int64 and present
    when ``options.compares_ids``.
    """

    rows: Tensor
    columns: Tensor
    offset: int
    scale: Tensor
    bias: Tensor | None
    row_ids: Tensor | None
    column_ids: Tensor | None
    options: Options

    @property
    def diagonal(self) -> slice:
        """The columns that are the rows' own pairs."""
        return slice(self.offset, self.offset + len(self.rows))

    def chunks(self) -> Iterator[slice]:
        """Column ranges for which one chunk of logits fits into ``options.chunk_bytes``."""
        budget = self.options.chunk_bytes or logit_chunk_bytes(self.rows.device)
        row_bytes = accumulation_dtype(self.rows.dtype).itemsize * max(1, len(self.rows))
        width = max(1, budget // row_bytes)
        for start in range(0, len(self.columns), width):
            yield slice(start, min(start + width, len(self.columns)))

    def own(self, chunk: Tensor, columns: slice) -> Tensor:
        """View of the diagonal's part inside `chunk`, the tile's `columns`; empty when it does not pass there."""
        first, last = self.own_rows(columns)
        shift = self.offset - columns.start
        return chunk[first:last, first + shift : last + shift].diagonal() if last > first else chunk[:0, :0].diagonal()

    def own_rows(self, columns: slice) -> tuple[int, int]:
        """Range of the rows whose own pair is among `columns`."""
        return max(0, columns.start - self.offset), min(len(self.rows), columns.stop - self.offset)

    def same(self, columns: slice) -> Tensor | None:
        """Bool [n, c]: other items with the row's id."""
        if self.row_ids is None or self.column_ids is None:
            return None
        same = self.row_ids[:, None] == self.column_ids[None, columns]
        self.own(same, columns).fill_(False)
        return same


def _log_sum_exp(logits: Tensor, dim: int) -> Tensor:
    # In float64 from the sum on: near 100 each of many chunks would round by 4e-6 when their results are merged.
    # The clamp keeps rows without any negative at -inf instead of NaN.
    shift = logits.amax(dim).clamp(min=torch.finfo(logits.dtype).min)
    total = (logits - shift.unsqueeze(dim)).exp_().sum(dim)
    return total.double().log() + shift.double()


def _softplus(x: Tensor) -> Tensor:
    return -F.logsigmoid(-x)  # F.softplus is linear above 20, which float64 can tell


def statistics(tile: Tile, *, with_columns: bool) -> tuple[Statistics, Statistics]:
    """What the loss needs of the tile off its diagonal, along its rows [n] and its columns [N].

    "lse" (float64) for softmax, "loss" for sigmoid (rows only), "same" when ``options.sums_same``. With
    ``options.metrics`` also "best", with ids "best_same", and for rows "own", the pair's logit as the tile has it.
    """
    row: Statistics = {}
    columns: list[Statistics] = []
    own = torch.zeros(len(tile.rows), dtype=tile.scale.dtype, device=tile.rows.device)
    for at in tile.chunks():
        logits = matmul(tile.rows, tile.columns[at].T)
        (in_row, in_column), diagonal = _chunk_statistics(tile, logits, at, dims=(1, 0) if with_columns else (1,))
        first, last = tile.own_rows(at)
        if last > first:
            own[first:last] = diagonal
        row = {k: COMBINE[k](row[k], v) if row else v for k, v in in_row.items()}
        columns.append(in_column)
    row["own"] = own
    return row, {k: torch.cat([c[k] for c in columns]) for k in columns[0]}


def _chunk_statistics(
    tile: Tile, logits: Tensor, at: slice, dims: tuple[int, ...]
) -> tuple[tuple[Statistics, Statistics], Tensor]:
    """Of a chunk of cosines, which is overwritten: statistics along rows (dim 1) and columns (0), the diagonal."""
    options = tile.options
    stats: tuple[Statistics, Statistics] = ({}, {})

    def add(key: str, along: Callable[[int], Tensor]) -> None:
        for result, dim in zip(stats, dims, strict=False):
            result[key] = along(dim)

    same = tile.same(at)
    several = options.duplicates == "multi_positive"
    if same is not None and options.sums_same:
        cosines = torch.where(same, logits, 0.0)
        add("same", cosines.sum)
    logits.mul_(tile.scale)
    if tile.bias is not None:
        logits.add_(tile.bias)
    diagonal = tile.own(logits, at).clone()
    tile.own(logits, at).fill_(-torch.inf)
    if same is not None and several and options.metrics:
        siblings = torch.where(same, logits, -torch.inf)
        add("best_same", siblings.amax)
    if same is not None and not several:
        logits.masked_fill_(same, -torch.inf)
    if options.softmax:
        add("lse", lambda dim: _log_sum_exp(logits, dim))
    else:
        signed = logits if same is None or not several else torch.where(same, -logits, logits)
        stats[0]["loss"] = _softplus(signed).sum(1)  # -inf, left out, costs nothing
    if options.metrics:
        if same is not None and several:
            logits.masked_fill_(same, -torch.inf)
        add("best", logits.amax)
    return stats, diagonal


@dataclass(frozen=True)
class AxisTerms:
    """How the loss weighs one axis in the gradient, for each row [n] or column [N].

    `weight` is the upstream gradient of the item's loss along this axis, `lse` the float64 log-sum-exp of all its
    logits (None for sigmoid) and `same` the pull of other items of the same id, `weight` times the target's share.
    """

    weight: Tensor
    lse: Tensor | None = None
    same: Tensor | None = None


@dataclass
class TileGradients:
    """Gradients with respect to the cosines' factors off the diagonal, before the factor `scale`."""

    rows: Tensor | None
    columns: Tensor | None
    scale: Tensor
    bias: Tensor


def _softmax_strip(cosines: Tensor, tile: Tile, row: AxisTerms, column: AxisTerms, at: slice) -> Tensor:
    assert row.lse is not None and column.lse is not None
    row_lse, column_lse = row.lse.to(cosines.dtype), column.lse[at].to(cosines.dtype)
    strip = torch.addcmul(row_lse.neg()[:, None], cosines, tile.scale).exp_().mul_(row.weight[:, None])
    other = torch.addcmul(column_lse.neg()[None], cosines, tile.scale).exp_()
    return strip.addcmul_(other, column.weight[None, at])


def _sigmoid_strip(cosines: Tensor, tile: Tile, row: AxisTerms, column: AxisTerms, at: slice) -> Tensor:
    logits = cosines * tile.scale
    if tile.bias is not None:
        logits.add_(tile.bias)
    strip = logits.sigmoid()
    if tile.options.duplicates == "multi_positive" and (same := tile.same(at)) is not None:
        strip = torch.where(same, logits.neg_().sigmoid_().neg_(), strip)
    return strip.mul_(row.weight[:, None] + column.weight[None, at])


def gradients(
    tile: Tile, row: AxisTerms, column: AxisTerms, *, need_rows: bool, need_columns: bool, need_scalars: bool
) -> TileGradients:
    """Gradient of the weighted loss through the tile off its diagonal.

    `rows` [n, D] and `columns` [N, D] come in the accumulation dtype, None where not needed; `scale` is the gradient
    with respect to the logit scale, `bias` to the logit bias.
    """
    options = tile.options
    accumulate = tile.scale.dtype
    dtype = tile.rows.dtype
    # float16 cannot hold probabilities of 1/N, and a second positive's coefficient must not be rounded to 16 bits.
    if dtype == torch.float16 or options.sums_same:
        dtype = accumulate
    rows = tile.rows.to(dtype)
    d_rows = torch.zeros(tile.rows.shape, dtype=accumulate, device=rows.device) if need_rows else None
    d_columns = torch.empty(tile.columns.shape, dtype=accumulate, device=rows.device) if need_columns else None
    d_scale = torch.zeros((), dtype=torch.float64, device=rows.device)
    d_bias = torch.zeros((), dtype=torch.float64, device=rows.device)
    make_strip = _softmax_strip if options.softmax else _sigmoid_strip
    for at in tile.chunks():
        cosines = matmul(tile.rows, tile.columns[at].T)
        strip = make_strip(cosines, tile, row, column, at)
        if (same := tile.same(at)) is not None:
            if options.duplicates == "mask":
                strip.masked_fill_(same, 0.0)
            if row.same is not None and column.same is not None:
                strip.sub_(torch.where(same, row.same[:, None] + column.same[None, at], 0.0))
        tile.own(strip, at).zero_()
        if need_scalars:
            d_scale += cosines.mul_(strip).sum()
            if tile.bias is not None:
                d_bias += strip.sum()
        strip = strip.to(dtype)
        if d_rows is not None:
            matmul_add_(d_rows, strip, tile.columns[at].to(dtype))
        if d_columns is not None:
            d_columns[at] = matmul(strip.T, rows)
    return TileGradients(d_rows, d_columns, d_scale, d_bias)
