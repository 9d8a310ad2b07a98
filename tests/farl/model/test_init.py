"""Statistics of new weights: FaRL's for the image tower, OpenAI CLIP's for the text tower."""

from __future__ import annotations

import math

import pytest
import torch

from farl.model import FaRL, MimConfig, ModelConfig, TextConfig, VisionConfig

CONFIG = ModelConfig(
    embed_dim=96,
    vision=VisionConfig(image_size=80, patch_size=8, width=128, layers=2, heads=2),
    text=TextConfig(width=192, layers=3, heads=3, vocab_size=300),
    mim=MimConfig(layers=1, vocab_size=64),
)
XAVIER = math.sqrt(2 / (128 + 3 * 128))
STANDARD_DEVIATIONS = {
    "visual.conv1.weight": 0.02,
    "visual.transformer.resblocks.1.attn.in_proj_weight": XAVIER,
    "visual.transformer.resblocks.1.attn.out_proj.weight": 0.02,
    "visual.transformer.resblocks.1.mlp.c_fc.weight": 0.02,
    "visual.transformer.resblocks.1.mlp.c_proj.weight": 0.02,
    "visual.lm_transformer.resblocks.0.attn.in_proj_weight": XAVIER,
    "visual.lm_transformer.resblocks.0.mlp.c_fc.weight": 0.02,
    "visual.lm_head.weight": 0.02,
    "visual.positional_embedding": 128**-0.5,
    "visual.class_embedding": 128**-0.5,
    "visual.mask_token": 128**-0.5,
    "visual.proj": 128**-0.5,
    "token_embedding.weight": 0.02,
    "positional_embedding": 0.01,
    "text_projection": 192**-0.5,
    "transformer.resblocks.2.attn.in_proj_weight": 192**-0.5,
    "transformer.resblocks.2.attn.out_proj.weight": 192**-0.5 * 6**-0.5,
    "transformer.resblocks.2.mlp.c_fc.weight": (2 * 192) ** -0.5,
    "transformer.resblocks.2.mlp.c_proj.weight": 192**-0.5 * 6**-0.5,
    # nn.Linear's own, as in OpenAI's code: uniform within 1 / sqrt(fan-in).
    "transformer.resblocks.2.mlp.c_fc.bias": 192**-0.5 / math.sqrt(3),
}


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return FaRL(CONFIG).state_dict()


@pytest.mark.parametrize("name", STANDARD_DEVIATIONS)
def test_standard_deviations(weights, name):
    values = weights[name]
    expected = STANDARD_DEVIATIONS[name]
    # Five standard errors of a standard deviation, and of a mean.
    assert abs(float(values.std()) / expected - 1) < 5 / math.sqrt(2 * values.numel())
    assert abs(float(values.mean())) < 5 * expected / math.sqrt(values.numel())


def test_biases_and_norms_start_neutral(weights):
    for name, values in weights.items():
        if ".ln_" in f".{name}":
            assert (values == (1 if name.endswith("weight") else 0)).all(), name
        elif name.endswith("bias") and not ("mlp" in name and not name.startswith("visual")):
            assert (values == 0).all(), name
    assert float(weights["logit_scale"]) == pytest.approx(math.log(1 / 0.07))
