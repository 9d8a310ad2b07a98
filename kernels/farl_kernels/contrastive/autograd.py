"""The contrastive loss as one autograd node: over the opaque ops in one process, over the exchange with several."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from farl_kernels.contrastive import custom_ops, passes
from farl_kernels.contrastive.exchange import GatheredFeatures
from farl_kernels.contrastive.options import OP, Options


def loss_of_pairs(
    image: Tensor,
    gathered: GatheredFeatures,
    scale: Tensor,
    bias: Tensor | None,
    ids: Tensor | None,
    options: Options,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of this rank's pairs [n]; whether the image's and the text's best is its own, bools [2, n]; their
    log-sum-exps [2, n]. The last two are without gradient, and empty where `options` does not ask for them.

    The gradient is that of the sum over all ranks of what each makes of its losses.
    """
    if gathered.ranks.world_size == 1:
        return _OneProcess.apply(image, gathered.local, scale, bias, ids, options, backend)
    return _several(image, gathered, scale, bias, ids, options, backend)


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(f"{OP} has no second derivative: call backward without create_graph")


def _shown_lse(lse: Tensor, loss: Tensor, options: Options) -> Tensor:
    """A copy for the caller, who may change it: the backward pass needs its own."""
    return lse.to(loss.dtype, copy=True) if options.lse else lse.new_empty((2, 0))


class _OneProcess(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        ids: Tensor | None,
        options: Options,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        settings = custom_ops.settings(options)
        loss, correct, cosines, pull, lse = custom_ops.FORWARD(image, text, scale, bias, ids, *settings, backend)
        ctx.save_for_backward(image, text, scale, bias, ids, cosines, pull, lse)
        ctx.settings = (*settings, backend)
        ctx.set_materialize_grads(False)
        shown = _shown_lse(lse, loss, options)
        ctx.mark_non_differentiable(correct, shown)
        return loss, correct, shown

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        if grads[0] is None:
            return (None,) * 7
        image, text, scale, bias, ids, cosines, pull, lse = ctx.saved_tensors
        need_image, need_text, need_scale, need_bias = ctx.needs_input_grad[:4]
        d_image, d_text, d_scale, d_bias = custom_ops.BACKWARD(
            grads[0], image, text, scale, bias, ids, cosines, pull, lse, need_image, need_text,
            need_scale or need_bias, *ctx.settings,
        )  # fmt: skip
        return (
            d_image if need_image else None,
            d_text if need_text else None,
            d_scale if need_scale else None,
            d_bias if need_bias else None,
            None,
            None,
            None,
        )


@torch.compiler.disable
def _several(
    image: Tensor,
    gathered: GatheredFeatures,
    scale: Tensor,
    bias: Tensor | None,
    ids: Tensor | None,
    options: Options,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    gathered.returning.losses += 1
    return _SeveralProcesses.apply(image, gathered.local, scale, bias, ids, gathered, options, backend)


class _SeveralProcesses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        ids: Tensor | None,
        gathered: GatheredFeatures,
        options: Options,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = passes.gather(image, text, gathered.wait(), scale, bias, ids, gathered.ranks, options)
        out = passes.forward(x, gathered.ranks, options, backend)
        # Not the handle: the buffers of all ranks' features would outlive the backward pass.
        ctx.ranks, ctx.returning, ctx.options, ctx.backend = gathered.ranks, gathered.returning, options, backend
        ctx.save_for_backward(
            image, text, x.scale, x.bias, ids, x.texts, x.images, x.all_ids, out.cosines, out.pull, out.lse
        )
        ctx.scalar_dtypes = scale.dtype, x.scale.dtype if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        shown = _shown_lse(out.lse, out.loss, options)
        ctx.mark_non_differentiable(out.correct, shown)
        return out.loss, out.correct, shown

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        if grads[0] is None:
            return (None,) * 8
        *tensors, cosines, pull, lse = ctx.saved_tensors
        need_image, need_text, need_scale, need_bias = ctx.needs_input_grad[:4]
        x = passes.Inputs(*tensors)
        found = passes.backward(
            grads[0],
            x,
            passes.Outputs(grads[0], lse, cosines, pull, lse),
            ctx.ranks,
            ctx.options,
            ctx.backend,
            need_image=need_image,
            need_text=need_text,
            need_scalars=need_scale or need_bias,
        )
        d_text = None
        if found.text is not None:
            # In deterministic mode nothing is under way, and a stand-in would only put the work off.
            d_text = found.text() if ctx.options.deterministic else ctx.returning.send(found.text, like=x.text)
        scale_dtype, bias_dtype = ctx.scalar_dtypes
        return (
            found.image,
            d_text,
            found.scale.to(scale_dtype) if need_scale else None,
            found.bias.to(bias_dtype) if need_bias else None,
            None,
            None,
            None,
            None,
        )
