"""Other people's contrastive losses, and the chunked one in plain PyTorch, on features [N, D] of one process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.contest import Contender, NotMeasuredError, compiled, need, need_gpu

# Bound of one strip of logits, as in our reference on a GPU.
STRIP_BYTES = 256 << 20


def open_clip(kind: str, compile_it: bool) -> Contender:
    """open_clip's ClipLoss or SigLipLoss for one process, its labels cached."""
    module = need("open_clip.loss")
    loss = (module.ClipLoss if kind == "softmax" else module.SigLipLoss)(cache_labels=True)

    def solve(*leaves: Tensor) -> Tensor:
        return loss(*leaves)

    return Contender(compiled(solve) if compile_it else solve)


def memeff(temperature: float) -> Contender:
    """memeff's loss; its temperature is a number, so it makes no gradient of the scale."""
    package = need("memeff")
    need_gpu()
    loss = package.MemoryEfficientCLIPLoss(temperature=temperature, normalized_inputs=True, stable=False)
    return Contender(
        lambda image, text: loss(image, text),
        leaves=lambda inputs: inputs[:2],
        gradients=lambda grads: (*grads, None),
    )


def inf_cl() -> Contender:
    """Inf-CL's loss, both directions."""
    cal_inf_loss = need("inf_cl").cal_inf_loss
    need_gpu()

    def solve(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        # Scaled here: the scale of its own argument is exchanged between processes, of which there is one.
        return (cal_inf_loss(scale * image, text) + cal_inf_loss(scale * text, image)) / 2

    return Contender(solve)


def chunked(compile_it: bool) -> Contender:
    """CLIP's loss by strips of columns in plain PyTorch, 8 N^2 D FLOP, the pointwise work compiled or not."""
    forward, backward = _forward_strip, _backward_strip
    if compile_it:
        forward, backward = compiled(_forward_strip), _compiled_too(_backward_strip)
    return Contender(functools.partial(_Chunked.apply, forward, backward))


def _compiled_too(function: Callable[..., Any]) -> Callable[..., Any]:
    """A second compiled function; `compiled` resets what was compiled before."""
    return torch.compile(function, dynamic=False, fullgraph=True)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` summed and returned in float32 or better."""
    if a.dtype not in (torch.bfloat16, torch.float16):
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _forward_strip(cosines: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exps of a strip of cosines: of its rows [N], so far, and of its columns [c]."""
    logits = cosines * scale
    return logits.logsumexp(1), logits.logsumexp(0)


def _backward_strip(
    cosines: Tensor, scale: Tensor, row_lse: Tensor, column_lse: Tensor, first: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradient with respect to the logits of the strip that begins at column `first`, and the scale's share."""
    count, width = cosines.shape
    logits = cosines * scale
    rows = torch.arange(count, device=cosines.device)[:, None]
    own = rows == first + torch.arange(width, device=cosines.device)[None]
    strip = (logits - row_lse[:, None]).exp() + (logits - column_lse[None]).exp() - 2.0 * own
    strip = strip * (0.5 / count)
    return strip.to(dtype), (strip * cosines).sum()


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, strip_forward: Any, strip_backward: Any, image: Tensor, text: Tensor, scale: Tensor
    ) -> Tensor:
        wide = torch.promote_types(image.dtype, torch.float32)
        width = max(1, min(len(text), STRIP_BYTES // (wide.itemsize * len(image))))
        if len(text) % width:
            raise NotMeasuredError(f"{len(text)} columns do not make strips of {width}")
        s = scale.to(wide)
        row: Tensor | None = None
        columns = []
        for part in text.split(width):
            of_rows, of_columns = strip_forward(_product(image, part.T), s)
            row = of_rows if row is None else torch.logaddexp(row, of_rows)
            columns.append(of_columns)
        assert row is not None
        column = torch.cat(columns)
        own = (image.to(wide) * text.to(wide)).sum(1) * s
        ctx.save_for_backward(image, text, s, row, column)
        ctx.width, ctx.strip_backward = width, strip_backward
        return (0.5 * (row + column) - own).mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        image, text, s, row, column = ctx.saved_tensors
        d_image = torch.zeros(image.shape, dtype=s.dtype, device=image.device)
        d_text = torch.empty_like(d_image)
        d_scale = torch.zeros_like(s)
        first = torch.zeros((), dtype=torch.int64, device=image.device)
        for start in range(0, len(text), ctx.width):
            at = slice(start, start + ctx.width)
            cosines = _product(image, text[at].T)
            strip, share = ctx.strip_backward(cosines, s, row, column[at], first, image.dtype)
            d_image += _product(strip, text[at])
            d_text[at] = _product(strip.T, image)
            d_scale += share
            first = first + ctx.width
        up = grads[0].to(s.dtype)
        factor = up * s
        return None, None, (d_image * factor).to(image.dtype), (d_text * factor).to(text.dtype), d_scale * up
