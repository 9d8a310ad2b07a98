"""No op asks the host for a value: meta tensors have none, so that every `.item()` and data-dependent shape raises.

On CUDA such a question would wait for the device in each step, and could not be captured in a graph. (What a copy of
host numbers to the device costs cannot be seen here.) The kernels' launchers run on meta tensors in the ahead-of-time
gate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from farl_kernels import (
    add_layer_norm,
    contrastive_loss,
    gather_features,
    gelu,
    mask_patches,
    masked_attention,
    masked_attention_packed,
    masked_token_cross_entropy,
    patchify,
    quick_gelu,
    sample_block_masks,
    single_query_attention,
)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, device="meta", requires_grad=True)


def whole(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.zeros(shape, device="meta", dtype=dtype)


PACKING = {"cu_seqlens": whole(4, dtype=torch.int32), "max_seqlen": 5}


def tokens(mode: str, backend: str | None, visible: Tensor | None = None) -> Tensor:
    mask = whole(2, 6, dtype=torch.bool)
    parameters = {"mask_token": draw(4), "class_token": draw(4), "position_embedding": draw(7, 4)}
    return mask_patches(draw(2, 6, 4), mask, mode=mode, visible=visible, backend=backend, **parameters)


def paired(backend: str | None, **settings: Any) -> Any:
    loss, metrics = contrastive_loss(
        draw(6, 4), gather_features(draw(6, 4)), draw(), return_metrics=True, backend=backend, **settings
    )
    return (loss, *metrics.values())


CALLS: dict[str, Callable[[str | None], Any]] = {
    "quick_gelu": lambda backend: quick_gelu(draw(3, 4), draw(4), backend=backend),
    "gelu": lambda backend: gelu(draw(3, 4), draw(4), backend=backend),
    "add_layer_norm": lambda backend: add_layer_norm(
        draw(3, 4), draw(3, 4), draw(4), draw(4), eps=1e-5, x_bias=draw(4), backend=backend
    ),
    "masked_attention": lambda backend: masked_attention(
        draw(2, 2, 3, 16), draw(2, 2, 5, 16), draw(2, 2, 5, 16), key_mask=whole(2, 5, dtype=torch.bool), backend=backend
    ),
    "masked_attention_packed": lambda backend: masked_attention_packed(
        draw(9, 3, 2, 16), qkv_bias=draw(3, 2, 16), causal=True, backend=backend, **PACKING
    ),
    "single_query_attention": lambda backend: single_query_attention(
        draw(3, 2, 16), draw(9, 2, 2, 16), backend=backend, **PACKING
    ),
    "mask_patches fork": lambda backend: tokens("fork", backend),
    "mask_patches gather": lambda backend: tokens("gather", backend, whole(2, 3, dtype=torch.int32)),
    "patchify": lambda backend: patchify(
        whole(2, 8, 8, 3, dtype=torch.uint8), 4, mean=(0.5,) * 3, std=(0.2,) * 3, dtype=torch.float32, backend=backend
    ),
    "sample_block_masks": lambda backend: sample_block_masks(
        whole(3), whole(3), grid=(8, 8), max_masked=20, seed=0, backend=backend
    ),
    "masked_token_cross_entropy": lambda backend: masked_token_cross_entropy(
        draw(6, 4), draw(7, 4), draw(7), whole(6), backend=backend
    ),
    "contrastive_loss": lambda backend: paired(backend),
    "contrastive_loss deterministic": lambda backend: paired(backend, deterministic=True, label_smoothing=0.1),
    "contrastive_loss with ids": lambda backend: paired(backend, ids=whole(6), duplicates="multi_positive"),
    "contrastive_loss sigmoid": lambda backend: paired(backend, kind="sigmoid", logit_bias=draw()),
}


@pytest.mark.parametrize("backend", [None, "triton", "reference"])
@pytest.mark.parametrize("name", CALLS)
def test_forward_and_backward_need_no_value(name: str, backend: str | None) -> None:
    results = CALLS[name](backend)
    results = (results,) if isinstance(results, Tensor) else results
    assert all(r.device.type == "meta" for r in results)
    live = [r for r in results if r.requires_grad]
    assert live or name in ("patchify", "sample_block_masks")
    if live:
        torch.autograd.backward(live, [torch.ones_like(r) for r in live])
