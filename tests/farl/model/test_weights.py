from __future__ import annotations

import logging
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from farl.model import MODELS, FaRL, load_pretrained, resize_position_embedding
from farl.model.weights import MIM_KEYS

HEADS = {"vision_heads": 2, "text_heads": 4}


@pytest.fixture
def weights(make_model):
    return make_model(dtype=torch.float32).state_dict()


def assert_equal_weights(model, weights):
    loaded = model.state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_files_of_weights(tmp_path, weights, config, suffix):
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(weights, path)
    else:
        torch.save(weights, path)
    model = load_pretrained(path, **HEADS)
    assert model.config == config
    assert not model.training
    assert_equal_weights(model, weights)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", None])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", ""])
def test_wrapped_and_prefixed(weights, wrapper, prefix):
    content = {prefix + name: value for name, value in weights.items()}
    model = load_pretrained({wrapper: content, "epoch": 3} if wrapper else content, **HEADS)
    assert_equal_weights(model, weights)


def test_loaded_weights_are_copies_in_float32(weights):
    half = {name: value.half() for name, value in weights.items()}
    model = load_pretrained(half, **HEADS)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert torch.equal(model.visual.proj, half["visual.proj"].float())
    model = load_pretrained(weights, **HEADS)
    with torch.no_grad():
        model.visual.proj.zero_()
    assert weights["visual.proj"].any()


def test_training_checkpoints_say_their_configuration(tmp_path, make_model, config, caplog):
    changed = {"activation": "gelu", "layer_norm_cast": "after"}
    model = make_model(dtype=torch.float32, **changed)
    state = {"step": 7, "model": model.state_dict(), "model_config": model.config.to_dict(), "optimizer": {"state": {}}}
    (tmp_path / "checkpoints").mkdir()
    torch.save(state, tmp_path / "checkpoints" / "step-00000007.pt")
    with caplog.at_level(logging.INFO):
        for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "step-00000007.pt"):
            loaded = load_pretrained(path)
            assert loaded.config == replace(config, **changed)
            assert_equal_weights(loaded, model.state_dict())
    assert not caplog.records
    assert load_pretrained(tmp_path, activation="quick_gelu").config.activation == "quick_gelu"
    assert load_pretrained(tmp_path, ignore=MIM_KEYS).config.mim is None


def test_assumed_activation_is_logged(weights, caplog):
    with caplog.at_level(logging.INFO):
        assert load_pretrained(weights, **HEADS).config.activation == "quick_gelu"
    assert "QuickGELU assumed" in caplog.text
    caplog.clear()
    assert load_pretrained(weights, activation="gelu", **HEADS).config.activation == "gelu"
    assert not caplog.records


def test_layer_norm_convention_follows_the_layout(weights):
    assert load_pretrained(weights, **HEADS).config.layer_norm_cast == "before"
    clip = load_pretrained(weights, ignore=MIM_KEYS, **HEADS).config
    assert clip.layer_norm_cast == "after" and clip.mim is None


def test_heads_are_sixty_four_wide_by_default():
    config = replace(MODELS["farl-tiny"], text=replace(MODELS["farl-tiny"].text, vocab_size=9, layers=1))
    loaded = load_pretrained(FaRL(config).state_dict())
    assert loaded.config == config


@pytest.mark.parametrize("name", MODELS)
def test_named_models_have_their_heads_whatever_the_file_says(name):
    """H/14 has heads of 80, farl-micro of 16: features of other heads would be wrong without an error."""
    sizes = MODELS[name]
    config = replace(
        sizes,
        vision=replace(sizes.vision, layers=1),
        text=replace(sizes.text, layers=1, vocab_size=9, context_length=5),
        mim=None,
        layer_norm_cast="after",
    )
    assert load_pretrained(FaRL(config).state_dict()).config == config


def test_constants_of_openai_files_are_no_weights(weights):
    constants = {"input_resolution": torch.tensor(24), "context_length": 11, "vocab_size": torch.tensor(50)}
    assert_equal_weights(load_pretrained(weights | constants, **HEADS), weights)


def test_all_misfits_are_in_one_message(weights):
    del weights["visual.ln_post.bias"], weights["transformer.resblocks.1.ln_2.weight"]
    weights |= {"visual.extra": torch.zeros(1), "ln_final.weight": torch.zeros(5), "logit_bias": torch.zeros(())}
    with pytest.raises(ValueError) as error:
        load_pretrained(weights, **HEADS)
    message = str(error.value)
    assert "\n" not in message
    for part in (
        "missing transformer.resblocks.1.ln_2.weight, visual.ln_post.bias",
        "unexpected visual.extra, logit_bias",
        "of the wrong shape ln_final.weight [5] instead of [16]",
    ):
        assert part in message


def test_ignored_entries(weights):
    extra = weights | {"visual.extra": torch.zeros(1), "logit_bias": torch.zeros(())}
    assert_equal_weights(load_pretrained(extra, ignore=("visual.extra", "logit_b*"), **HEADS), weights)
    with pytest.raises(ValueError, match="unexpected logit_bias"):
        load_pretrained(extra, ignore=("visual.extra",), **HEADS)


def test_a_partial_masked_branch_is_refused(weights):
    del weights["visual.lm_head.bias"]
    with pytest.raises(ValueError, match=r"missing visual\.lm_head\.bias"):
        load_pretrained(weights, **HEADS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual.proj": None}, r"not in CLIP's or FaRL's layout: missing visual\.proj"),
        ({"visual.positional_embedding": torch.zeros(9, 16)}, "9 rows, which is not 1"),
        ({"visual.proj": torch.zeros(3)}, r"visual\.proj has shape \[3\]"),
        ({"visual.proj": "text"}, "not a dict of weights: visual.proj"),
    ],
)
def test_other_layouts_are_refused(weights, change, message):
    changed = {name: value for name, value in (weights | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        load_pretrained(changed, **HEADS)


def test_narrow_towers_need_their_heads(weights):
    with pytest.raises(ValueError, match="width 16 is not a multiple of 64: give vision_heads"):
        load_pretrained(weights)


def test_files_that_are_no_weights(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated, OpenAI's files are not
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    (tmp_path / "page.pt").write_text("<html></html>")
    (tmp_path / "page.safetensors").write_text("<html></html>")
    (tmp_path / "empty").mkdir()
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"state_dict": {}}, tmp_path / "bare.pt")
    for name, message in (
        ("script.pt", "TorchScript archive"),
        ("page.pt", "cannot be read as weights"),
        ("page.safetensors", "not a safetensors file"),
        ("empty", "folder without checkpoints"),
        ("list.pt", "holds a list"),
        ("bare.pt", "it is empty"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            load_pretrained(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError):
        load_pretrained(tmp_path / "absent.pt")


def test_code_in_a_file_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    torch.save({"state_dict": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load_pretrained(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_position_embedding_resize():
    position = torch.randn(1 + 3 * 4, 5, dtype=torch.float64)
    assert resize_position_embedding(position, (3, 4), (3, 4)) is position
    resized = resize_position_embedding(position, (3, 4), (6, 8))
    assert torch.equal(resized[0], position[0])
    grid = position[1:].view(3, 4, 5).permute(2, 0, 1)[None]
    wanted = F.interpolate(grid, (6, 8), mode="bicubic", align_corners=False)[0].permute(1, 2, 0).reshape(48, 5)
    assert torch.equal(resized[1:], wanted)
    # A constant grid stays constant, whatever the factor.
    ones = torch.ones(10, 5)
    assert torch.allclose(resize_position_embedding(ones, (3, 3), (7, 2)), torch.ones(15, 5))
    with pytest.raises(ValueError, match=r"\[1 \+ 3\*3, C\]"):
        resize_position_embedding(position, (3, 3), (6, 6))
