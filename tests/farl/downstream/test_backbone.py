"""Backbones: the same features whatever the weights come from, and nothing but what is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from farl.downstream.backbone import Backbone, default_blocks, load_backbone, restore_backbone
from farl.model import IMAGE_MEAN, IMAGE_STD, MODELS, FaRL

MICRO = MODELS["farl-micro"]
TIMM = "test_vit"


def make_farl(mim: bool = True) -> FaRL:
    """Random weights in the released key layout; nothing at an initial value that would hide a mistake."""
    torch.manual_seed(0)
    config = MICRO if mim else replace(MICRO, mim=None, layer_norm_cast="after")
    model = FaRL(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def normalised(images: torch.Tensor) -> torch.Tensor:
    return (images - torch.tensor(IMAGE_MEAN).view(3, 1, 1)) / torch.tensor(IMAGE_STD).view(3, 1, 1)


@pytest.fixture(params=["farl", "clip", "run"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, FaRL]:
    """FaRL's release with the masked branch, CLIP's layout, and a run folder of our own."""
    model = make_farl(mim=request.param != "clip")
    if request.param == "run":
        (tmp_path / "checkpoints").mkdir()
        content = {"step": 3, "model": model.state_dict(), "model_config": model.config.to_dict()}
        torch.save(content, tmp_path / "checkpoints" / "step-00000003.pt")
        return tmp_path, model
    names = model.state_dict()
    assert ("visual.lm_head.weight" in names) == (request.param == "farl")
    torch.save({"state_dict": names} if request.param == "farl" else names, tmp_path / "weights.pth")
    return tmp_path / "weights.pth", model


@pytest.mark.parametrize("resolution", [32, 48])
def test_features_are_those_of_the_model(checkpoint: tuple[Path, FaRL], images: torch.Tensor, resolution: int) -> None:
    path, model = checkpoint
    images = F.interpolate(images, (resolution, resolution), mode="bilinear")
    backbone = load_backbone(path, resolution=resolution, blocks=(1, 0))
    features = backbone(images)
    wanted = model.visual_features(normalised(images), (1, 0))
    for grid, other in zip(features.maps, wanted, strict=True):
        torch.testing.assert_close(grid, other, rtol=1e-6, atol=1e-6)
    assert features.maps[0].shape == (2, 32, resolution // 8, resolution // 8)


def test_class_tokens_lead_to_the_image_features(checkpoint: tuple[Path, FaRL], images: torch.Tensor) -> None:
    path, model = checkpoint
    token = load_backbone(path, resolution=32).eval()(images).class_tokens[-1]
    weight, bias = model.visual.ln_post.weight, model.visual.ln_post.bias
    wanted = model.encode_image(normalised(images))
    torch.testing.assert_close(
        F.layer_norm(token, (32,), weight, bias) @ model.visual.proj, wanted, rtol=1e-5, atol=1e-5
    )


def test_position_embedding_is_resized_once_as_farl_does(tmp_path: Path) -> None:
    model = make_farl()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    position = model.visual.positional_embedding.detach()
    grid = position[1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    wanted = F.interpolate(grid, (7, 7), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).reshape(49, 32)
    found = load_backbone(tmp_path / "weights.pth", resolution=56).trunk.tower.positional_embedding
    assert torch.equal(found[:1], position[:1])
    torch.testing.assert_close(found[1:], wanted)


def test_images_of_another_size_are_resized(images: torch.Tensor) -> None:
    backbone = load_backbone("scratch:farl-micro", resolution=32)
    larger = torch.rand(2, 3, 45, 50)
    resized = F.interpolate(larger, (32, 32), mode="bilinear", align_corners=False)
    assert torch.equal(backbone(larger).maps[0], backbone(resized).maps[0])


@pytest.mark.parametrize("init", ["scratch:farl-micro", "timm"])
def test_every_parameter_is_used(init: str, images: torch.Tensor, timm_file: str) -> None:
    backbone = load_backbone(timm_file if init == "timm" else init, resolution=32, blocks=(0,))
    backbone(images).maps[0].square().mean().backward()
    assert [name for name, parameter in backbone.named_parameters() if parameter.grad is None] == []
    dropped = ("ln_post", "visual.proj", "text_projection", "token_embedding", "blocks.1.", "lm_", "head.", "fc_norm")
    assert not [name for name in backbone.state_dict() if any(part in name for part in dropped)]


@pytest.mark.parametrize("init", ["scratch:farl-tiny", "timm"])
def test_layer_wise_learning_rates(init: str, timm_file: str) -> None:
    backbone = load_backbone(timm_file if init == "timm" else init, resolution=32, blocks=(0, 2))
    groups = backbone.parameter_groups(1e-3, 0.5)
    assert [(group["name"], group["lr"]) for group in groups] == [
        ("embeddings", 1e-3 / 8),
        ("block 0", 1e-3 / 4),
        ("block 1", 1e-3 / 2),
        ("block 2", 1e-3),
    ]
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(listed) == sorted(id(parameter) for parameter in backbone.parameters())
    backbone.freeze()
    assert backbone.parameter_groups(1e-3) == []


@pytest.mark.parametrize("init", ["scratch:farl-micro", "timm"])
def test_recomputed_activations_change_nothing(init: str, images: torch.Tensor, timm_file: str) -> None:
    backbone = load_backbone(timm_file if init == "timm" else init, resolution=32)
    gradients = []
    for value in (False, True):
        backbone.recompute_activations(value)
        backbone.zero_grad()
        sum(grid.square().sum() for grid in backbone(images).maps).backward()
        gradients.append([parameter.grad.clone() for parameter in backbone.parameters()])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("init", ["scratch:farl-micro", "timm"])
def test_restored_from_its_description(init: str, images: torch.Tensor, timm_file: str) -> None:
    backbone = load_backbone(timm_file if init == "timm" else init, resolution=48, blocks=(1, 1, 0)).eval()
    restored = restore_backbone(backbone.about()).eval()
    restored.load_state_dict(backbone.state_dict())
    assert restored.about() == backbone.about()
    assert all(map(torch.equal, restored(images).maps, backbone(images).maps))


@pytest.mark.parametrize(
    ("depth", "blocks"),
    [(12, (3, 5, 7, 11)), (24, (7, 11, 15, 23)), (32, (8, 14, 20, 31)), (6, (1, 2, 4, 5)), (2, (0, 0, 1, 1))],
)
def test_default_blocks(depth: int, blocks: tuple[int, ...]) -> None:
    assert default_blocks(depth) == blocks


class TestTimm:
    def test_features_at_its_own_size(self, timm_file: str) -> None:
        import timm

        model = timm.create_model(TIMM).eval()
        model.load_state_dict(torch.load(timm_file.split(":", 2)[2]))
        backbone = load_backbone(timm_file, resolution=160, blocks=(5, 1)).eval()
        images = torch.rand(1, 3, 160, 160)
        mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
        wanted = model.forward_intermediates(
            (images - mean) / std, indices=[1, 5], return_prefix_tokens=True, intermediates_only=True
        )
        features = backbone(images)
        for place, (grid, prefix) in ((1, wanted[0]), (0, wanted[1])):
            torch.testing.assert_close(features.maps[place], grid, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(features.class_tokens[place], prefix[:, 0], rtol=1e-4, atol=1e-5)

    def test_position_embedding(self, timm_file: str) -> None:
        position = torch.load(timm_file.split(":", 2)[2])["pos_embed"]
        found = load_backbone(timm_file, resolution=80).trunk.model.pos_embed
        grid = position[:, 1:].reshape(1, 10, 10, 64).permute(0, 3, 1, 2)
        wanted = F.interpolate(grid, (5, 5), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
        torch.testing.assert_close(found[:, 1:], wanted)
        assert torch.equal(found[:, :1], position[:, :1])

    def test_wrapped_weights(self, timm_file: str, tmp_path: Path) -> None:
        weights = torch.load(timm_file.split(":", 2)[2])
        torch.save({"state_dict": {"module." + name: value for name, value in weights.items()}}, tmp_path / "w.pt")
        one = load_backbone(timm_file, resolution=32).state_dict()
        other = load_backbone(f"timm:{TIMM}:{tmp_path / 'w.pt'}", resolution=32).state_dict()
        assert all(torch.equal(one[name], other[name]) for name in one)

    def test_without_class_token_the_mean_over_patches(self) -> None:
        about = {"kind": "timm", "init": "", "name": "test_vit3", "resolution": 32, "blocks": [0]}
        features = restore_backbone(about)(torch.rand(1, 3, 32, 32))
        torch.testing.assert_close(features.class_tokens[0], features.maps[0].mean((2, 3)))


@pytest.mark.parametrize(
    ("init", "options", "message"),
    [
        ("scratch:farl-micro", {"resolution": 33}, "resolution is 33: it must be a multiple of the patch size 8"),
        ("scratch:farl-micro", {"resolution": 32, "blocks": (2,)}, r"blocks \[2\] must lie in 0..1"),
        ("scratch:farl-b17", {"resolution": 32}, "there is no model 'farl-b17'; use one of farl-micro"),
        ("timm:resnet18:x.pt", {"resolution": 32}, "no such file"),
        ("timm:no_such_model", {"resolution": 32}, "timm cannot make 'no_such_model'"),
    ],
)
def test_errors(init: str, options: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        load_backbone(init, **options)


def test_weights_of_another_architecture(tmp_path: Path) -> None:
    torch.save({"pos_embed": torch.zeros(1, 17, 3)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"does not fit: missing cls_token.*of the wrong shape pos_embed"):
        load_backbone(f"timm:{TIMM}:{tmp_path / 'w.pt'}", resolution=32)
    with pytest.raises(ValueError, match="resnet18 is not a plain vision transformer"):
        load_backbone(f"timm:resnet18:{tmp_path / 'w.pt'}", resolution=32)


def test_can_be_exported(images: torch.Tensor) -> None:
    backbone: Backbone = load_backbone("scratch:farl-micro", resolution=32).eval()
    exported = torch.export.export(backbone, (images,)).module()
    torch.testing.assert_close(list(exported(images)), list(backbone(images)))


@pytest.fixture(scope="module")
def timm_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """ "timm:NAME:FILE" of random weights."""
    import timm

    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("timm") / "weights.pt"
    torch.save(timm.create_model(TIMM).state_dict(), path)
    return f"timm:{TIMM}:{path}"
