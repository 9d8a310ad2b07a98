"""The loss of one process as two PyTorch ops, opaque to the compiler: forward with what backward needs, and backward.

Settings travel as plain arguments, because ops know no other kind.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from farl_kernels import library
from farl_kernels.contrastive import passes
from farl_kernels.contrastive.exchange import Ranks
from farl_kernels.contrastive.options import Options
from farl_kernels.precision import accumulation_dtype

_SETTINGS = (
    "str kind, float label_smoothing, str duplicates, bool deterministic, int? chunk_bytes, bool metrics, "
    "str? precision, str backend"
)


def settings(options: Options) -> tuple[Any, ...]:
    """The arguments that the ops' schemas end with, before the backend."""
    return (
        options.kind,
        options.label_smoothing,
        options.duplicates,
        options.deterministic,
        options.chunk_bytes,
        options.metrics,
        options.precision,
    )


def _inputs(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, ids: Tensor | None, options: Options
) -> passes.Inputs:
    return passes.gather(image, text, text, scale, bias, ids, Ranks.alone(), options)


def run_forward(backend: str, *args: Any) -> tuple[Tensor, ...]:
    """The forward op on `backend`, with the arguments of its schema."""
    image, text, scale, bias, ids, *rest = args
    options = Options(*rest)
    out = passes.forward(_inputs(image, text, scale, bias, ids, options), Ranks.alone(), options, backend)
    # Views of one piece of memory would be results that share it.
    return out.loss.clone(), out.correct, out.cosines.clone(), out.pull.clone(), out.lse


def run_backward(backend: str, *args: Any) -> tuple[Tensor, ...]:
    """The backward op on `backend`, with the arguments of its schema."""
    grad, image, text, scale, bias, ids, cosines, pull, lse, need_image, need_text, need_scalars, *rest = args
    options = Options(*rest)
    saved = passes.Outputs(grad, lse, cosines, pull, lse)
    found = passes.backward(
        grad,
        _inputs(image, text, scale, bias, ids, options),
        saved,
        Ranks.alone(),
        options,
        backend,
        need_image=need_image,
        need_text=need_text,
        need_scalars=need_scalars,
    )
    return (
        image.new_empty(0) if found.image is None else found.image,
        text.new_empty(0) if found.text is None else found.text(),
        found.scale.to(scale.dtype, copy=True),
        found.bias.to(scale.dtype if bias is None else bias.dtype, copy=True),
    )


def _fake_forward(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, ids: Tensor | None, kind: str, *rest: Any
) -> tuple[Tensor, ...]:
    *_, metrics, _, _ = rest
    n = image.shape[0]
    vectors = [image.new_empty(n, dtype=accumulation_dtype(image.dtype)) for _ in range(3)]
    correct = image.new_empty(2, n if metrics else 0, dtype=torch.bool)
    lse = image.new_empty(2, n if kind == "softmax" else 0, dtype=torch.float64)
    return vectors[0], correct, vectors[1], vectors[2], lse


def _fake_backward(grad: Tensor, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, *rest: Any) -> Any:
    need_image, need_text = rest[4:6]
    return (
        image.new_empty(image.shape if need_image else (0,)),
        text.new_empty(text.shape if need_text else (0,)),
        scale.new_empty(()),
        scale.new_empty(()) if bias is None else bias.new_empty(()),
    )


FORWARD = library.define(
    "contrastive_forward(Tensor image, Tensor text, Tensor scale, Tensor? bias, Tensor? ids, "
    f"{_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    triton=lambda *args: run_forward("triton", *args),
    reference=lambda *args: run_forward("reference", *args),
    fake=_fake_forward,
)
BACKWARD = library.define(
    "contrastive_backward(Tensor grad, Tensor image, Tensor text, Tensor scale, Tensor? bias, Tensor? ids, "
    "Tensor cosines, Tensor pull, Tensor lse, bool need_image, bool need_text, bool need_scalars, "
    f"{_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor)",
    triton=lambda *args: run_backward("triton", *args),
    reference=lambda *args: run_backward("reference", *args),
    fake=_fake_backward,
)
