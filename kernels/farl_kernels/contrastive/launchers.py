"""Starts the contrastive kernels: shapes, slots and configurations; nothing here reads what a tensor holds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import triton
from torch import Tensor

from farl_kernels import tables
from farl_kernels.contrastive import kernels, pair_kernels
from farl_kernels.contrastive.options import DUPLICATES, Options
from farl_kernels.contrastive.pairs import Pairs
from farl_kernels.contrastive.products import multiply
from farl_kernels.contrastive.reference import AxisTerms, Statistics, Tile, TileGradients
from farl_kernels.gemm import logit_chunk_bytes
from farl_kernels.launch import launch
from farl_kernels.precision import dot_precision

OP = "contrastive"
FOLD_BLOCK, FOLD_DEPTH = 128, 8
# Slots for the partial sums of one launch; larger tiles are worked in several column chunks.
SLOT_BYTES = 2**27
# A sum of exponentials is taken as it is from this much a term on (in units of the shift): what the GPU flushes to zero
# below 2^-126 is then beyond its last digit.
LEAST_TERM = 2.0**-102
# Below, a tile of logits has too few blocks of the large configuration to fill a GPU.
SMALL_TILE = 2**23
# Programs of the general path's launches, in which most often nothing is to be done.
GENERAL_PROGRAMS = 512


@dataclass(frozen=True)
class _Tiling:
    """How a tile is cut into blocks: the configuration, and the columns that a launch takes."""

    tile: Tile
    kernel: str
    rows: Tensor
    columns: Tensor
    config: tables.Config
    precision: str

    @property
    def row_before(self) -> int:
        """Rows of padding: for ``deterministic``, rows have the same place in a block on any rank."""
        return self.tile.offset % self.config["BLOCK_M"] if self.tile.options.deterministic else 0

    @property
    def even(self) -> bool:
        """Whether the feature dimension fills whole blocks."""
        return self.rows.shape[1] % self.config["BLOCK_K"] == 0

    @property
    def row_tiles(self) -> int:
        return triton.cdiv(self.row_before + len(self.rows), self.config["BLOCK_M"])

    def column_tiles(self, width: int) -> int:
        return triton.cdiv(width, self.config["BLOCK_N"])

    def sizes(self, at: slice) -> tuple[int, ...]:
        """The arguments from `n` to `width`."""
        return len(self.rows), self.row_before, self.tile.offset, at.start, at.stop - at.start

    def tiles(self, at: slice) -> tuple[int, ...]:
        """The arguments from `row_stride` to `column_tiles`."""
        strides = self.rows.stride(0), self.columns.stride(0)
        return *strides, self.rows.shape[1], self.row_tiles, self.column_tiles(at.stop - at.start)

    def chunks(self, bytes_of_tile: int, budget: int) -> Iterator[slice]:
        """Column ranges, whole multiples of FOLD_DEPTH blocks, whose blocks take no more than `budget`."""
        wide = max(1, budget // max(1, bytes_of_tile) // FOLD_DEPTH) * FOLD_DEPTH * self.config["BLOCK_N"]
        for start in range(0, len(self.columns), wide):
            yield slice(start, min(start + wide, len(self.columns)))

    @cached_property
    def chunk_rows(self) -> int:
        """Rows that a chunk's bytes are counted for; all of them for ``deterministic``: chunks must not change."""
        return len(self.columns) if self.tile.options.deterministic else len(self.rows)


def _by_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def bucket(rows: Tensor, columns: Tensor, options: Options) -> str:
    """The word for a tile's dtype and size in the tables: "half", "half_small", "tf32" or "ieee"; "half_more" and
    "tf32_more" for what keeps more in registers than the plain softmax."""
    more = "_more" if options.metrics or options.compares_ids or not options.softmax else ""
    if rows.dtype == torch.float32:
        precision = input_precision(rows, options)
        return precision + more if precision == "tf32" else precision
    # One configuration for all sizes where bits must not depend on them.
    small = not options.deterministic and len(rows) * len(columns) <= SMALL_TILE
    return "half_small" if small else "half" + more


def input_precision(rows: Tensor, options: Options) -> str:
    """`input_precision` of the products: that of the option, or for float32 what PyTorch's setting says."""
    if options.precision is None or rows.dtype != torch.float32:
        return dot_precision(rows.dtype)
    return "tf32" if options.precision == "tf32" else "ieee"


def _tiling(tile: Tile, kernel: str) -> _Tiling:
    rows, columns = _by_rows(tile.rows), _by_rows(tile.columns)
    config = tables.lookup(OP, kernel, bucket(rows, columns, tile.options), rows.device)
    return _Tiling(tile, kernel, rows, columns, config, input_precision(rows, tile.options))


def statistics(tile: Tile, *, with_columns: bool) -> tuple[Statistics, Statistics]:
    """:func:`farl_kernels.contrastive.reference.statistics` by kernels; logits in "best" and "own" are in base 2."""
    options = tile.options
    t = _tiling(tile, "statistics")
    n, count, device = len(t.rows), len(t.columns), t.rows.device
    names = ["lse" if options.softmax else "loss"]
    names += ["same"] * options.sums_same + ["best"] * options.metrics
    names += ["best_same"] * (options.metrics and options.duplicates == "multi_positive")
    kinds = len(names)
    slot_kinds = max(kinds, 2) if options.softmax else kinds  # the second try keeps maxima too
    stats = torch.empty(kinds * (n + (count if with_columns else 0)), dtype=torch.float64, device=device)
    largest = torch.empty(n if options.softmax else 0, dtype=torch.float32, device=device)
    total = torch.empty(n if options.softmax else 0, dtype=torch.float64, device=device)
    own = torch.empty(n if options.metrics else 0, dtype=torch.float32, device=device)
    row_programs = triton.cdiv(n, FOLD_BLOCK)
    flags = torch.empty(
        row_programs + (triton.cdiv(count, FOLD_BLOCK) if with_columns else 0), dtype=torch.int32, device=device
    )
    row_blocks = triton.cdiv(t.chunk_rows, t.config["BLOCK_M"])
    bytes_of_tile = 4 * slot_kinds * (t.chunk_rows + t.config["BLOCK_N"] * row_blocks)
    chunks = list(t.chunks(bytes_of_tile, options.chunk_bytes or SLOT_BYTES))
    widest = chunks[0].stop
    classes = _classes(tile)
    slots = torch.empty(
        slot_kinds * (t.column_tiles(widest) * n + t.row_tiles * widest), dtype=torch.float32, device=device
    )
    for online in (False, True) if options.softmax else (False,):
        for at in chunks:
            width, column_tiles = at.stop - at.start, t.column_tiles(at.stop - at.start)
            tiles = t.row_tiles * column_tiles
            shared = {"ONLINE": online, "SOFTMAX": options.softmax}
            launch(
                kernels.contrastive_statistics_kernel,
                (min(tiles, GENERAL_PROGRAMS) if online else tiles,),
                *(t.rows, t.columns, *classes, tile.scale, tile.bias, flags, slots, own),
                *(len(flags), *t.sizes(at), *t.tiles(at)),
                **shared,
                DUPLICATES=DUPLICATES.index(options.duplicates),
                SUM_SAME=options.sums_same and not online,
                BEST=options.metrics and not online,
                WITH_COLUMNS=with_columns,
                KINDS=slot_kinds,
                EVEN=t.even,
                PRECISION=t.precision,
                **t.config,
            )
            launch(
                pair_kernels.contrastive_fold_kernel,
                (row_programs + (triton.cdiv(width, FOLD_BLOCK) if with_columns else 0),),
                *(slots, stats, largest, total, tile.scale, flags, len(flags), n, count, at.start, width),
                *(t.row_tiles, column_tiles, row_programs, count * LEAST_TERM),
                LATER=at.start > 0,
                LAST=at.stop == count,
                **shared,
                SUMS=1 + options.sums_same,
                KINDS=kinds,
                SLOT_KINDS=slot_kinds,
                BLOCK=FOLD_BLOCK,
                DEPTH=FOLD_DEPTH,
                num_warps=4,
                num_stages=1,
            )
    row = {name: stats[k * n : (k + 1) * n] for k, name in enumerate(names)}
    if options.metrics:
        row["own"] = own
    if not with_columns:
        return row, {}
    start = kinds * n
    column = {name: stats[start + k * count : start + (k + 1) * count] for k, name in enumerate(names)}
    if not options.softmax:
        del column["loss"]  # the rows have all of it
    return row, column


def _strip_dtype(tile: Tile) -> tuple[torch.dtype, bool]:
    """The strip's dtype, and whether a second one takes what its 16 bits round away.

    A second positive's coefficient is near 1 and most of a row's gradient: it must not be rounded to 16 bits.
    """
    return tile.rows.dtype, tile.rows.dtype != torch.float32 and tile.options.sums_same


def _unit(tile: Tile, row: AxisTerms, column: AxisTerms) -> Tensor | None:
    """float16 cannot hold probabilities of 1/N: what its strip is multiplied with, so that its largest is near 2^13."""
    if tile.rows.dtype != torch.float16:
        return None
    largest = torch.maximum(row.weight.abs().amax(), column.weight.abs().amax())
    return torch.exp2(13 - torch.log2(largest.clamp(min=2.0**-100)).ceil())


def gradients(
    tile: Tile, row: AxisTerms, column: AxisTerms, *, need_rows: bool, need_columns: bool, need_scalars: bool
) -> TileGradients:
    """:func:`farl_kernels.contrastive.reference.gradients` by the strip kernel and two products a column chunk."""
    options = tile.options
    t = _tiling(tile, "strip")
    n, count, dim = len(t.rows), len(t.columns), t.rows.shape[1]
    empty = {"dtype": torch.float32, "device": t.rows.device}
    d_rows = torch.empty(n, dim, **empty) if need_rows else None
    d_columns = torch.empty(count, dim, **empty) if need_columns else None
    dtype, split = _strip_dtype(tile)
    unit = _unit(tile, row, column)
    bytes_of_tile = (1 + split) * dtype.itemsize * t.chunk_rows * t.config["BLOCK_N"]
    chunks = list(t.chunks(bytes_of_tile, options.chunk_bytes or logit_chunk_bytes(t.rows.device)))
    pitch = triton.cdiv(chunks[0].stop, 16) * 16
    strips = None
    if need_rows or need_columns:
        strips = torch.empty(1 + split, n, pitch, dtype=dtype, device=t.rows.device)
    sums = []
    classes = _classes(tile)
    # With ids and a second exponential a tile does not fit into the registers of four warps.
    exact = dtype == torch.float32 and t.precision == "ieee"
    more_warps = {"num_warps": 8} if options.compares_ids and not exact else {}
    of_rows, of_columns, flags = _terms(tile, row, column)
    for at in chunks:
        width, tiles = at.stop - at.start, t.row_tiles * t.column_tiles(at.stop - at.start)
        part = torch.empty(1 if tile.bias is None else 2, tiles, **empty) if need_scalars else None
        sums += [] if part is None else [part]
        for general in (False, True) if options.softmax else (False,):
            launch(
                kernels.contrastive_strip_kernel,
                (min(tiles, GENERAL_PROGRAMS) if general else tiles,),
                *(t.rows, t.columns, *classes, tile.scale, tile.bias),
                *(row.weight, *of_rows, row.same, column.weight, *of_columns, column.same, flags, unit),
                *(None if strips is None else strips[0], strips[1] if strips is not None and split else None, part),
                *(0 if flags is None else len(flags), *t.sizes(at), pitch, *t.tiles(at)),
                GENERAL=general,
                SOFTMAX=options.softmax,
                DUPLICATES=DUPLICATES.index(options.duplicates),
                EVEN=t.even,
                PRECISION=t.precision,
                **t.config | (more_warps if general else {}),
            )
        if strips is None:
            continue
        if d_rows is not None and options.deterministic:
            _product(t, strips, at, pitch, d_rows)
        for k, strip in enumerate(strips[:, :, :width]):
            if d_rows is not None and not options.deterministic:
                multiply(strip, t.columns[at], d_rows, add=k > 0 or at.start > 0, precision=options.precision)
            if d_columns is not None:
                multiply(strip.T, t.rows, d_columns[at], add=k > 0, precision=options.precision)
    if unit is not None:
        for d in (d_rows, d_columns):
            if d is not None:
                d.div_(unit)
    scalars = torch.cat(sums, dim=1).sum(1, dtype=torch.float64) if sums else torch.zeros(2, **empty)
    return TileGradients(d_rows, d_columns, scalars[0], scalars[-1])


def _terms(
    tile: Tile, row: AxisTerms, column: AxisTerms
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...], Tensor | None]:
    """Factor and base-2 log-sum-exp of the rows, and of the columns, and flags; None for sigmoid."""
    if row.lse is None or column.lse is None:
        return (None, None), (None, None), None
    n, count, device = len(row.lse), len(column.lse), row.lse.device
    terms = torch.empty(2, n + count, dtype=torch.float32, device=device)
    row_programs = triton.cdiv(n, FOLD_BLOCK)
    flags = torch.empty(row_programs + triton.cdiv(count, FOLD_BLOCK), dtype=torch.int32, device=device)
    launch(
        pair_kernels.contrastive_terms_kernel,
        (len(flags),),
        *(row.weight, row.lse, column.weight, column.lse, tile.scale, terms, flags, n, count, row_programs),
        math.log2(count * LEAST_TERM),
        BLOCK=FOLD_BLOCK,
        num_warps=4,
        num_stages=1,
    )
    return (terms[0, :n], terms[1, :n]), (terms[0, n:], terms[1, n:]), flags


def _classes(tile: Tile) -> tuple[Tensor | None, Tensor | None]:
    """Ids of rows and columns as int32, which take half the registers: places in the order of the columns' ids."""
    if tile.row_ids is None or tile.column_ids is None:
        return None, None
    ordered = torch.sort(tile.column_ids).values
    rows, columns = (torch.searchsorted(ordered, x, out_int32=True) for x in (tile.row_ids, tile.column_ids))
    return rows, columns


def _product(t: _Tiling, strips: Tensor, at: slice, pitch: int, out: Tensor) -> None:
    name = t.precision if t.rows.dtype == torch.float32 else "half"
    config = tables.lookup(OP, "product", name, t.rows.device)
    row_before = t.tile.offset % config["BLOCK_M"]
    n, dim = out.shape
    launch(
        pair_kernels.contrastive_product_kernel,
        (triton.cdiv(row_before + n, config["BLOCK_M"]), triton.cdiv(dim, config["BLOCK_N"])),
        *(strips[0], strips[1] if len(strips) > 1 else None, t.columns, out),
        *(n, row_before, at.start, at.stop - at.start, pitch, t.columns.stride(0)),
        ADD=at.start > 0,
        D=dim,
        PRECISION=t.precision,
        **config,
    )


def pairs(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    row: Tensor,
    column: Tensor | None,
) -> Pairs:
    """:func:`farl_kernels.contrastive.pairs.pairs` in one launch."""
    image, text = _by_rows(image), _by_rows(text)
    n, dim = image.shape
    softmax = column is not None
    loss, cosines, pull = torch.empty(3, n, dtype=torch.float32, device=image.device).unbind(0)
    lse = torch.empty(2, n if softmax else 0, dtype=torch.float64, device=image.device)
    config = tables.lookup(OP, "pairs", "any", image.device)
    launch(
        pair_kernels.contrastive_pairs_kernel,
        (triton.cdiv(n, config["BLOCK_M"]),),
        *(image, text, scale, bias, row, column, loss, cosines, pull, lse, n, image.stride(0), text.stride(0)),
        SOFTMAX=softmax,
        D=dim,
        **config,
    )
    return Pairs(cosines, loss, pull, lse)


def finish(gradient: Tensor, pull: Tensor, other: Tensor, scale: Tensor) -> Tensor:
    """:func:`farl_kernels.contrastive.pairs.finish` in one launch."""
    other = _by_rows(other)
    n, dim = gradient.shape
    out = torch.empty(n, dim, dtype=other.dtype, device=other.device)
    config = tables.lookup(OP, "finish", "any", other.device)
    launch(
        pair_kernels.contrastive_finish_kernel,
        (triton.cdiv(n, config["BLOCK_M"]), triton.cdiv(dim, config["BLOCK_D"])),
        *(gradient, pull, other, scale, out, n, other.stride(0)),
        D=dim,
        **config,
    )
    return out
