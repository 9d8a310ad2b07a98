"""Accuracy in 16 and 32 bits, dtypes, autocast, and what autograd keeps."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

from farl_kernels.contrastive import contrastive_loss, gather_features

# Noise of the pairs and logit scale, from an untrained model to an all but solved task: losses 7, 0.1, 2e-3, 6e-9.
REGIMES = {"early": (6.0, 14.29), "mid": (1.5, 100.0), "confident": (1.25, 100.0), "very confident": (1.0, 100.0)}


def gradients(loss: Tensor, leaves: tuple[Tensor, ...], factor: float = 1.0) -> tuple[Tensor, ...]:
    """Gradients in float64, taken of ``factor * loss`` as a gradient scaler would and divided again."""
    return tuple(x.double() / factor for x in torch.autograd.grad(factor * loss, leaves))


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("regime", REGIMES)
def test_error_against_float64(dense: ModuleType, regime: str, dtype: torch.dtype) -> None:
    noise, scale_value = REGIMES[regime]
    image, text = (x.to(dtype).requires_grad_() for x in dense.pairs(1024, 256, noise=noise))
    scale = torch.tensor(scale_value, requires_grad=True)
    exact = tuple(x.detach().double().requires_grad_() for x in (image, text, scale))  # the same rounded inputs
    truth = dense.dense_loss(*exact).mean()
    true_gradients = torch.autograd.grad(truth, exact)
    loss = contrastive_loss(image, text, scale)
    assert isinstance(loss, Tensor) and loss.dtype == torch.float32
    factor = 2.0 ** -int(true_gradients[0].abs().max().log2())  # float16 has no gradients below 1e-8
    ours = gradients(loss, (image, text, scale), factor)

    # float32: caps of a fused kernel. 16 bits: the gradient comes back rounded to 8 (or 11) bits, and the strip
    # before it in bfloat16.
    cap = {torch.float32: 5e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}[dtype]
    assert abs(loss.item() / truth.item() - 1) < 1e-5
    assert relative(ours[0], true_gradients[0]) < cap
    assert relative(ours[1], true_gradients[1]) < cap
    assert relative(ours[2], true_gradients[2]) < 1e-4


@pytest.mark.parametrize("regime", REGIMES)
def test_16_bits_no_worse_than_plain_torch(dense: ModuleType, regime: str) -> None:
    noise, scale_value = REGIMES[regime]
    image, text = (x.to(torch.bfloat16).requires_grad_() for x in dense.pairs(1024, 256, noise=noise))
    scale = torch.tensor(scale_value, requires_grad=True)
    exact = tuple(x.detach().double().requires_grad_() for x in (image, text, scale))
    truth = torch.autograd.grad(dense.dense_loss(*exact).mean(), exact)
    labels = torch.arange(1024)
    logits = scale.bfloat16() * image @ text.T
    plain = (torch.nn.functional.cross_entropy(logits.float(), labels)
             + torch.nn.functional.cross_entropy(logits.T.float(), labels)) / 2  # fmt: skip
    loss = contrastive_loss(image, text, scale)
    assert isinstance(loss, Tensor)
    for ours, theirs, true in zip(
        gradients(loss, (image, text, scale)), gradients(plain, (image, text, scale)), truth, strict=True
    ):
        assert relative(ours, true) <= 1.02 * relative(theirs, true) + 1e-6


def test_dtypes(dense: ModuleType) -> None:
    image, text = dense.pairs(50, 16)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        leaves = [image.to(dtype).requires_grad_(), text.to(dtype).requires_grad_(), torch.tensor(9.0).requires_grad_()]
        loss = contrastive_loss(*leaves)
        assert isinstance(loss, Tensor)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert [g.dtype for g in torch.autograd.grad(loss, leaves)] == [dtype, dtype, torch.float32]


@pytest.mark.parametrize("through_handle", [False, True])
def test_precision_rounds_on_request_only(dense: ModuleType, through_handle: bool) -> None:
    image, text = (x.float().requires_grad_() for x in dense.pairs(50, 16))
    scale = torch.tensor(30.0)
    asked = contrastive_loss(
        image,
        gather_features(text, precision="bf16") if through_handle else text,
        scale,
        precision=None if through_handle else "bf16",
    )
    rounded = contrastive_loss(image.bfloat16(), text.bfloat16(), scale)
    plain = contrastive_loss(image, text, scale)
    assert isinstance(asked, Tensor) and isinstance(rounded, Tensor) and isinstance(plain, Tensor)
    assert asked.equal(rounded) and not asked.equal(plain)
    assert [g.dtype for g in torch.autograd.grad(asked, (image, text))] == [torch.float32] * 2
    for precision in ("fp32", "tf32"):
        same = contrastive_loss(image, text, scale, precision=precision)
        assert isinstance(same, Tensor) and same.equal(plain)


def test_autocast_does_not_round(dense: ModuleType) -> None:
    image, text = (x.float().requires_grad_() for x in dense.pairs(50, 16))
    scale = torch.tensor(30.0)
    plain = contrastive_loss(image, text, scale)
    with torch.autocast("cpu", torch.bfloat16):
        inside = contrastive_loss(image, text, scale)
    assert isinstance(plain, Tensor) and isinstance(inside, Tensor)
    assert inside.equal(plain)
    for a, b in zip(torch.autograd.grad(inside, (image, text)), torch.autograd.grad(plain, (image, text)), strict=True):
        assert a.equal(b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1024, 8192])
def test_autograd_keeps_the_features_alone(count: int, dtype: torch.dtype) -> None:
    image, text = (torch.randn(count, 16, dtype=dtype, requires_grad=True) for _ in range(2))
    scale = torch.tensor(1.0, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = contrastive_loss(image, text, scale)
    features = 2 * count * 16 * dtype.itemsize
    assert features <= sum(kept.values()) <= features + 40 * count  # and a few numbers a pair; 4 N^2 would be far more
    assert isinstance(loss, Tensor)
    loss.backward()


@pytest.mark.parametrize("deterministic", [False, True])
def test_runs_are_equal_to_the_bit(dense: ModuleType, deterministic: bool) -> None:
    image, text = (x.float().requires_grad_() for x in dense.pairs(300, 32))
    scale = torch.tensor(30.0, requires_grad=True)

    def run() -> list[Tensor]:
        loss = contrastive_loss(image, text, scale, chunk_bytes=300 * 4 * 70, deterministic=deterministic)
        assert isinstance(loss, Tensor)
        return [loss.detach(), *torch.autograd.grad(loss, (image, text, scale))]

    first = run()
    for _ in range(9):
        assert all(a.equal(b) for a, b in zip(run(), first, strict=True))


def test_many_chunks_add_no_error() -> None:
    """1024 equal unit features at scale 100: log-sum-exp near 107 from 1024 chunks, loss ln 1024."""
    same = torch.zeros(1024, 4)
    same[:, 0] = 1
    loss = contrastive_loss(same, same, torch.tensor(100.0), chunk_bytes=1)
    assert isinstance(loss, Tensor)
    assert abs(loss.item() / math.log(1024) - 1) < 2e-7
