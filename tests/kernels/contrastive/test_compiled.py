"""The loss inside torch.compile, and the opaque ops it is made of."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from farl_kernels.contrastive import ContrastiveLoss, contrastive_loss, custom_ops, gather_features
from farl_kernels.contrastive.options import Options

SETTINGS: list[dict[str, Any]] = [
    {"return_metrics": True, "return_lse": True},
    {"deterministic": True, "label_smoothing": 0.1},
    {"duplicates": "multi_positive", "reduction": "none"},
    {"kind": "sigmoid", "duplicates": "mask", "return_metrics": True},
]


def inputs(dense: ModuleType, count: int, device: torch.device, kind: str = "softmax") -> list[Tensor]:
    image, text = (x.to(device, torch.float32) for x in dense.pairs(count, 8))
    scalars = [14.29, *([-2.0] if kind == "sigmoid" else [])]
    return [x.requires_grad_() for x in (image, text, *(torch.tensor(v, device=device) for v in scalars))]


def model(settings: dict[str, Any], backend: str) -> Any:
    """Towers that are a normalisation, the loss, and something behind it."""

    def call(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None) -> Any:
        ids = torch.arange(image.shape[0], device=image.device) // 3 if "duplicates" in settings else None
        found = contrastive_loss(
            F.normalize(image + text, dim=1), gather_features(text), scale, logit_bias=bias, ids=ids, backend=backend,
            **settings,
        )  # fmt: skip
        loss, metrics = found if isinstance(found, tuple) else (found, {})
        return (loss * loss).sum(), *metrics.values()

    return call


def check(dense: ModuleType, settings: dict[str, Any], backend: str, compiled: Any, count: int, device: Any) -> None:
    eager, leaves = model(settings, backend), inputs(dense, count, device, settings.get("kind", "softmax"))
    found, wanted = compiled(*leaves), eager(*leaves)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found[0], leaves), torch.autograd.grad(wanted[0], leaves))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_compiled_equals_eager(dense: ModuleType, device: torch.device, settings: dict[str, Any], backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(model(settings, backend), fullgraph=True, backend="aot_eager")
    check(dense, settings, backend, compiled, 12, device)


def test_dynamic_shapes(dense: ModuleType, device: torch.device) -> None:
    torch.compiler.reset()
    compiled = torch.compile(model(SETTINGS[0], "reference"), fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (12, 19):
        check(dense, SETTINGS[0], "reference", compiled, count, device)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_inductor(dense: ModuleType, device: torch.device, backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(model(SETTINGS[0], backend), fullgraph=True)
    check(dense, SETTINGS[0], backend, compiled, 12, device)


def test_module_in_a_compiled_training_step(dense: ModuleType) -> None:
    torch.compiler.reset()
    loss_fn = ContrastiveLoss()
    image, text = (x.float() for x in dense.pairs(12, 8))

    def trajectory(compiled: bool) -> list[float]:
        weight = torch.nn.Parameter(torch.eye(8))
        logit_scale = torch.nn.Parameter(torch.tensor(2.0))
        optimizer = torch.optim.SGD([weight, logit_scale], lr=0.1)

        def loss() -> Any:
            return loss_fn(F.normalize(image @ weight, dim=1), text, logit_scale.exp())

        step = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            value = step()
            value.backward()
            optimizer.step()
            losses.append(value.item())
        return losses

    eager = trajectory(compiled=False)
    assert trajectory(compiled=True) == pytest.approx(eager, rel=1e-5)
    assert eager[-1] < eager[0]


OPTIONS = {
    "softmax": Options(metrics=True),
    "smoothed deterministic": Options(label_smoothing=0.1, deterministic=True),
    "sigmoid": Options(kind="sigmoid", duplicates="mask"),
}


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", OPTIONS)
def test_opcheck(dense: ModuleType, device: torch.device, name: str, backend: str) -> None:
    options = OPTIONS[name]
    image, text, scale, *bias = (x.detach() for x in inputs(dense, 12, device, options.kind))
    ids = torch.arange(12, device=device) // 3 if options.compares_ids else None
    tensors = (image, text, scale, *(bias or (None,)), ids)
    end = (*custom_ops.settings(options), backend)
    torch.library.opcheck(custom_ops.FORWARD, (*tensors, *end))
    _, _, *saved = custom_ops.FORWARD(*tensors, *end)
    for needs in ((True, True, True), (False, True, False)):
        torch.library.opcheck(custom_ops.BACKWARD, (torch.ones(12, device=device), *tensors, *saved, *needs, *end))
