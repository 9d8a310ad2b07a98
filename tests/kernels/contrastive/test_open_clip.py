"""The drop-ins against open_clip's own losses, and the loss under gradient caching."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from farl_kernels.contrastive import ClipLoss, ContrastiveLoss, SigLipLoss, contrastive_loss


def value_and_gradients(loss: Any, dense: ModuleType, **kwargs: Any) -> list[Tensor]:
    image, text = (x.requires_grad_() for x in dense.pairs(33, 12))
    scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (14.29, -3.0))
    leaves = [image, text, scale, bias]
    value = loss(*leaves, **kwargs)
    value = value["contrastive_loss"] if kwargs.get("output_dict") else value
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("output_dict", [False, True])
@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_equals_open_clip(dense: ModuleType, name: str, output_dict: bool) -> None:
    theirs = getattr(pytest.importorskip("open_clip.loss"), name)(cache_labels=True)
    ours = {"ClipLoss": ClipLoss, "SigLipLoss": SigLipLoss}[name](cache_labels=True)
    for a, b in zip(
        value_and_gradients(ours, dense, output_dict=output_dict),
        value_and_gradients(theirs, dense, output_dict=output_dict),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_positional_arguments_as_there() -> None:
    ClipLoss(True, True, True, 2, 4, False)
    SigLipLoss(True, 2, 4, "bidir")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClipLoss(rank=0, world_size=4), "ClipLoss: gather_with_grad is False with world_size 4, want True"),
        (lambda: ClipLoss(use_horovod=True), "ClipLoss: use_horovod is True, want False"),
        (
            lambda: ClipLoss(rank=4, world_size=4, gather_with_grad=True),
            "ClipLoss: rank is 4, want a number from 0 to 3",
        ),
        (lambda: SigLipLoss(dist_impl="ring"), "SigLipLoss: dist_impl is 'ring', want None"),
        (
            lambda: SigLipLoss(rank=1, world_size=4)(torch.ones(2, 2), torch.ones(2, 2), torch.tensor(1.0)),
            "SigLipLoss: rank 1 of world_size 4, want rank 0 of 1",
        ),
    ],
)
def test_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


def test_bfloat16_on_request(dense: ModuleType) -> None:
    image, text = (x.float() for x in dense.pairs(33, 12))
    scale = torch.tensor(50.0)
    asked = ClipLoss(precision="bf16")(image, text, scale)
    assert asked.equal(contrastive_loss(image.bfloat16(), text.bfloat16(), scale))


@pytest.mark.parametrize("loss_fn", [ClipLoss(), ContrastiveLoss(label_smoothing=0.1), ContrastiveLoss(kind="sigmoid")])
def test_gradient_caching(dense: ModuleType, loss_fn: torch.nn.Module) -> None:
    """Gradients of the whole batch from micro-batches of 8 (Gao et al. 2021)."""
    x, y = dense.pairs(24, 10)
    g = torch.Generator().manual_seed(3)
    start = [torch.randn(10, 6, generator=g, dtype=torch.float64) for _ in range(2)]

    def parameters() -> list[Tensor]:
        return [w.clone().requires_grad_() for w in (*start, torch.tensor(2.0, dtype=torch.float64))]

    def towers(p: list[Tensor], rows: slice) -> list[Tensor]:
        return [F.normalize(a[rows] @ w, dim=1) for a, w in ((x, p[0]), (y, p[1]))]

    whole = parameters()
    loss_fn(*towers(whole, slice(None)), whole[2].exp()).backward()

    cached = parameters()
    parts = [slice(k, k + 8) for k in range(0, 24, 8)]
    with torch.no_grad():
        features = [torch.cat(f) for f in zip(*(towers(cached, rows) for rows in parts), strict=True)]
    leaves = [f.requires_grad_() for f in features]
    loss_fn(*leaves, cached[2].exp()).backward()  # the scale's gradient is whole after this
    for rows in parts:
        again = towers(cached, rows)
        torch.autograd.backward(again, [leaf.grad[rows] for leaf in leaves])
    for a, b in zip(cached, whole, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-13)
