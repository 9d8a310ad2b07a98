"""Added error of bfloat16 in four stages of training: 4096 pairs of 512 features, from untrained to all but solved.

The truth is the float64 gradient of the *unrounded* features; "added" is the distance to the float64 gradient of the
rounded ones, which no arithmetic can undo. Gradients are compared before their own rounding to the features' dtype.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from farl_kernels.contrastive import passes
from farl_kernels.contrastive.backends import backend
from farl_kernels.contrastive.exchange import Ranks
from farl_kernels.contrastive.options import Options
from farl_kernels.contrastive.reference import AxisTerms, Tile

COUNT, DIM = 4096, 512
KERNELS = os.environ.get("TRITON_INTERPRET") != "1" and torch.cuda.is_available()


class Regime(NamedTuple):
    noise: float
    gap: float
    scale: float
    feature_error: float  # of rounding the features to bfloat16 alone
    added: float  # of a bfloat16 strip beyond that, with the diagonal kept out


REGIMES = {
    "early": Regime(6.0, 0.0, 14.2857, 1.66e-3, 3.2e-5),
    "mid": Regime(1.6, 0.9, 100.0, 4.83e-3, 6.6e-4),
    "confident": Regime(1.25, 0.9, 100.0, 9.7e-3, 5.6e-4),
    "very confident": Regime(1.0, 0.9, 100.0, 1.7e-2, 3.0e-4),
}


def features(regime: Regime) -> tuple[Tensor, Tensor]:
    """Unit features in float64: a shared latent, noise of each modality's own, and an offset between modalities."""
    g = torch.Generator().manual_seed(0)
    latent, *noises = (torch.randn(COUNT, DIM, generator=g, dtype=torch.float64) for _ in range(3))
    found = []
    for noise in noises:
        offset = F.normalize(torch.randn(DIM, generator=g, dtype=torch.float64), dim=0) * DIM**0.5
        found.append(F.normalize(latent + regime.noise * noise + regime.gap * offset, dim=1))
    return found[0], found[1]


class Result(NamedTuple):
    loss: float
    image: Tensor
    scale: float


def ours(image: Tensor, text: Tensor, scale: float, name: str = "reference") -> Result:
    """Loss, image gradient and scale gradient of the mean; the image gradient in the accumulation dtype."""
    options, ranks = Options(chunk_bytes=2**26), Ranks.alone()
    s = torch.tensor(scale, dtype=torch.float64 if image.dtype == torch.float64 else torch.float32, device=image.device)
    x = passes.gather(image, text, text, s, None, None, ranks, options)
    out = passes.forward(x, ranks, options, name)
    weight = torch.full_like(out.loss, 0.5 / COUNT)
    tiles = backend(name)
    part = tiles.gradients(
        Tile(image, text, 0, s, None, None, None, options),
        AxisTerms(weight, out.lse[0]),
        AxisTerms(weight, out.lse[1]),
        need_rows=True,
        need_columns=False,
        need_scalars=True,
    )
    pull = out.pull * weight
    d_image = tiles.finish(part.rows, pull, text.to(s.dtype), s)
    d_scale = part.scale + (pull * out.cosines).sum(dtype=torch.float64)
    return Result(out.loss.double().mean().item(), d_image.double().cpu(), d_scale.item())


def eager_autocast(image: Tensor, text: Tensor, scale: float) -> Tensor:
    """Image gradient as open_clip's loss takes it under bfloat16 autocast: logits and their gradients are rounded."""
    labels = torch.arange(COUNT)
    scaled = [(torch.tensor(scale).bfloat16() * x.bfloat16()).float() for x in (image, text)]
    wide = [x.bfloat16().float() for x in (image, text)]
    total = torch.zeros(COUNT, DIM)
    for axis in (0, 1):
        logits = (scaled[axis] @ wide[1 - axis].T).bfloat16().float()
        logits = logits.softmax(1)
        logits[labels, labels] -= 1
        strip = logits.mul_(0.5 / COUNT).bfloat16().float()
        total += strip @ wide[1] if axis == 0 else strip.T @ scaled[1] / scale
    return total.double() * scale


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.slow
@pytest.mark.parametrize("name", REGIMES)
def test_bfloat16_adds_little(name: str) -> None:
    regime = REGIMES[name]
    exact = features(regime)
    truth = ours(*exact, regime.scale)
    rounded = [x.bfloat16() for x in exact]
    same_inputs = ours(*(x.double() for x in rounded), regime.scale)
    device = "cuda" if KERNELS else "cpu"
    found = ours(*(x.to(device) for x in rounded), regime.scale, "triton" if KERNELS else "reference")
    eager = eager_autocast(*rounded, regime.scale)
    single = ours(*(x.float() for x in exact), regime.scale)
    single_truth = ours(*(x.float().double() for x in exact), regime.scale)

    features_alone, whole = distance(same_inputs.image, truth.image), distance(found.image, truth.image)
    added, of_eager = distance(found.image, same_inputs.image), distance(eager, truth.image)
    of_single = distance(single.image, single_truth.image)
    of_loss = abs(found.loss / same_inputs.loss - 1)
    of_scale = abs(found.scale / same_inputs.scale - 1)
    print(
        f"\n| {name} ({truth.loss:.2g}) | {features_alone:.2e} | {of_eager:.2e} | {whole:.2e} [{added:.1e}] "
        f"| {of_single:.1e} | {of_loss:.1e} | {of_scale:.1e} |"
    )
    assert features_alone == pytest.approx(regime.feature_error, rel=0.25)
    assert added <= 1.5 * regime.added
    assert whole <= 1.5 * (regime.feature_error**2 + regime.added**2) ** 0.5
    if regime.scale == 100:
        assert whole < of_eager
    assert of_single <= 5e-6 and of_loss <= 1e-5 and of_scale <= 1e-4
