"""The contrastive loss as one autograd node over a backend's tile functions and the exchange between ranks.

Default (8nND FLOP): this rank's images against everybody's texts. Rows are complete; column statistics are exchanged
as O(N) numbers and the text gradient in one reduce-scatter; images never travel.
``deterministic`` (12nND): a second product, this rank's texts against everybody's images, makes the columns and the
text gradient complete too, and both are worked in fixed blocks (``blocks.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from farl_kernels.contrastive.blocks import row_gradients, row_statistics
from farl_kernels.contrastive.exchange import GatheredFeatures, Ranks
from farl_kernels.contrastive.options import Options
from farl_kernels.contrastive.reference import COMBINE, AxisTerms, Backend, Statistics, Tile
from farl_kernels.contrastive.targets import linear_term, uniform_gradient
from farl_kernels.precision import accumulation_dtype


@dataclass(frozen=True)
class Call:
    """What the node needs beside tensors."""

    gathered: GatheredFeatures
    options: Options
    backend: Backend


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


class ContrastiveFunction(torch.autograd.Function):
    """Losses of this rank's pairs [n]; with metrics two bools [n] more: the image's (the text's) best is its own.

    The gradient is that of the sum over all ranks of what each makes of its losses.
    """

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, ids: Tensor | None, call: Call
    ) -> tuple[Tensor, ...]:
        options, backend, ranks = call.options, call.backend, call.gathered.ranks
        texts = call.gathered.wait()
        images = ranks.all_gather(image) if options.deterministic else None
        all_ids = None if ids is None else ranks.all_gather(ids)
        s = scale.to(accumulation_dtype(image.dtype))
        b = None if bias is None else bias.to(s.dtype)
        tile = Tile(image, texts, ranks.rank * len(image), s, b, ids, all_ids, options)
        both_axes = options.softmax or options.metrics
        if images is None:
            row, partial = backend.statistics(tile, with_columns=both_axes)
            column = _exchange_columns(ranks, partial)
        else:
            row = row_statistics(backend, tile)
            column = row_statistics(backend, replace(tile, rows=text, columns=images)) if both_axes else {}
        cosines = (image.to(s.dtype) * text.to(s.dtype)).sum(1)
        own = cosines * s if b is None else cosines * s + b
        row_lse = column_lse = None
        if options.softmax:
            over_row, over_column = row["lse"] - own, column["lse"] - own
            zero = over_row.new_zeros(())  # softplus as logaddexp: F.softplus is linear above 20
            loss = 0.5 * (torch.logaddexp(over_row, zero) + torch.logaddexp(over_column, zero))
            pull = -(over_row.sigmoid() + over_column.sigmoid()).to(s.dtype)
            row_lse = torch.logaddexp(row["lse"], own.double()).to(s.dtype)
            column_lse = torch.logaddexp(column["lse"], own.double()).to(s.dtype)
            term = linear_term(options, len(texts), all_ids, s).at(tile.diagonal)
            if term.own is not None:
                linear = term.own * cosines
                pull += 2 * term.own
                if term.same is not None:
                    linear -= 0.5 * term.same * (row["same"] + column["same"])
                if term.uniform is not None:
                    # In deterministic mode a sum over ranks would depend on their number.
                    image_sum = (image if images is None else images).to(s.dtype).sum(0)
                    image_sum = ranks.sum(image_sum) if images is None else image_sum
                    text_sum = texts.to(s.dtype).sum(0)
                    touched = (image.to(s.dtype) * text_sum + text.to(s.dtype) * image_sum).sum(1)
                    linear -= 0.5 * term.uniform * touched
                loss = loss + s * linear
        else:
            loss = row["loss"] - F.logsigmoid(own)
            pull = -torch.sigmoid(-own)
        # Not the handle: the buffers of all ranks' features would outlive the backward pass.
        ctx.ranks, ctx.returning, ctx.options, ctx.backend = ranks, call.gathered.returning, options, backend
        ctx.save_for_backward(image, text, texts, images, s, b, ids, all_ids, cosines, pull, row_lse, column_lse)
        ctx.scalar_dtypes = scale.dtype, s.dtype if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        if not options.metrics:
            return (loss.to(s.dtype),)
        correct = _correct(row, row["own"]), _correct(column, column.get("own", row["own"]))
        ctx.mark_non_differentiable(*correct)
        return (loss.to(s.dtype), *correct)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("contrastive_loss has no second derivative: call backward without create_graph")
        if grads[0] is None:
            return (None,) * 6
        image, text, texts, images, s, b, ids, all_ids, cosines, pull, row_lse, column_lse = ctx.saved_tensors
        options, backend, ranks = ctx.options, ctx.backend, ctx.ranks
        need_image, need_text, *need = ctx.needs_input_grad[:4]
        need_scalars = any(need)
        tile = Tile(image, texts, ranks.rank * len(image), s, b, ids, all_ids, options)
        here = tile.diagonal

        # A softmax pair's loss is half its row's and half its column's, a sigmoid pair's its row's alone.
        weight = grads[0].to(s.dtype) * (0.5 if options.softmax else 1.0)
        vectors = [weight, *(x for x in (column_lse, row_lse) if x is not None)]
        weights, *lses = (x.contiguous() for x in ranks.all_gather(torch.stack(vectors, dim=1)).unbind(1))
        if options.softmax:
            term = linear_term(options, len(texts), all_ids, s)
            same = None if term.same is None else term.same * weights
            uniform = None if term.uniform is None else term.uniform * weights
            same_here = None if same is None else same[here]
            image_terms, all_text_terms = AxisTerms(weight, row_lse, same_here), AxisTerms(weights, lses[0], same)
            text_terms, all_image_terms = AxisTerms(weight, column_lse, same_here), AxisTerms(weights, lses[1], same)
        else:
            uniform = None
            image_terms, all_text_terms = AxisTerms(weight), AxisTerms(torch.zeros_like(weights))
            text_terms, all_image_terms = AxisTerms(torch.zeros_like(weight)), AxisTerms(weights)

        d_texts = d_text = d_image = None
        if images is None:
            part = backend.gradients(
                tile,
                image_terms,
                all_text_terms,
                need_rows=need_image,
                need_columns=need_text,
                need_scalars=need_scalars,
            )
            d_texts = part.columns
        else:
            part = row_gradients(
                backend, tile, image_terms, all_text_terms, need_rows=need_image, need_scalars=need_scalars
            )
            if need_text:
                swapped = replace(tile, rows=text, columns=images)
                d_text = row_gradients(
                    backend, swapped, text_terms, all_image_terms, need_rows=True, need_scalars=False
                ).rows
        d_image = part.rows

        pull = pull * weight
        d_scale = part.scale + (pull * cosines).sum()
        d_bias = part.bias + pull.sum()
        wide_image, wide_text = image.to(s.dtype), text.to(s.dtype)
        if uniform is not None:
            pushed = uniform_gradient(texts.to(s.dtype), uniform[here], uniform)
            d_scale -= (pushed * wide_image).sum()
            if d_image is not None:
                d_image -= pushed
            if d_texts is not None:
                d_texts -= uniform_gradient(wide_image, uniform, uniform[here])
            if d_text is not None and images is not None:
                d_text -= uniform_gradient(images.to(s.dtype), uniform[here], uniform)
        if d_texts is not None:
            text_dtype = text.dtype  # `finish` must not hold `text`, whose graph leads to `returning`
            # Only what travels is rounded, and not to float16, which would lose gradients of 1/N on the way.
            wire = s.dtype if ranks.world_size == 1 or text_dtype == torch.float16 else text_dtype
            arrive = ranks.start_reduce_scatter((d_texts * s).to(wire), s.dtype)

            def finish() -> Tensor:
                return torch.addcmul(arrive(), pull[:, None] * s, wide_image).to(text_dtype)

            d_text = finish() if ranks.world_size == 1 else ctx.returning.send(finish, like=text)
        elif d_text is not None:
            d_text = torch.addcmul(d_text, pull[:, None], wide_image).mul_(s).to(text.dtype)
        if d_image is not None:
            d_image = torch.addcmul(d_image, pull[:, None], wide_text).mul_(s).to(image.dtype)
        scale_dtype, bias_dtype = ctx.scalar_dtypes
        return (
            d_image,
            d_text,
            d_scale.to(scale_dtype) if need[0] else None,
            d_bias.to(bias_dtype) if need[1] else None,
            None,
            None,
        )
