"""A short training by the kernels and by the N x N definition: the same losses, the same path of the logit scale."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from farl_kernels import contrastive_loss

PAIRS, FEATURES, DIM, STEPS = 24, 12, 8, 40


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.image, self.text = (nn.Parameter(torch.randn(FEATURES, DIM, generator=g) / 4) for _ in range(2))
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return F.normalize(x @ self.image, dim=1), F.normalize(y @ self.text, dim=1), self.logit_scale.exp()


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_the_curves_are_those_of_the_definition(device: torch.device, backend: str) -> None:
    def curve(fused: bool) -> Tensor:
        model = Towers().to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        g, points = torch.Generator().manual_seed(1), []
        for _ in range(STEPS):
            x = torch.randn(PAIRS, FEATURES, generator=g)
            y = x.flip(1) + 0.3 * torch.randn(PAIRS, FEATURES, generator=g)
            image, text, scale = model(x.to(device), y.to(device))
            if fused:
                loss = contrastive_loss(image, text, scale, backend=backend)
            else:
                logits = scale * image @ text.T
                own = torch.arange(PAIRS, device=device)
                loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
            assert isinstance(loss, Tensor)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            points.append(torch.stack([loss.detach(), model.logit_scale.detach()]))
        return torch.stack(points)

    ours, plain = curve(True), curve(False)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-4)
    assert plain[-1, 0] < plain[0, 0] - 0.5 and plain[-1, 1] != plain[0, 1]
