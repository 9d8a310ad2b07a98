"""Every op, every backend: gradients, inputs, results and what is kept for the backward never share memory by accident.

Autograd takes a gradient over as it is and adds the next one to it in place, so an op that returns two gradients in
one piece of memory, or gives out what it still needs, is wrong from the second backward pass on.
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
    single_query_attention,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CU_SEQLENS = torch.tensor([0, 2, 2, 5], dtype=torch.int32, device=DEVICE)
PACKING = {"cu_seqlens": CU_SEQLENS, "max_seqlen": 4}
KEY_MASK = torch.tensor([[True, False, True], [False, False, False]], device=DEVICE)
MASK = torch.tensor([[1, 0, 0, 1, 0, 0], [0, 0, 1, 1, 1, 0]], device=DEVICE).bool()
VISIBLE = torch.tensor([[1, 2, 4, 5], [0, 1, 5, -1]], dtype=torch.int32, device=DEVICE)
TARGETS = torch.tensor([3, -1, 0, 6, 6], device=DEVICE)
IDS = torch.tensor([0, 1, 1, 2, 0], device=DEVICE)

Case = tuple[list[str | None], list[tuple[int, ...]], Callable[..., Any]]


def _masked(e: Tensor, mask_token: Tensor, class_token: Tensor, position: Tensor, mode: str, backend: Any) -> Tensor:
    return mask_patches(
        e,
        MASK[: len(e)],
        mask_token=mask_token,
        class_token=class_token,
        position_embedding=position,
        mode=mode,
        backend=backend,
    )


def _gathered(e: Tensor, class_token: Tensor, position: Tensor, backend: Any) -> Tensor:
    return mask_patches(
        e,
        None,
        mask_token=None,
        class_token=class_token,
        position_embedding=position,
        mode="gather",
        visible=VISIBLE[: len(e)],
        backend=backend,
    )


def _norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor, backend: Any) -> Any:
    return add_layer_norm(x, residual, weight, bias, eps=1e-5, x_bias=x_bias, backend=backend)


# Backends, shapes of the inputs, and the call with a backend. Sizes of one are where sums and views are mixed up.
TORCH, PLAIN, ATTENTION = ["triton", "torch", "reference"], ["triton", "reference"], ["triton", "sdpa", "reference"]
CASES: dict[str, Case] = {
    "quick_gelu": (TORCH, [(2, 3, 4), (4,)], lambda x, b, backend: quick_gelu(x, b, backend=backend)),
    "quick_gelu of a vector": (TORCH, [(4,), (4,)], lambda x, b, backend: quick_gelu(x, b, backend=backend)),
    "quick_gelu of a row": (TORCH, [(1, 4), (4,)], lambda x, b, backend: quick_gelu(x, b, backend=backend)),
    "gelu": (TORCH, [(2, 3, 4), (4,)], lambda x, b, backend: gelu(x, b, backend=backend)),
    "gelu of a vector": (TORCH, [(4,), (4,)], lambda x, b, backend: gelu(x, b, backend=backend)),
    "add_layer_norm": (TORCH, [(2, 3, 4), (2, 3, 4), (4,), (4,), (4,)], _norm),
    "add_layer_norm of a vector": (TORCH, [(4,), (4,), (4,), (4,), (4,)], _norm),
    "masked_attention": (
        ATTENTION,
        [(2, 2, 3, 16)] * 3,
        lambda q, k, v, backend: masked_attention(q, k, v, key_mask=KEY_MASK, backend=backend),
    ),
    "masked_attention of one token": (
        ATTENTION,
        [(1, 1, 1, 16)] * 3,
        lambda q, k, v, backend: masked_attention(q, k, v, causal=True, backend=backend),
    ),
    "masked_attention_packed dense": (
        ATTENTION,
        [(2, 3, 3, 2, 16), (3, 2, 16)],
        lambda x, b, backend: masked_attention_packed(x, qkv_bias=b, causal=True, backend=backend),
    ),
    "masked_attention_packed": (
        ATTENTION,
        [(6, 3, 2, 16), (3, 2, 16)],
        lambda x, b, backend: masked_attention_packed(x, qkv_bias=b, backend=backend, **PACKING),
    ),
    "single_query_attention": (
        ATTENTION if DEVICE.type == "cuda" else [*ATTENTION, "segments"],
        [(3, 2, 16), (6, 2, 2, 16)],
        lambda q, kv, backend: single_query_attention(q, kv, backend=backend, **PACKING),
    ),
    "patchify": (PLAIN, [(2, 3, 4, 4)], lambda x, backend: patchify(x, 2, dtype=x.dtype, backend=backend)),
    **{
        f"mask_patches {mode} {batch}": (
            TORCH,
            [(batch, 6, 3), (3,), (3,), (7, 3)],
            lambda *x, backend, mode=mode: _masked(*x, mode=mode, backend=backend),
        )
        for mode in ("fork", "mask")
        for batch in (1, 2)
    },
    "mask_patches gather": (TORCH, [(2, 6, 3), (3,), (7, 3)], _gathered),
    "mask_patches gather 1": (TORCH, [(1, 6, 3), (3,), (7, 3)], _gathered),
    "masked_token_cross_entropy": (
        PLAIN,
        [(5, 3), (7, 3), (7,)],
        lambda h, w, b, backend: masked_token_cross_entropy(h, w, b, TARGETS, backend=backend)[0],
    ),
    "contrastive_loss": (
        PLAIN,
        [(5, 4), (5, 4), ()],
        lambda i, t, s, backend: contrastive_loss(
            i, gather_features(t), s, reduction="none", label_smoothing=0.1, backend=backend
        ),
    ),
    "contrastive_loss deterministic": (
        PLAIN,
        [(5, 4), (5, 4), ()],
        lambda i, t, s, backend: contrastive_loss(
            i, t, s, deterministic=True, ids=IDS, duplicates="multi_positive", reduction="none", backend=backend
        ),
    ),
    "contrastive_loss sigmoid": (
        PLAIN,
        [(1, 4), (1, 4), (), ()],
        lambda i, t, s, b, backend: contrastive_loss(
            i, t, s, logit_bias=b, kind="sigmoid", reduction="none", backend=backend
        ),
    ),
}
EACH = [pytest.param(name, backend, id=f"{name}-{backend}") for name, case in CASES.items() for backend in case[0]]


def _inputs(name: str, backend: str) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    # The kernels compute in float32.
    dtype = torch.float32 if backend == "triton" else torch.float64
    drawn = (torch.randn(s, generator=g, dtype=torch.float64) for s in CASES[name][1])
    return [x.to(DEVICE, dtype).requires_grad_() for x in drawn]


def _results(name: str, backend: str, inputs: list[Tensor]) -> list[Tensor]:
    results = CASES[name][2](*inputs, backend=backend)
    return [results] if isinstance(results, Tensor) else list(results)


def _like(results: list[Tensor]) -> list[Tensor]:
    """A gradient for each result: all numbers differ."""
    return [torch.linspace(0.5, 2.0, r.numel(), dtype=r.dtype, device=r.device).view(r.shape) for r in results]


def _grad(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize(("name", "backend"), EACH)
def test_two_backward_passes_add_up(name: str, backend: str) -> None:
    """Both when the graph is used again and when it is made anew, and the incoming gradient stays as it is."""
    inputs = _inputs(name, backend)
    results = _results(name, backend, inputs)
    once = torch.autograd.grad(results, inputs, _like(results))
    for anew in (False, True):
        inputs = _inputs(name, backend)
        results = _results(name, backend, inputs)
        incoming = _like(results)
        torch.autograd.backward(results, incoming, retain_graph=True)
        torch.autograd.backward(_results(name, backend, inputs) if anew else results, incoming)
        torch.testing.assert_close([_grad(x) for x in inputs], [2 * g for g in once])
        assert all(a.equal(b) for a, b in zip(incoming, _like(results), strict=True))


@pytest.mark.parametrize(("name", "backend"), EACH)
def test_gradients_may_be_changed(name: str, backend: str) -> None:
    """Scribbling over one gradient changes no other, no input, no result, and not the next backward pass."""
    inputs = _inputs(name, backend)
    results = _results(name, backend, inputs)
    kept = [x.detach().clone() for x in (*inputs, *results)]
    torch.autograd.backward(results, _like(results), retain_graph=True)
    wanted = [_grad(x).clone() for x in inputs]
    for x, g in zip(inputs, wanted, strict=True):
        assert _grad(x).equal(g)
        _grad(x).fill_(torch.nan)
    for a, b in zip(torch.autograd.grad(results, inputs, _like(results)), wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert all(a.detach().equal(b) for a, b in zip((*inputs, *results), kept, strict=True))


# Attention that keeps its result for the backward pass, as PyTorch's own does, says so when it changes.
KEEPS = {
    *((name, backend) for name in CASES if "masked_attention" in name for backend in ATTENTION),
    ("single_query_attention", "triton"),
}
CHANGEABLE = [e for e in EACH if CASES[e.values[0]][2] is not _norm and e.values not in KEEPS]


@pytest.mark.parametrize(("name", "backend"), [*CHANGEABLE, ("masked_attention_packed", "sdpa")])
def test_results_may_be_changed_in_place(name: str, backend: str) -> None:
    """``x = op(...); x += y``, as models write it: a result that is a view made inside the op would be refused."""
    inputs = _inputs(name, backend)
    results = _results(name, backend, inputs)
    once = torch.autograd.grad(results, inputs, _like(results))
    changed = [r.mul_(2) for r in _results(name, backend, inputs)]
    for a, b in zip(torch.autograd.grad(changed, inputs, _like(changed)), once, strict=True):
        torch.testing.assert_close(a, 2 * b)
