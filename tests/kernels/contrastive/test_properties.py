"""What must hold for any features: symmetries, sums, upstream gradients, frozen sides, NaN, metrics."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from farl_kernels.contrastive import ContrastiveLoss, contrastive_loss, gather_features


def leaves(image: Tensor, text: Tensor, scale: float = 14.29) -> tuple[Tensor, Tensor, Tensor]:
    s = torch.tensor(scale, dtype=torch.promote_types(image.dtype, torch.float32), requires_grad=True)
    return image.clone().requires_grad_(), text.clone().requires_grad_(), s


def loss_and_gradients(
    image: Tensor, text: Tensor, scale: float = 14.29, **kwargs: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    inputs = leaves(image, text, scale)
    loss = contrastive_loss(*inputs, **kwargs)
    assert isinstance(loss, Tensor)
    return loss.detach(), torch.autograd.grad(loss.sum(), inputs)


@given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 3000), st.floats(0.0, 120.0), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_chunks_do_not_matter(count: int, dim: int, chunk_bytes: int, scale: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    image, text = (F.normalize(torch.randn(count, dim, generator=g, dtype=torch.float64), dim=1) for _ in range(2))
    whole, whole_gradients = loss_and_gradients(image, text, scale)
    loss, gradients = loss_and_gradients(image, text, scale, chunk_bytes=chunk_bytes)
    torch.testing.assert_close(loss, whole, rtol=1e-12, atol=1e-14)
    for a, b in zip(gradients, whole_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kwargs", [{}, {"label_smoothing": 0.1}, {"deterministic": True}])
def test_towers_are_symmetric(dense: ModuleType, kwargs: dict[str, Any]) -> None:
    image, text = dense.pairs(33, 12)
    loss, (d_image, d_text, d_scale) = loss_and_gradients(image, text, **kwargs)
    swapped, (d_text2, d_image2, d_scale2) = loss_and_gradients(text, image, **kwargs)
    for a, b in ((loss, swapped), (d_image, d_image2), (d_text, d_text2), (d_scale, d_scale2)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_permutation(dense: ModuleType, kind: str) -> None:
    image, text = dense.pairs(33, 12)
    order = torch.randperm(33, generator=torch.Generator().manual_seed(1))
    loss, gradients = loss_and_gradients(image, text, kind=kind, reduction="none")
    moved, moved_gradients = loss_and_gradients(image[order], text[order], kind=kind, reduction="none")
    torch.testing.assert_close(moved, loss[order], rtol=1e-11, atol=1e-13)
    for a, b in zip(moved_gradients[:2], gradients[:2], strict=True):
        torch.testing.assert_close(a, b[order], rtol=1e-10, atol=1e-12)


def test_one_shift_of_all_logits_changes_nothing(dense: ModuleType) -> None:
    """The logit gradient sums to zero: seen through a coordinate in which every feature is constant."""
    image, text = dense.pairs(40, 12)
    image, text = (torch.cat([x, torch.full((40, 1), 0.3, dtype=x.dtype)], dim=1) for x in (image, text))
    _, (d_image, d_text, _) = loss_and_gradients(image, text)
    assert abs(d_image[:, -1].sum()) < 1e-14 and abs(d_text[:, -1].sum()) < 1e-14
    assert d_image[:, -1].abs().max() > 1e-6


def test_scale_gradient_is_the_features_own(dense: ModuleType) -> None:
    image, text = dense.pairs(40, 12)
    _, (d_image, d_text, d_scale) = loss_and_gradients(image, text, 20.0)
    torch.testing.assert_close((d_image * image).sum(), 20 * d_scale)
    torch.testing.assert_close((d_text * text).sum(), 20 * d_scale)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_upstream_gradient_and_double_use(dense: ModuleType, reduction: str) -> None:
    image, text = dense.pairs(20, 8)
    inputs = leaves(image, text)
    loss = contrastive_loss(*inputs, reduction=reduction)
    assert isinstance(loss, Tensor)
    once = torch.autograd.grad(loss, inputs, retain_graph=True)
    scaled = torch.autograd.grad(-3.5 * loss + loss * loss, inputs, retain_graph=True)
    factor = -3.5 + 2 * loss.detach()
    for a, b in zip(scaled, once, strict=True):
        torch.testing.assert_close(a, factor * b)
    (loss + 1).backward(retain_graph=True)
    loss.backward()
    for x, b in zip(inputs, once, strict=True):
        torch.testing.assert_close(x.grad, 2 * b)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_reductions_agree(dense: ModuleType, kind: str) -> None:
    image, text = dense.pairs(20, 8)
    rows = contrastive_loss(image, text, torch.tensor(9.0), kind=kind, reduction="none")
    assert isinstance(rows, Tensor) and rows.shape == (20,)
    for reduction, want in (("mean", rows.mean()), ("sum", rows.sum())):
        torch.testing.assert_close(
            contrastive_loss(image, text, torch.tensor(9.0), kind=kind, reduction=reduction), want
        )


@pytest.mark.parametrize("live", [0, 1, 2])
@pytest.mark.parametrize("deterministic", [False, True])
def test_one_input_alone_needs_a_gradient(dense: ModuleType, live: int, deterministic: bool) -> None:
    image, text = dense.pairs(20, 8)
    _, full = loss_and_gradients(image, text, label_smoothing=0.1)
    inputs = [x if k == live else x.detach() for k, x in enumerate(leaves(image, text))]
    loss = contrastive_loss(*inputs, label_smoothing=0.1, deterministic=deterministic)
    assert isinstance(loss, Tensor)
    loss.backward()
    torch.testing.assert_close(inputs[live].grad, full[live], rtol=1e-11, atol=1e-13)
    assert all(x.grad is None for k, x in enumerate(inputs) if k != live)


def test_layouts(dense: ModuleType) -> None:
    image, text = dense.pairs(20, 8)
    loss, gradients = loss_and_gradients(image, text)
    strided = [torch.stack([x, x], dim=2)[:, :, 0] for x in (image, text.T.contiguous().T)]
    again, again_gradients = loss_and_gradients(*strided)
    for a, b in zip((again, *again_gradients), (loss, *gradients), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    one = image[:1].expand(20, 8)
    torch.testing.assert_close(loss_and_gradients(one, text)[0], loss_and_gradients(one.contiguous(), text)[0])


def test_one_pair_costs_nothing() -> None:
    for smoothing in (0.0, 0.1):
        loss, gradients = loss_and_gradients(torch.ones(1, 4), torch.ones(1, 4), label_smoothing=smoothing)
        assert loss == 0 and all(not g.any() for g in gradients)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_stays_where_it_belongs(dense: ModuleType, bad: float) -> None:
    image, text = dense.pairs(9, 4)
    image[3, 2] = bad
    rows = contrastive_loss(image, text, torch.tensor(5.0), reduction="none", kind="sigmoid")
    assert isinstance(rows, Tensor)
    assert not rows[3].isfinite() and rows[torch.arange(9) != 3].isfinite().all()
    loss, gradients = loss_and_gradients(image, text)
    assert loss.isnan() and all(g.isnan().any() for g in gradients)


def test_metrics(dense: ModuleType) -> None:
    ids = torch.arange(200) // 4
    image, text = (x[ids] for x in dense.pairs(50, 16, noise=0.5))
    image, text = (x + y for x, y in zip((image, text), dense.pairs(200, 16, noise=3.0, seed=1), strict=True))
    scale = torch.tensor(10.0)
    cosines = image @ text.T
    same = ids[:, None] == ids[None]
    others = same & ~torch.eye(200, dtype=torch.bool)
    index = torch.arange(200)
    wanted = {
        "negative": [(cosines.argmax(d) == index).float().mean() for d in (1, 0)],
        "multi_positive": [(ids[cosines.argmax(d)] == ids).float().mean() for d in (1, 0)],
        "mask": [(cosines.masked_fill(others, -2).argmax(d) == index).float().mean() for d in (1, 0)],
    }
    for duplicates, (i2t, t2i) in wanted.items():
        for kind in ("softmax", "sigmoid"):
            for deterministic in (False, True):
                _, metrics = ContrastiveLoss(
                    kind=kind,
                    duplicates=duplicates,
                    deterministic=deterministic,
                    return_metrics=True,
                    chunk_bytes=200 * 8 * 30,
                )(image.clone().requires_grad_(), text, scale, ids=ids)
                assert metrics["image_to_text_accuracy"] == i2t and metrics["text_to_image_accuracy"] == t2i
                assert not any(m.requires_grad for m in metrics.values())
    assert len({float(x[0]) for x in wanted.values()}) == 3  # the three policies can be told apart here


def test_collapsed_features_score_nothing() -> None:
    same = torch.zeros(8, 4)
    same[:, 0] = 1
    _, metrics = contrastive_loss(same, same, torch.tensor(10.0), return_metrics=True)
    assert metrics["image_to_text_accuracy"] == 0


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_log_sum_exps(dense: ModuleType, backend: str, deterministic: bool) -> None:
    image, text = (x.float() for x in dense.pairs(30, 12))
    _, found = contrastive_loss(
        image, text, torch.tensor(50.0), return_lse=True, deterministic=deterministic, backend=backend
    )
    logits = 50 * image.double() @ text.double().T
    for name, dim in (("image_to_text_lse", 1), ("text_to_image_lse", 0)):
        assert found[name].dtype == torch.float32 and not found[name].requires_grad
        torch.testing.assert_close(found[name].double(), logits.logsumexp(dim), rtol=1e-6, atol=1e-5)


def test_module_and_handle_equal_the_function(dense: ModuleType) -> None:
    image, text = dense.pairs(20, 8)
    inputs = leaves(image, text)
    plain = contrastive_loss(*inputs)
    module = ContrastiveLoss()(inputs[0], gather_features(inputs[1]), inputs[2])
    assert isinstance(plain, Tensor) and isinstance(module, Tensor) and plain.equal(module)
    for a, b in zip(torch.autograd.grad(plain, inputs), torch.autograd.grad(module, inputs), strict=True):
        assert a.equal(b)
