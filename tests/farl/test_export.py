"""Exports give the same features after loading in the libraries that they are for."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from farl.export import export_model, export_state_dict
from farl.export.__main__ import main
from farl.model import FaRL, MimConfig, ModelConfig, PackedText, TextConfig, VisionConfig, load_pretrained

CONFIG = ModelConfig(
    embed_dim=24,
    vision=VisionConfig(image_size=32, patch_size=8, width=32, layers=2, heads=4, mlp_ratio=3.0),
    text=TextConfig(width=48, layers=3, heads=3, context_length=13, vocab_size=60),
    mim=MimConfig(layers=1, vocab_size=20),
)
HEADS = {"vision_heads": 4, "text_heads": 3}
TOLERANCE = 1e-5


@pytest.fixture(params=["quick_gelu", "gelu"])
def model(request) -> FaRL:
    torch.manual_seed(0)
    model = FaRL(replace(CONFIG, activation=request.param)).eval()
    # Initial biases of zero would hide a lost one.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images(size: int) -> torch.Tensor:
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))


def captions(vocab_size: int, length: int) -> torch.Tensor:
    """Padded with zeros; of all lengths from 2 to the longest."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, vocab_size - 2, (4, length), generator=generator)
    for row, end in enumerate((1, 4, length // 2, length - 1)):
        ids[row, end] = vocab_size - 1
        ids[row, end + 1 :] = 0
    return ids


def assert_close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert got.shape == wanted.shape
    assert wanted.std() > 0.05, "features without variation test nothing"
    assert (got - wanted).abs().max() <= TOLERANCE


@torch.no_grad()
def test_open_clip(model, tmp_path):
    import open_clip

    export_model(model, tmp_path / "out", "open-clip")
    other = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    pixels, ids = images(32), captions(60, 13)
    assert_close(other.encode_image(pixels), model.encode_image(pixels))
    assert_close(other.encode_text(ids), model.encode_text(ids))
    assert torch.equal(other.logit_scale, model.logit_scale)


@torch.no_grad()
def test_timm(model, tmp_path):
    import timm

    export_model(model, tmp_path / "out", "timm")
    other = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    other.load_state_dict(export_state_dict(model, "timm"), strict=True)
    pixels = images(32)
    assert_close(other(pixels), model.encode_image(pixels))
    grid = other.forward_intermediates(pixels, indices=[0], intermediates_only=True)[0]
    assert_close(grid, model.visual_features(pixels, [0])[0])


@torch.no_grad()
def test_transformers(model, tmp_path):
    from transformers import CLIPImageProcessor, CLIPModel

    export_model(model, tmp_path / "out", "transformers")
    other, report = CLIPModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    other.eval()
    pixels, ids = images(32), captions(60, 13)
    pooled = other.vision_model(pixel_values=pixels).pooler_output
    assert_close(other.visual_projection(pooled), model.encode_image(pixels))
    assert_close(other.text_projection(other.text_model(input_ids=ids).pooler_output), model.encode_text(ids))
    assert torch.equal(other.logit_scale, model.logit_scale)
    processor = CLIPImageProcessor.from_pretrained(tmp_path / "out")
    photo = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8)
    processed = processor(list(photo.numpy()), return_tensors="pt")["pixel_values"]
    assert_close(model.encode_image(processed), model.encode_image(photo))


@pytest.mark.parametrize("name", ["out.pt", "out.safetensors"])
def test_openai_layout_round_trips_with_the_masked_branch(model, tmp_path, name):
    export_model(model, tmp_path / name, "openai-clip")
    again = load_pretrained(tmp_path / name, activation=model.config.activation, **HEADS)
    assert again.config == model.config
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())


@pytest.mark.parametrize("drop_mim", [False, True])
def test_a_safetensors_file_says_its_sizes_and_activation(model, tmp_path, drop_mim, caplog):
    export_model(model, tmp_path / "out.safetensors", "openai-clip", drop_mim=drop_mim)
    again = load_pretrained(tmp_path / "out.safetensors")
    assert again.config == replace(model.config, mim=None if drop_mim else model.config.mim)
    assert not caplog.records


@torch.no_grad()
def test_openai_layout_without_the_masked_branch(model, tmp_path):
    export_model(model, tmp_path / "out.pt", "openai-clip", drop_mim=True)
    names = torch.load(tmp_path / "out.pt", weights_only=True).keys()
    assert names == export_state_dict(model, "open-clip").keys()
    assert not [name for name in names if "lm_" in name or "mask_token" in name]
    again = load_pretrained(tmp_path / "out.pt", activation=model.config.activation, **HEADS)
    assert again.config.mim is None
    pixels, ids = images(32), captions(60, 13)
    assert_close(again.encode_image(pixels), model.encode_image(pixels))
    assert_close(again.encode_text(ids), model.encode_text(ids))


@torch.no_grad()
def test_made_farl_file_loads_and_round_trips(tmp_path):
    """A file as released: half or full precision under "state_dict", names written out here by hand."""
    generator = torch.Generator().manual_seed(3)
    block = {
        "attn.in_proj_weight": (192, 64),
        "attn.in_proj_bias": (192,),
        "attn.out_proj.weight": (64, 64),
        "attn.out_proj.bias": (64,),
        "ln_1.weight": (64,),
        "ln_1.bias": (64,),
        "mlp.c_fc.weight": (256, 64),
        "mlp.c_fc.bias": (256,),
        "mlp.c_proj.weight": (64, 256),
        "mlp.c_proj.bias": (64,),
        "ln_2.weight": (64,),
        "ln_2.bias": (64,),
    }
    shapes = {
        "visual.class_embedding": (64,),
        "visual.positional_embedding": (17, 64),
        "visual.proj": (64, 24),
        "visual.conv1.weight": (64, 3, 8, 8),
        "visual.mask_token": (64,),
        "visual.lm_head.weight": (20, 64),
        "visual.lm_head.bias": (20,),
        "positional_embedding": (13, 64),
        "text_projection": (64, 24),
        "token_embedding.weight": (60, 64),
        "logit_scale": (),
    }
    for norm in ("visual.ln_pre", "visual.ln_post", "visual.ln_lm", "ln_final"):
        shapes |= {f"{norm}.weight": (64,), f"{norm}.bias": (64,)}
    stacks = {"visual.transformer": 2, "visual.lm_transformer": 1, "transformer": 2}
    for stack, layers in stacks.items():
        for layer in range(layers):
            shapes |= {f"{stack}.resblocks.{layer}.{name}": shape for name, shape in block.items()}
    weights = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
    torch.save({"state_dict": weights, "epoch": 16}, tmp_path / "farl.pth")

    model = load_pretrained(tmp_path / "farl.pth")
    assert model.config.layer_norm_cast == "before" and model.config.mim == MimConfig(1, 20)
    assert model.config.vision == VisionConfig(32, 8, 64, 2, 1) and model.config.text.vocab_size == 60
    exported = export_state_dict(model, "openai-clip")
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[name], weights[name]) for name in weights)


@torch.no_grad()
def test_open_clip_vit_b_16_loads_strictly_with_equal_features():
    import open_clip

    torch.manual_seed(0)
    other = open_clip.create_model("ViT-B-16-quickgelu", pretrained=None).eval()
    model = load_pretrained(other.state_dict())
    assert model.config.mim is None and model.config.layer_norm_cast == "after"
    pixels, ids = images(224)[:2], captions(49_408, 77)
    assert_close(model.encode_image(pixels), other.encode_image(pixels))
    wanted = other.encode_text(ids)
    assert_close(model.encode_text(ids), wanted)
    assert_close(model.encode_text_packed(PackedText.from_padded(ids)), wanted)


def test_command(model, tmp_path, capsys):
    torch.save({"model": model.state_dict(), "model_config": model.config.to_dict()}, tmp_path / "step.pt")
    assert not main([str(tmp_path / "step.pt"), str(tmp_path / "out"), "--format", "transformers"])
    written = capsys.readouterr().out.split()
    assert str(tmp_path / "out" / "model.safetensors") in written
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vision_config"]["num_attention_heads"] == 4
    assert not list((tmp_path / "out").glob(".*"))


def test_wrong_commands_end_in_one_line(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    (tmp_path / "file").touch()

    def run(*words: str) -> tuple[int, str]:
        done = subprocess.run([sys.executable, "-m", "farl.export", *words], capture_output=True, text=True)
        return done.returncode, done.stderr.strip()

    code, said = run(str(tmp_path / "other.pt"), str(tmp_path / "out"), "--format", "timm")
    assert code == 1 and "\n" not in said and "not in CLIP's or FaRL's layout" in said
    code, said = run(str(tmp_path / "other.pt"), str(tmp_path / "out"), "--format", "onnx")
    assert code == 2 and "\n" not in said and "onnx" in said


def test_outputs_that_cannot_be_written_are_named(model, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; timm needs a folder"):
        export_model(model, tmp_path / "file", "timm")
    with pytest.raises(ValueError, match=r"ends in \.pt, \.pth or \.safetensors"):
        export_model(model, tmp_path / "folder", "openai-clip")
    with pytest.raises(ValueError, match="format must be one of"):
        export_state_dict(model, "onnx")
