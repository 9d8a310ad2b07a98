"""`mask_patches` with every sequence written once and a deterministic backward, in PyTorch operations.

The op is linear in its inputs, so its backward needs the masks alone; it is made of differentiable operations, so a
second derivative is right.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from farl_kernels.precision import accumulation_dtype, without_autocast


def refuses(*_: object) -> str | None:
    """Why this backend cannot serve a call: torch.compile fuses the reference and does not trace slices as out=."""
    return "it cannot be traced by torch.compile" if torch.compiler.is_compiling() else None


def mask_patches(
    embeddings: Tensor,
    mask: Tensor | None,
    mask_token: Tensor | None,
    class_token: Tensor,
    position_embedding: Tensor,
    mode: str,
    visible: Tensor | None,
) -> Tensor:
    """See :func:`farl_kernels.patch_masking.op.mask_patches`."""
    if mode == "gather":
        return _Gather.apply(embeddings, visible, class_token, position_embedding)
    return _Mask.apply(embeddings, mask, mask_token, class_token, position_embedding, mode == "fork")


class _Mask(torch.autograd.Function):
    """Modes "fork" and "mask", and without mask and mask token "plain"."""

    @staticmethod
    def forward(
        embeddings: Tensor,
        mask: Tensor | None,
        mask_token: Tensor | None,
        class_token: Tensor,
        position_embedding: Tensor,
        fork: bool,
    ) -> Tensor:
        batch, patches, channels = embeddings.shape
        # What is returned must not be a view made in here: autograd would forbid in-place operations on it.
        output = embeddings.new_empty((1 + fork) * batch, patches + 1, channels)
        output[:, 0] = class_token + position_embedding[0]
        first, last = output[:batch, 1:], output[fork * batch :, 1:]
        torch.add(embeddings, position_embedding[1:], out=first)
        if mask is None or mask_token is None:
            return output
        masked_rows = (mask_token + position_embedding[1:]).to(output.dtype)
        if fork:
            torch.where(mask[:, :, None], masked_rows, first, out=last)
        else:
            last.copy_(torch.where(mask[:, :, None], masked_rows, first))
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        embeddings, mask, mask_token, class_token, position_embedding, ctx.fork = inputs
        ctx.save_for_backward(mask)
        ctx.dtypes = embeddings.dtype, class_token.dtype, position_embedding.dtype
        ctx.mask_token_dtype = None if mask_token is None else mask_token.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        (grad,) = grads
        accumulate = accumulation_dtype(grad.dtype)
        # Sums run over the batch in fp32 at least; autocast would send the product to bf16.
        with without_autocast(grad.device):
            grad_position = grad.sum(0, dtype=accumulate)
            if mask is None:
                grad_embeddings, grad_mask_token = grad[:, 1:].clone(), None
            else:
                masked_half = grad[len(mask) :] if ctx.fork else grad
                keep = ~mask[:, :, None]
                if ctx.fork:
                    grad_embeddings = torch.addcmul(grad[: len(mask), 1:], masked_half[:, 1:], keep.to(grad.dtype))
                else:
                    grad_embeddings = masked_half[:, 1:] * keep
                # The class token's column counts as not masked, so that the gradient is read as it lies.
                chosen = F.pad(mask, (1, 0)).to(accumulate)[:, None]
                grad_mask_token = torch.bmm(chosen, masked_half.to(accumulate)).sum((0, 1)).to(ctx.mask_token_dtype)
        embeddings_dtype, class_dtype, position_dtype = ctx.dtypes
        return (
            grad_embeddings.to(embeddings_dtype),
            None,
            grad_mask_token,
            # A copy: autograd keeps both as they are and adds those of the next backward to them, in place.
            grad_position[0].to(class_dtype, copy=True),
            grad_position.to(position_dtype),
            None,
        )


class _Gather(torch.autograd.Function):
    """Mode "gather": reads and writes visible patches alone."""

    @staticmethod
    def forward(
        embeddings: Tensor,
        visible: Tensor,
        class_token: Tensor,
        position_embedding: Tensor,
    ) -> Tensor:
        index = visible.long().clamp(min=0)
        batch, count = visible.shape
        output = embeddings.new_empty(batch, count + 1, embeddings.shape[2])
        output[:, 0] = class_token + position_embedding[0]
        kept = embeddings.gather(1, index[:, :, None].expand(-1, -1, embeddings.shape[2]))
        positions = position_embedding[1:].index_select(0, index.flatten()).unflatten(0, (batch, count))
        torch.add(kept, positions, out=output[:, 1:])
        output[:, 1:].masked_fill_(visible[:, :, None] < 0, 0)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        embeddings, visible, class_token, position_embedding = inputs
        ctx.save_for_backward(visible)
        ctx.patches = embeddings.shape[1]
        ctx.dtypes = embeddings.dtype, class_token.dtype, position_embedding.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (visible,) = ctx.saved_tensors
        (grad,) = grads
        # Row 0 takes the padding and is dropped. An index comes once a sample: no order of additions to depend on.
        index = (visible.long() + 1)[:, :, None].expand(-1, -1, grad.shape[2])
        full = grad.new_zeros(len(grad), ctx.patches + 1, grad.shape[2]).scatter_add(1, index, grad[:, 1:])
        accumulate = accumulation_dtype(grad.dtype)
        grad_class = grad[:, 0].sum(0, dtype=accumulate)
        grad_position = torch.cat([grad_class[None], full[:, 1:].sum(0, dtype=accumulate)])
        embeddings_dtype, class_dtype, position_dtype = ctx.dtypes
        return (
            full[:, 1:].to(embeddings_dtype),
            None,
            grad_class.to(class_dtype),
            grad_position.to(position_dtype),
        )
