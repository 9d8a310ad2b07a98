"""Contrastive loss, forward and backward, on the CPU: the chunked reference against open_clip's ``ClipLoss``.

The results are compared before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from farl_kernels.contrastive import contrastive_loss

open_clip_loss = pytest.importorskip("open_clip.loss", reason="open_clip is the peer: install the extra [train]")

Loss = Callable[[Tensor, Tensor, Tensor], Any]
IMPLEMENTATIONS: dict[str, Loss] = {
    "open_clip": open_clip_loss.ClipLoss(),
    "reference": contrastive_loss,
    "reference deterministic": lambda *leaves: contrastive_loss(*leaves, deterministic=True),
}


def leaves(count: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(count, dim, generator=g), dim=1).requires_grad_() for _ in range(2))
    return image, text, torch.tensor(14.29, requires_grad=True)


def forward_backward(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    value = loss(*inputs)
    return [value.detach(), *torch.autograd.grad(value, inputs)]


@pytest.mark.parametrize("count", [256, 1024, 2048])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_contrastive_forward_backward(benchmark: Any, name: str, count: int) -> None:
    inputs = leaves(count, 512)
    results = [forward_backward(IMPLEMENTATIONS[k], inputs) for k in (name, "open_clip")]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())
    benchmark.group = f"contrastive loss, N={count}, D=512, float32, forward and backward"
    benchmark.pedantic(forward_backward, (IMPLEMENTATIONS[name], inputs), rounds=5, warmup_rounds=1)
