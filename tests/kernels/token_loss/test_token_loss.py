"""Masked-token cross-entropy against finite differences and ``F.cross_entropy`` on all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from farl_kernels.token_loss import masked_token_cross_entropy, reference


def inputs(
    rows: int, width: int, vocab: int, *, dtype: torch.dtype = torch.float64, ignored: float = 0.3, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(vocab, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (rows,), generator=g)
    targets[torch.rand(rows, generator=g) < ignored] = -1
    return hidden, weight, bias, targets


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "logit_chunk_bytes", lambda device: 8 * 7 * 3)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradcheck(reduction: str, with_bias: bool) -> None:
    hidden, weight, bias, targets = inputs(8, 3, 7)

    def loss(*leaves: Tensor) -> Tensor:
        h, w, *b = leaves
        return masked_token_cross_entropy(h, w, b[0] if b else None, targets, reduction=reduction)[0]

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias) if with_bias else (hidden, weight))


@given(st.integers(0, 40), st.integers(1, 12), st.integers(1, 30), st.floats(0, 1), st.integers(1, 2000), st.booleans())
@settings(max_examples=40, deadline=None)
def test_equals_all_logits_at_once(
    rows: int, width: int, vocab: int, ignored: float, chunk_bytes: int, mean: bool
) -> None:
    hidden, weight, bias, targets = inputs(rows, width, vocab, ignored=ignored, seed=rows)
    valid = targets != -1
    logits = F.linear(hidden, weight, bias)
    truth = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
    if mean:
        truth = truth / valid.sum().clamp(min=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "logit_chunk_bytes", lambda device: chunk_bytes)
        loss, correct, count = masked_token_cross_entropy(
            hidden, weight, bias, targets, reduction="mean" if mean else "sum"
        )
    torch.testing.assert_close(loss, truth, rtol=1e-11, atol=1e-12)
    assert count == valid.sum() and count.dtype == torch.int64 and not count.requires_grad
    assert correct == ((logits.argmax(1) == targets) & valid).sum()
    assert correct.dtype == torch.float32 and not correct.requires_grad
    leaves = (hidden, weight, bias)
    for a, b in zip(torch.autograd.grad(-2.5 * loss, leaves), torch.autograd.grad(-2.5 * truth, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_targets_cost_nothing(reduction: str) -> None:
    hidden, weight, bias, targets = inputs(5, 3, 7, ignored=1.1)
    loss, correct, count = masked_token_cross_entropy(hidden, weight, bias, targets, reduction=reduction)
    assert loss == 0 and correct == 0 and count == 0
    assert not any(g.any() for g in torch.autograd.grad(loss, (hidden, weight, bias)))


def test_ignore_index_may_be_a_token() -> None:
    hidden, weight, bias, _ = inputs(9, 3, 4)
    targets = torch.arange(9) % 4
    loss, _, count = masked_token_cross_entropy(hidden, weight, bias, targets, ignore_index=2)
    assert count == 7
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(hidden, weight, bias), targets, ignore_index=2))


@pytest.mark.parametrize("live", [0, 1, 2])
def test_one_input_alone_needs_a_gradient(live: int) -> None:
    leaves = inputs(9, 3, 7)
    full = torch.autograd.grad(masked_token_cross_entropy(*leaves)[0], leaves[:3])
    some = [x.detach().requires_grad_(k == live) for k, x in enumerate(leaves[:3])]
    (only,) = torch.autograd.grad(masked_token_cross_entropy(*some, leaves[3])[0], some[live])
    torch.testing.assert_close(only, full[live])


def test_backward_twice() -> None:
    *leaves, targets = inputs(9, 3, 7)
    loss = masked_token_cross_entropy(*leaves, targets)[0]
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(3 * loss, leaves)
    for a, b in zip(again, once, strict=True):
        torch.testing.assert_close(a, 3 * b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_against_float64(dtype: torch.dtype) -> None:
    *leaves, targets = inputs(600, 32, 500, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    truth = F.cross_entropy(F.linear(*exact), targets, ignore_index=-1)
    loss, _, _ = masked_token_cross_entropy(*leaves, targets)
    plain = F.cross_entropy(F.linear(*leaves).float(), targets, ignore_index=-1)
    assert loss.dtype == torch.float32
    assert abs(loss.item() / truth.item() - 1) < 1e-6
    true_gradients = torch.autograd.grad(truth, exact)
    for ours, theirs, true in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(plain, leaves), true_gradients, strict=True
    ):
        assert ours.dtype == dtype
        assert (ours - true).norm() <= 1.5 * (theirs - true).norm() + 1e-7 * true.norm()


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_mixed_weights(hidden_dtype: torch.dtype) -> None:
    """Under bf16 autocast, and with bf16 hidden states without it, float32 weights are rounded for the products."""
    hidden, weight, bias, targets = inputs(50, 16, 30, dtype=torch.float32)
    hidden = hidden.detach().to(hidden_dtype).requires_grad_()
    wanted, _, _ = masked_token_cross_entropy(hidden.bfloat16(), weight.bfloat16(), bias, targets)
    with torch.autocast("cpu", torch.bfloat16, enabled=hidden_dtype == torch.float32):
        loss, _, _ = masked_token_cross_entropy(hidden, weight, bias, targets)
    assert loss.equal(wanted)
    assert [g.dtype for g in torch.autograd.grad(loss, (hidden, weight, bias))] == [
        hidden_dtype,
        torch.float32,
        torch.float32,
    ]


def test_keeps_no_logits() -> None:
    hidden, weight, bias, targets = inputs(4096, 8, 512, dtype=torch.float32)
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss, _, _ = masked_token_cross_entropy(hidden, weight, bias, targets)
    assert loss.requires_grad
    assert sum(kept.values()) <= 4 * (hidden.numel() + weight.numel() + bias.numel()) + 64


def test_no_gradient_work_under_no_grad(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias, targets = inputs(50, 8, 20)
    monkeypatch.setattr(reference, "matmul_add_", None)  # the product of the weight's gradient
    with torch.no_grad():
        loss, _, _ = masked_token_cross_entropy(hidden, weight, bias, targets)
    assert not loss.requires_grad
    with pytest.raises(TypeError):
        masked_token_cross_entropy(hidden, weight, bias, targets)


def test_compiles_without_graph_break() -> None:
    *leaves, targets = inputs(9, 3, 7, dtype=torch.float32)
    loss, correct, count = torch.compile(masked_token_cross_entropy, fullgraph=True, backend="aot_eager")(
        *leaves, targets
    )
    wanted = masked_token_cross_entropy(*leaves, targets)
    assert loss.equal(wanted[0]) and correct.equal(wanted[1]) and count.equal(wanted[2])
    for a, b in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(wanted[0], leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivative_is_refused() -> None:
    *leaves, targets = inputs(5, 3, 7)
    loss, _, _ = masked_token_cross_entropy(*leaves, targets)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, leaves, create_graph=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.ones(5)}, r"hidden is torch.float32 \(5,\), want floating point \[R, C\]"),
        (
            {"weight": torch.ones(7, 4)},
            r"weight is torch.float32 \(7, 4\), want floating point \[V, 3\], as wide as hidden",
        ),
        ({"bias": torch.ones(6)}, r"bias is torch.float32 \(6,\), want floating point \[7\]"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, r"targets is torch.int64 \(4,\), want int64 \[5\]"),
        ({"targets": torch.zeros(5, dtype=torch.int32)}, r"targets is torch.int32 \(5,\), want int64 \[5\]"),
        ({"bias": torch.ones(7, device="meta")}, "bias is on meta, want cpu, the device of hidden"),
        ({"reduction": "none"}, "reduction is 'none', want one of 'mean', 'sum'"),
        ({"backend": "cuda"}, "backend 'cuda' is not one of"),
    ],
)
def test_refused_by_name(change: dict[str, Any], message: str) -> None:
    arguments = {
        "hidden": torch.ones(5, 3),
        "weight": torch.ones(7, 3),
        "bias": torch.ones(7),
        "targets": torch.zeros(5, dtype=torch.int64),
    } | change
    with pytest.raises(ValueError, match=f"^masked_token_cross_entropy: {message}"):
        masked_token_cross_entropy(**arguments)
