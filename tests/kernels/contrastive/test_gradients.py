"""Values and gradients of the chunked loss against finite differences and against the N x N definition."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from farl_kernels.contrastive import contrastive_loss

SETTINGS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "smoothing": {"label_smoothing": 0.1},
    "ids ignored": {"ids": True, "duplicates": "negative"},
    "mask": {"ids": True, "duplicates": "mask"},
    "mask smoothing": {"ids": True, "duplicates": "mask", "label_smoothing": 0.2},
    "multi": {"ids": True, "duplicates": "multi_positive"},
    "multi smoothing": {"ids": True, "duplicates": "multi_positive", "label_smoothing": 0.2},
    "sigmoid": {"kind": "sigmoid"},
    "sigmoid without bias": {"kind": "sigmoid", "bias": False},
    "sigmoid mask": {"kind": "sigmoid", "ids": True, "duplicates": "mask"},
    "sigmoid multi": {"kind": "sigmoid", "ids": True, "duplicates": "multi_positive"},
}


def arguments(settings: dict[str, Any], count: int) -> tuple[dict[str, Any], Tensor | None]:
    """Keyword arguments for the loss, and the bias leaf."""
    settings = dict(settings)
    bias = None
    if settings.get("kind") == "sigmoid" and settings.pop("bias", True):
        bias = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    if settings.pop("ids", False):
        settings["ids"] = torch.randint(0, max(2, count // 2), (count,), generator=torch.Generator().manual_seed(5))
    return settings, bias


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_gradcheck(dense: ModuleType, name: str, deterministic: bool) -> None:
    image, text = dense.pairs(6, 4)
    settings, bias = arguments(SETTINGS[name], 6)
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    leaves = [image.requires_grad_(), text.requires_grad_(), scale, *([] if bias is None else [bias])]

    def loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        out = contrastive_loss(
            image,
            text,
            scale,
            logit_bias=bias,
            reduction="none",
            chunk_bytes=6 * 8 * 4,
            deterministic=deterministic,
            **settings,
        )
        assert isinstance(out, Tensor)
        return out

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 127, 128, 129, 1000])
@pytest.mark.parametrize("name", SETTINGS)
def test_equals_definition(dense: ModuleType, name: str, count: int, deterministic: bool) -> None:
    image, text = (x.requires_grad_() for x in dense.pairs(count, 16, seed=count))
    settings, bias = arguments(SETTINGS[name], count)
    scale = torch.tensor(14.29, dtype=torch.float64, requires_grad=True)
    leaves = [image, text, scale, *([] if bias is None else [bias])]
    weights = torch.linspace(-0.5, 2.0, count, dtype=torch.float64)  # each pair its own upstream gradient
    truth = dense.dense_loss(image, text, scale, logit_bias=bias, **settings)
    ours = contrastive_loss(
        image,
        text,
        scale,
        logit_bias=bias,
        reduction="none",
        chunk_bytes=count * 8 * 50,
        deterministic=deterministic,
        **settings,
    )
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad((ours * weights).sum(), leaves),
        torch.autograd.grad((truth * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("scale", [1.0, 14.29, 100.0, 400.0])
@pytest.mark.parametrize("features", ["random", "identical", "aligned", "opposed", "orthogonal", "zero", "long"])
def test_extreme_features(dense: ModuleType, features: str, scale: float) -> None:
    image, text = dense.pairs(64, 32)
    if features == "identical":
        image = text = image[:1].repeat(64, 1)
    elif features == "aligned":
        image = text = torch.eye(64, 128, dtype=torch.float64)
    elif features == "opposed":
        text = -image
    elif features == "orthogonal":
        image, text = torch.eye(64, 128, dtype=torch.float64), torch.eye(64, 128, dtype=torch.float64).roll(64, 1)
    elif features == "zero":
        text = torch.zeros_like(text)
    elif features == "long":
        image, text = image * 30, text * 30
    leaves = [image.clone().requires_grad_(), text.clone().requires_grad_(),
              torch.tensor(scale, dtype=torch.float64, requires_grad=True)]  # fmt: skip
    ours, truth = contrastive_loss(*leaves), dense.dense_loss(*leaves).mean()
    assert isinstance(ours, Tensor) and ours.isfinite()
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=0)
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(truth, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9 * b.abs().max().item() + 1e-14 * scale)
    if features == "identical":
        assert abs(ours.item() - torch.log(torch.tensor(64.0, dtype=torch.float64)).item()) < 1e-9


def test_second_derivative_is_refused(dense: ModuleType) -> None:
    image, text = dense.pairs(5, 4)
    image.requires_grad_()
    loss = contrastive_loss(image, text, torch.tensor(5.0))
    assert isinstance(loss, Tensor)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, image, create_graph=True)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_softplus_keeps_its_digits(kind: str) -> None:
    """Two pairs that are each other's: the loss is softplus(21), which is 21 only to nine digits."""
    image, text = torch.eye(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64).flip(0)
    loss = contrastive_loss(image, text, torch.tensor(21.0), kind=kind, reduction="none")
    assert isinstance(loss, Tensor)
    wrong = math.log1p(math.exp(-21.0)) + 21.0
    own = math.log(2.0) if kind == "sigmoid" else 0.0
    torch.testing.assert_close(loss, torch.full((2,), wrong + own, dtype=torch.float64), rtol=1e-14, atol=0)
