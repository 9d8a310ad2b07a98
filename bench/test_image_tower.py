"""The image tower alone, forward and backward, beside timm's ViT of the same sizes, eager and compiled.

Both take pictures that are normalised already, and give features of CLIP's kind: quick GELU, a norm before the first
block, the class token projected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.contest import compiled, need
from bench.step_contest import Suite, each_contender, run
from bench.step_training import SMALL, Case, Training, fresh, normalised, synthetic
from bench.timing import CUDA, DEVICE
from farl.flops import forward_flops
from farl.model import MODELS, ModelConfig
from farl.model.vision import VisionTower
from farl_kernels import use_backend


@dataclass(frozen=True)
class TowerCase(Case):
    """Pictures through the image tower; `pairs` is how many."""

    @property
    def shape(self) -> str:
        return f"{self.model}, {self.pairs} pictures, {self.precision}"

    @property
    def flop(self) -> float:
        forward = forward_flops(replace(self.config, mim=None), masked=0)
        # Pixels need no gradient.
        return self.pairs * (3 * forward.trunk + 2 * forward.patches)


def drawn(case: Case) -> tuple[VisionTower, Tensor, Tensor]:
    """The tower, pictures, and the gradient of the loss with respect to its features."""
    config = replace(case.config, mim=None)
    pictures = normalised(synthetic(case.config, case.pairs)[0].images)
    g = torch.Generator().manual_seed(2)
    return fresh(config).visual, pictures, torch.randn(case.pairs, config.embed_dim, generator=g).to(DEVICE)


def loss_of(features: Callable[[Tensor], Tensor], pictures: Tensor, gradient: Tensor, autocast: bool) -> Tensor:
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        value = (features(pictures).float() * gradient).sum()
    value.backward()
    return value.detach()


def ours(case: Case, backend: str | None = None) -> Training:
    tower, pictures, gradient = drawn(case)
    if case.precision == "bfloat16":
        tower.compute_dtype = torch.bfloat16
    loss = partial(loss_of, tower, pictures, gradient, False)
    return Training(tower, loss, partial(use_backend, backend), update=False)


def timm(case: Case, *, compile_it: bool) -> Training:
    tower, pictures, gradient = drawn(case)
    model = timm_tower(tower, case.config)
    features = compiled(model, whole_step=True) if compile_it else model
    loss = partial(loss_of, features, pictures, gradient, case.precision == "bfloat16")
    training = TimmTraining(model, loss, update=False)
    training.shapes = {name: value.shape for name, value in tower.named_parameters()}
    return training


class TimmTraining(Training):
    """Its gradients go by the names and `shapes` of `VisionTower`."""

    shapes: dict[str, torch.Size]

    def checked(self) -> tuple[float, dict[str, Tensor]]:
        loss, grads = super().checked()
        found = {name: grads[timm_name(name)] for name in self.shapes}
        found["proj"] = found["proj"].t()
        return loss, {name: grad.reshape(self.shapes[name]) for name, grad in found.items()}


def timm_tower(tower: VisionTower, config: ModelConfig) -> nn.Module:
    """timm's ViT with the weights of `tower`."""
    vision = config.vision
    model = need("timm.models.vision_transformer").VisionTransformer(
        img_size=vision.image_size,
        patch_size=vision.patch_size,
        num_classes=config.embed_dim,
        embed_dim=vision.width,
        depth=vision.layers,
        num_heads=vision.heads,
        mlp_ratio=vision.mlp_ratio,
        pre_norm=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
        act_layer=config.activation,
    )
    with torch.no_grad():
        for name, value in tower.named_parameters():
            theirs = model.get_parameter(timm_name(name))
            theirs.copy_(value.t() if name == "proj" else value.view(theirs.shape))
    # CLIP has no bias there.
    model.head.bias.data.zero_()
    model.head.bias.requires_grad_(False)
    return model.to(DEVICE)


def timm_name(name: str) -> str:
    """The parameter of timm's ViT that holds the tower's `name`."""
    whole = {
        "conv1.weight": "patch_embed.proj.weight",
        "class_embedding": "cls_token",
        "positional_embedding": "pos_embed",
        "proj": "head.weight",
    }
    parts = {
        "transformer.resblocks.": "blocks.",
        "ln_pre.": "norm_pre.",
        "ln_post.": "norm.",
        "ln_": "norm",
        "attn.in_proj_": "attn.qkv.",
        "attn.out_proj.": "attn.proj.",
        "mlp.c_fc.": "mlp.fc1.",
        "mlp.c_proj.": "mlp.fc2.",
    }
    if name in whole:
        return whole[name]
    for own, theirs in parts.items():
        name = name.replace(own, theirs)
    return name


CONTENDERS: dict[str, Callable[[Case], Training]] = {
    "farl": ours,
    "timm": partial(timm, compile_it=False),
    "timm, torch.compile": partial(timm, compile_it=True),
}
SUITE = Suite(
    "image tower",
    CONTENDERS,
    partial(ours, backend="reference"),
    "pictures_per_second",
    {"timm, torch.compile": "timm"},
)
EAGER = ["farl", "timm"]
if CUDA:
    SIZES = (("farl-b16", 512), ("farl-l16", 128), ("farl-s16", 1024))
    CASES = {TowerCase(name, MODELS[name], pictures, "bfloat16"): list(CONTENDERS) for name, pictures in SIZES}
else:
    name = "ViT 192 x 12, 112 px"
    CASES = {
        TowerCase(name, SMALL, 64, "float32"): list(CONTENDERS),
        TowerCase(name, SMALL, 64, "bfloat16"): EAGER,
        TowerCase("ViT 128 x 6, 64 px", MODELS["farl-tiny"], 64, "float32"): EAGER,
    }


@each_contender(CASES)
def test_image_tower(benchmark: Any, request: pytest.FixtureRequest, case: TowerCase, name: str) -> None:
    run(SUITE, benchmark, request, case, name)
