"""Forward and backward of the contrastive loss over a backend's tile functions and the exchange between ranks.

Default (8nND FLOP): this rank's images against everybody's texts. Rows are complete; column statistics are exchanged
as O(N) numbers and the text gradient in one reduce-scatter; images never travel.
``deterministic`` (12nND): a second product, this rank's texts against everybody's images, makes the columns and the
text gradient complete too, and rows keep their places in it whatever the rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from farl_kernels.contrastive.backends import backend as named
from farl_kernels.contrastive.exchange import Ranks
from farl_kernels.contrastive.options import Options
from farl_kernels.contrastive.reference import COMBINE, AxisTerms, Statistics, Tile
from farl_kernels.contrastive.targets import LinearTerm, linear_term, uniform_gradient
from farl_kernels.precision import accumulation_dtype, without_autocast


@dataclass(frozen=True)
class Inputs:
    """Features [n, D] and ids [n] of this rank, texts [N, D], ids [N] (and, deterministic, images) of all of them."""

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor | None
    ids: Tensor | None
    texts: Tensor
    images: Tensor | None
    all_ids: Tensor | None


@dataclass(frozen=True)
class Outputs:
    """Of this rank's pairs: loss [n]; bools [2, n], whether the image's (the text's) best is its own, empty without
    metrics; and for the backward pass cosines [n], pull [n], log-sum-exps [2, n]: see ``pairs.py``."""

    loss: Tensor
    correct: Tensor
    cosines: Tensor
    pull: Tensor
    lse: Tensor


@dataclass(frozen=True)
class Gradients:
    """What the backward pass was asked for. `text` waits for the other ranks' shares."""

    image: Tensor | None
    text: Callable[[], Tensor] | None
    scale: Tensor
    bias: Tensor


def gather(
    image: Tensor,
    text: Tensor,
    texts: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    ids: Tensor | None,
    ranks: Ranks,
    options: Options,
) -> Inputs:
    """The inputs of both passes; `texts` are gathered already."""
    s = scale.to(accumulation_dtype(image.dtype))
    b = None if bias is None else bias.to(s.dtype)
    images = ranks.all_gather(image) if options.deterministic else None
    return Inputs(image, text, s, b, ids, texts, images, None if ids is None else ranks.all_gather(ids))


def forward(x: Inputs, ranks: Ranks, options: Options, backend: str) -> Outputs:
    """Losses of this rank's pairs, and what the backward pass needs."""
    tiles = named(backend)
    with without_autocast(x.image.device):
        tile = Tile(x.image, x.texts, ranks.rank * len(x.image), x.scale, x.bias, x.ids, x.all_ids, options)
        both_axes = options.softmax or options.metrics
        if x.images is None:
            row, partial = tiles.statistics(tile, with_columns=both_axes)
            column = _exchange_columns(ranks, partial)
        else:
            row = tiles.row_statistics(tile)
            column = tiles.row_statistics(replace(tile, rows=x.text, columns=x.images)) if both_axes else {}
        if options.softmax:
            pairs = tiles.pairs(x.image, x.text, x.scale, None, row["lse"], column["lse"])
            loss, pull = _with_linear_term(x, tile, pairs.loss, pairs.pull, pairs.cosines, row, column, ranks)
        else:
            pairs = tiles.pairs(x.image, x.text, x.scale, x.bias, row["loss"], None)
            loss, pull = pairs.loss.to(x.scale.dtype), pairs.pull
        correct = torch.empty(2, 0, dtype=torch.bool, device=loss.device)
        if options.metrics:
            correct = torch.stack([_correct(row, row["own"]), _correct(column, column.get("own", row["own"]))])
        return Outputs(loss, correct, pairs.cosines, pull, pairs.lse)


def _with_linear_term(
    x: Inputs,
    tile: Tile,
    loss: Tensor,
    pull: Tensor,
    cosines: Tensor,
    row: Statistics,
    column: Statistics,
    ranks: Ranks,
) -> tuple[Tensor, Tensor]:
    """Loss and pull with what smoothing and several positives add to them."""
    term = _linear_term(x, tile.options).at(tile.diagonal)
    if term.own is None:
        return loss, pull
    linear = term.own * cosines
    if term.same is not None:
        linear = linear - 0.5 * term.same * (row["same"] + column["same"])
    if term.uniform is not None:
        # In deterministic mode a sum over ranks would depend on their number.
        image_sum = (x.image if x.images is None else x.images).to(x.scale.dtype).sum(0)
        image_sum = ranks.sum(image_sum) if x.images is None else image_sum
        text_sum = x.texts.to(x.scale.dtype).sum(0)
        touched = (x.image.to(x.scale.dtype) * text_sum + x.text.to(x.scale.dtype) * image_sum).sum(1)
        linear = linear - 0.5 * term.uniform * touched
    return (loss + x.scale * linear).to(loss.dtype), pull + 2 * term.own


def backward(
    grad: Tensor,
    x: Inputs,
    saved: Outputs,
    ranks: Ranks,
    options: Options,
    backend: str,
    *,
    need_image: bool,
    need_text: bool,
    need_scalars: bool,
) -> Gradients:
    """Gradients of ``sum(grad * loss)``, summed over the ranks' losses."""
    tiles = named(backend)
    with without_autocast(x.image.device):
        dtype = x.scale.dtype
        tile = Tile(x.image, x.texts, ranks.rank * len(x.image), x.scale, x.bias, x.ids, x.all_ids, options)
        here = tile.diagonal
        # A softmax pair's loss is half its row's and half its column's, a sigmoid pair's its row's alone.
        weight = (grad.to(dtype) * (0.5 if options.softmax else 1.0)).contiguous()
        uniform = None
        if options.softmax:
            # The lses of the axes that other ranks hold: theirs of the columns, in float64 like the weights then.
            row_lse, column_lse = saved.lse.unbind(0)
            weights, lses = weight, saved.lse
            if ranks.world_size > 1:
                all_weights, *all_lses = ranks.all_gather(torch.stack([weight.double(), *saved.lse], dim=1)).unbind(1)
                weights, lses = all_weights.to(dtype), torch.stack(all_lses)
            term = _linear_term(x, options)
            same = None if term.same is None else term.same * weights
            uniform = None if term.uniform is None else term.uniform * weights
            same_here = None if same is None else same[here].contiguous()
            image_terms, all_text_terms = AxisTerms(weight, row_lse, same_here), AxisTerms(weights, lses[1], same)
            text_terms, all_image_terms = AxisTerms(weight, column_lse, same_here), AxisTerms(weights, lses[0], same)
        else:
            weights = ranks.all_gather(weight)
            image_terms, all_text_terms = AxisTerms(weight), AxisTerms(torch.zeros_like(weights))
            text_terms, all_image_terms = AxisTerms(torch.zeros_like(weight)), AxisTerms(weights)

        needs = {"need_rows": need_image, "need_scalars": need_scalars}
        d_text = None
        if x.images is None:
            part = tiles.gradients(tile, image_terms, all_text_terms, need_columns=need_text, **needs)
        else:
            part = tiles.row_gradients(tile, image_terms, all_text_terms, **needs)
            if need_text:
                swapped = replace(tile, rows=x.text, columns=x.images)
                d_text = tiles.row_gradients(
                    swapped, text_terms, all_image_terms, need_rows=True, need_scalars=False
                ).rows
        d_image, d_texts = part.rows, part.columns

        pull = saved.pull * weight
        d_scale, d_bias = part.scale, part.bias
        if need_scalars:
            d_scale = d_scale + (pull * saved.cosines).sum(dtype=torch.float64)
            d_bias = d_bias + pull.sum(dtype=torch.float64)
        if uniform is not None:
            wide_image = x.image.to(dtype)
            pushed = uniform_gradient(x.texts.to(dtype), uniform[here], uniform)
            d_scale = d_scale - (pushed * wide_image).sum()
            if d_image is not None:
                d_image -= pushed
            if d_texts is not None:
                d_texts -= uniform_gradient(wide_image, uniform, uniform[here])
            if d_text is not None and x.images is not None:
                d_text -= uniform_gradient(x.images.to(dtype), uniform[here], uniform)
        if d_image is not None:
            d_image = tiles.finish(d_image, pull, x.text, x.scale)
        return Gradients(d_image, _text_gradient(x, d_text, d_texts, pull, ranks, backend), d_scale, d_bias)


def _text_gradient(
    x: Inputs, d_text: Tensor | None, d_texts: Tensor | None, pull: Tensor, ranks: Ranks, backend: str
) -> Callable[[], Tensor] | None:
    """Starts the exchange of `d_texts` [N, D] where there is one. The result holds no tensor that leads to `text`'s
    graph, which would lead back to the result."""
    finish, image, scale, dtype = named(backend).finish, x.image.detach(), x.scale.detach(), x.text.dtype
    if d_texts is None:
        return None if d_text is None else lambda: finish(d_text, pull, image, scale)
    if ranks.world_size == 1:
        return lambda: finish(d_texts, pull, image, scale)
    # Only what travels is rounded, and not to float16, which would lose gradients of 1/N on the way.
    wire = scale.dtype if dtype == torch.float16 else dtype
    arrive = ranks.start_reduce_scatter((d_texts * scale).to(wire), scale.dtype)
    return lambda: torch.addcmul(arrive(), pull[:, None] * scale, image.to(scale.dtype)).to(dtype)


def _linear_term(x: Inputs, options: Options) -> LinearTerm:
    return linear_term(options, len(x.texts), x.all_ids, x.scale)


def _exchange_columns(ranks: Ranks, partial: Statistics) -> Statistics:
    """Column statistics [N] over this rank's rows -> those of this rank's columns [n] over all rows."""
    if ranks.world_size == 1 or not partial:
        return partial
    received = ranks.all_to_all(torch.stack([x.double().view(ranks.world_size, -1) for x in partial.values()], dim=1))
    result = {}
    for k, (key, x) in enumerate(partial.items()):
        total = received[0, k]
        for part in received[1:, k]:
            total = COMBINE[key](total, part)
        result[key] = total.to(x.dtype)
    return result


def _correct(stats: Statistics, own: Tensor) -> Tensor:
    best = torch.maximum(own, stats["best_same"]) if "best_same" in stats else own
    return best > stats["best"]  # a tie is a miss: collapsed features score 0, not 1
