"""Models of the three libraries with random weights, and how an accelerated one is compared with its original."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Subject:
    """A model with its inputs, as the library makes it."""

    accelerate: Callable[..., Any]
    model: nn.Module
    inputs: dict[str, Tensor]

    def features(self, model: nn.Module) -> Tensor:
        out = model(**{name: _in_dtype_of(model, x) for name, x in self.inputs.items()})
        if isinstance(out, dict):  # of transformers
            found = ("text_embeds", "image_embeds") if "text_embeds" in out else ("last_hidden_state", "pooler_output")
            out = tuple(out[name] for name in found)
        elif isinstance(out, Tensor):
            out = (out,)
        # The scale of the logits is used too, so that every parameter has a gradient.
        scale = getattr(model, "logit_scale", torch.zeros(())).exp()
        return scale * torch.cat([x.flatten() for x in out[:2]])

    def run(self, model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        """Outputs and the gradients of all parameters, from the same random numbers every time."""
        model.zero_grad()
        torch.manual_seed(7)
        features = self.features(model)
        probe = torch.linspace(-1, 1, features.numel(), dtype=features.dtype, device=features.device)
        # Squared, so that the gradient depends on the values.
        (features * probe).square().sum().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return features.detach(), grads


def _in_dtype_of(model: nn.Module, x: Tensor) -> Tensor:
    return x.to(next(model.parameters()).dtype) if x.is_floating_point() else x


def _timm(name: str, size_of: str = "narrow", **options: Any) -> Subject:
    timm = pytest.importorskip("timm", reason="timm is not installed")

    from farl_kernels.integrations.timm import accelerate

    full = size_of == "full"
    small = {} if full else {"depth": 2, "img_size": 28 if "patch14" in name else 32}
    if size_of == "narrow":
        options = {"embed_dim": 48, "num_heads": 3} | options
    model = timm.create_model(name, num_classes=5, **small, **options)
    size = 224 if full else small["img_size"]
    return Subject(accelerate, model, {"x": torch.randn(2, 3, size, size)})


def _open_clip(name: str, size_of: str = "narrow", **options: Any) -> Subject:
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")

    from farl_kernels.integrations.open_clip import accelerate

    config = open_clip.get_model_config(name)
    if size_of != "full":
        config["vision_cfg"] |= {"layers": 2, "image_size": 32}
        config["text_cfg"] |= {"layers": 2, "vocab_size": 100, "context_length": 20}
    if size_of == "narrow":
        config["vision_cfg"] |= {"width": 48, "head_width": 16}
        config["text_cfg"] |= {"width": 48, "heads": 3}
    for part, changes in options.items():
        config[part] |= changes
    model = open_clip.model.CLIP(**config)
    text = torch.randint(1, 90, (2, model.context_length))
    size = model.visual.image_size[0]
    return Subject(accelerate, model, {"image": torch.randn(2, 3, size, size), "text": text})


def _transformers(kind: str, size_of: str = "narrow", attention: str = "sdpa", **options: Any) -> Subject:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

    from farl_kernels.integrations.transformers import accelerate

    full = size_of == "full"
    layers = 12 if full else 2
    if size_of == "narrow":
        options = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 96} | options
    if kind == "ViT":
        config = transformers.ViTConfig(num_hidden_layers=layers, image_size=224 if full else 32, **options)
    else:
        vision = {"num_hidden_layers": layers, "image_size": 224 if full else 32, "patch_size": 16}
        text = {"num_hidden_layers": layers, "vocab_size": 100, "bos_token_id": 98, "eos_token_id": 99}
        config = transformers.CLIPConfig(text_config=text | options, vision_config=vision | options)
    config._attn_implementation = attention
    model = getattr(transformers, f"{kind}Model")(config)
    inputs = {"pixel_values": torch.randn(2, 3, *[224 if full else 32] * 2)}
    if kind == "CLIP":
        ids = torch.randint(1, 98, (2, 20))
        ids[:, [-1, 9]] = 99
        inputs |= {"input_ids": ids}
    return Subject(accelerate, model, inputs)


MAKERS: dict[str, tuple[Callable[..., Subject], str, dict[str, Any]]] = {
    "timm vit_base_patch16_224": (_timm, "vit_base_patch16_224", {"drop_path_rate": 0.2}),
    "timm vit_large_patch14_clip_224": (_timm, "vit_large_patch14_clip_224", {}),
    "timm eva02_base_patch16_clip_224": (_timm, "eva02_base_patch16_clip_224", {}),
    "open_clip ViT-B-16": (_open_clip, "ViT-B-16", {}),
    "open_clip ViT-B-16-quickgelu": (_open_clip, "ViT-B-16-quickgelu", {"vision_cfg": {"ls_init_value": 0.5}}),
    "transformers CLIP": (_transformers, "CLIP", {}),
    "transformers ViT": (_transformers, "ViT", {}),
}


@pytest.fixture
def make() -> Callable[..., Subject]:
    """``make(name, dtype=float64, size="narrow")``: the model `name` of MAKERS with random parameters.

    Sizes: "full" is the library's; "shallow" has two blocks and small images; "narrow" fewer channels too.
    """

    def make(name: str, dtype: torch.dtype = torch.float64, size: str = "narrow") -> Subject:
        maker, model, options = MAKERS[name]
        torch.manual_seed(0)
        subject = maker(model, size, **options)
        randomise(subject.model)
        subject.model.to(dtype)
        return subject

    return make


@pytest.fixture
def of_library() -> Callable[..., Subject]:
    """``of_library("timm", name, **options)``: a narrow model in float64 with random parameters."""

    def make(library: str, name: str, **options: Any) -> Subject:
        torch.manual_seed(0)
        maker = {"timm": _timm, "open_clip": _open_clip, "transformers": _transformers}[library]
        subject = maker(name, **options)
        randomise(subject.model)
        subject.model.double()
        return subject

    return make


def randomise(model: nn.Module) -> None:
    """Move every parameter off its initial value: zero biases and unit scales hide faults."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))


def _scales(grads: dict[str, Tensor]) -> dict[str, float]:
    """What the error of a gradient is divided by: its largest value, but not less than a thousandth of the largest of
    all, because some gradients (of key biases) are 0 but for rounding."""
    largest = {name: g.abs().max().item() for name, g in grads.items()}
    return {name: max(value, 1e-3 * max(largest.values())) for name, value in largest.items()}


def _largest_error(got: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    assert got.keys() == truth.keys()
    scales = _scales(truth)
    return max((got[name].double() - truth[name]).abs().max().item() / scales[name] for name in truth)


@pytest.fixture
def check_equal() -> Callable[..., None]:
    """``check_equal(got, truth)``: outputs and gradients in float64 are equal to 1e-12 of their largest values."""

    def check(got: tuple[Tensor, dict[str, Tensor]], truth: tuple[Tensor, dict[str, Tensor]]) -> None:
        assert (got[0] - truth[0]).abs().max() <= 1e-12 * truth[0].abs().max()
        assert _largest_error(got[1], truth[1]) <= 1e-12

    return check


@pytest.fixture
def check_float32() -> Callable[..., None]:
    """``check_float32(subject)``: the accelerated model is at most 2 times (outputs) and 3 times (gradients) as far
    from the float64 truth as the original is, in float32. Accelerates the model."""

    def check(subject: Subject) -> None:
        subject.model.float()
        truth = subject.run(copy.deepcopy(subject.model).double())
        original = subject.run(subject.model)
        subject.accelerate(subject.model)
        got = subject.run(subject.model)
        unit = torch.finfo(torch.float32).eps
        allowed = (original[0].double() - truth[0]).abs().max() + unit * truth[0].abs().max()
        assert (got[0].double() - truth[0]).abs().max() <= 2 * allowed
        assert _largest_error(got[1], truth[1]) <= 3 * (_largest_error(original[1], truth[1]) + unit)

    return check
