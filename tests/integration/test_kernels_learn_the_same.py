"""A micro FaRL trained by the kernels and by the plain references has the same loss curve."""

from __future__ import annotations

import pytest
import torch

from farl.model import MODELS, FaRL
from farl.step import TrainStep, pack_parts
from farl_engine.data import Batch
from farl_engine.distributed import World
from farl_kernels import use_backend
from farl_kernels.activation.op import GELU, QUICK_GELU
from farl_kernels.attention.op import MASKED_ATTENTION, MASKED_ATTENTION_PACKED, SINGLE_QUERY_ATTENTION
from farl_kernels.contrastive.op import CONTRASTIVE_LOSS
from farl_kernels.layer_norm.op import ADD_LAYER_NORM
from farl_kernels.patch_masking.op import MASK_PATCHES, PATCHIFY, SAMPLE_BLOCK_MASKS
from farl_kernels.token_loss.op import MASKED_TOKEN_CROSS_ENTROPY
from tests.support.steps import Brightness

SAMPLES = 4
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WORDS = ["a face", "a smiling woman with glasses", "an old man", "a child in a red hat outdoors"]


def batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step % 3)
    captions = [f"{WORDS[i % 4]} number {i + step % 3}" for i in range(SAMPLES)]
    ids = torch.arange(SAMPLES) * 7 + step
    # Smooth pictures of different brightness, so that there is something to learn.
    levels = torch.rand(SAMPLES, 1, 1, 3, generator=generator) * 200
    noise = torch.rand(SAMPLES, 32, 32, 3, generator=generator) * 55
    images = (levels + noise).to(torch.uint8)
    whole = Batch(step, ids, ids, torch.full_like(ids, step), images, None, captions, pack_parts(captions, 0))
    return whole.to(DEVICE)


def losses(backend: str, steps: int) -> list[list[float]]:
    torch.manual_seed(0)
    model = FaRL(MODELS["farl-micro"]).to(DEVICE)
    world = World(rank=0, size=1, device=DEVICE, control=None)
    step = TrainStep(model, world, Brightness(), mim_weight=1.0, mask_ratio=6 / 16, seed=1, bf16=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-6)
    curve = []
    with use_backend(backend):
        for index in range(steps):
            optimizer.zero_grad()
            figures = step(batch(index))
            optimizer.step()
            curve.append([figures["loss_contrastive"].item(), figures["loss_mim"].item()])
    return curve


def test_every_op_of_the_model_has_kernels() -> None:
    """Otherwise the other test would compare the same thing with itself: an op without the name keeps its own way."""
    ops = [MASKED_ATTENTION, MASKED_ATTENTION_PACKED, SINGLE_QUERY_ATTENTION, ADD_LAYER_NORM, QUICK_GELU, GELU]
    ops += [PATCHIFY, SAMPLE_BLOCK_MASKS, MASK_PATCHES, CONTRASTIVE_LOSS, MASKED_TOKEN_CROSS_ENTROPY]
    assert [op.name for op in ops if op.names[0] != "triton"] == []


@pytest.mark.parametrize("steps", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_the_loss_curve_of_the_kernels_is_that_of_the_references(steps: int) -> None:
    fused, plain = losses("triton", steps), losses("reference", steps)
    torch.testing.assert_close(torch.tensor(fused), torch.tensor(plain), rtol=0, atol=1e-4)
    if steps == 30:
        assert plain[-1][0] < plain[0][0] - 0.3 and plain[-1][1] < plain[0][1] - 0.3
