"""Masks, attention implementations and recorded outputs of transformers' CLIP and ViT."""

from __future__ import annotations

import pytest
import torch

from farl_kernels.integrations import transformers_modules


@pytest.fixture
def pytorch_calls(monkeypatch):
    """Counts the attentions that ran PyTorch's function instead of ours."""
    calls = []

    def recorded(*args, **options):
        calls.append(args)
        return original(*args, **options)

    from transformers.integrations import sdpa_attention

    original = sdpa_attention.sdpa_attention_forward
    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", recorded)
    return calls


def _padded(subject, side="right"):
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, 11:] = 0
    mask[1, 10:] = 0
    subject.inputs["attention_mask"] = mask.flip(1) if side == "left" else mask
    return subject


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_is_fused(side, of_library, check_equal, pytorch_calls) -> None:
    subject = _padded(of_library("transformers", "CLIP"), side)
    truth = subject.run(subject.model)
    subject.accelerate(subject.model)
    check_equal(subject.run(subject.model), truth)
    assert pytorch_calls == []


def test_padding_is_not_read(of_library) -> None:
    """The mask of "sdpa" asks whether there is padding; ours works on tensors without values."""
    subject = _padded(of_library("transformers", "CLIP"))
    subject.accelerate(subject.model)
    with torch.device("meta"):
        mask = transformers_modules.mask(2, 20, 20, attention_mask=torch.ones(2, 20))
    assert mask is not None and mask.shape == (2, 20) and mask.dtype == torch.bool


def test_masks_of_the_caller(of_library, check_equal, pytorch_calls) -> None:
    subject = of_library("transformers", "CLIP")
    subject.inputs["attention_mask"] = (torch.rand(2, 1, 20, 20) < 0.5) | torch.eye(20, dtype=torch.bool)
    truth = subject.run(subject.model)
    subject.accelerate(subject.model)
    check_equal(subject.run(subject.model), truth)
    assert len(pytorch_calls) == 2


@pytest.mark.parametrize("kind", ["CLIP", "ViT"])
def test_eager_is_left(kind, of_library, check_equal) -> None:
    """It returns attention weights, also of an accelerated model."""
    subject = of_library("transformers", kind, attention="eager")
    truth = subject.run(subject.model)
    report = subject.accelerate(subject.model)
    left = [x for x in report.left if "eager" in x.reason]
    assert len(left) == (4 if kind == "CLIP" else 2) and len(report.left) == len(left)
    check_equal(subject.run(subject.model), truth)
    pixels = subject.inputs["pixel_values"].double()
    tower = subject.model.vision_model if kind == "CLIP" else subject.model
    assert tower(pixels, output_attentions=True).attentions[0].shape == (2, 3, 5, 5)


def test_attention_dropout_is_left(of_library, check_equal) -> None:
    subject = of_library("transformers", "CLIP", attention_dropout=0.2)
    truth = subject.run(subject.model.train())
    report = subject.accelerate(subject.model)
    assert {x.reason for x in report.left} == {"attention dropout > 0"}
    check_equal(subject.run(subject.model), truth)


def test_attention_dropout_set_later_counts(of_library, check_equal, pytorch_calls) -> None:
    subject = of_library("transformers", "CLIP")
    attentions = [module for module in subject.model.modules() if hasattr(module, "is_causal")]
    for module in attentions:
        module.dropout = 0.3
    truth = subject.run(_padded(subject).model.train())
    for module in attentions:
        module.dropout = 0.0
    subject.accelerate(subject.model)
    for module in attentions:
        module.dropout = 0.3
    check_equal(subject.run(subject.model), truth)
    assert len(pytorch_calls) == 4


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ViT", {"hidden_dropout_prob": 0.3, "qkv_bias": False}),
        ("ViT", {"hidden_act": "gelu_new"}),
        ("CLIP", {"hidden_act": "gelu"}),
        ("ViT", {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-3}),
    ],
    ids=str,
)
def test_options(kind, options, of_library, check_equal) -> None:
    subject = of_library("transformers", kind, **options)
    truth = subject.run(subject.model.train())
    report = subject.accelerate(subject.model)
    assert bool(report.left) == ("gelu_new" in str(options)), report
    check_equal(subject.run(subject.model), truth)


def test_hidden_states_are_recorded(of_library) -> None:
    subject = of_library("transformers", "ViT")
    pixels = subject.inputs["pixel_values"].double()
    want = subject.model(pixels, output_hidden_states=True).hidden_states
    subject.accelerate(subject.model)
    got = subject.model(pixels, output_hidden_states=True).hidden_states
    assert len(got) == len(want) == 3
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(got, want, strict=True))


def test_checkpointing(of_library, check_equal) -> None:
    subject = of_library("transformers", "ViT", hidden_dropout_prob=0.3)
    truth = subject.run(subject.model.train())
    subject.accelerate(subject.model)
    subject.model.gradient_checkpointing_enable()
    check_equal(subject.run(subject.model), truth)


def test_saved_models_are_plain(of_library, tmp_path) -> None:
    """A saved model loads where these ops are not installed."""
    import transformers

    subject = of_library("transformers", "CLIP")
    want = subject.run(subject.model)[0]
    subject.accelerate(subject.model)
    subject.model.save_pretrained(tmp_path)
    assert "farl" not in (tmp_path / "config.json").read_text()
    loaded = transformers.CLIPModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(subject.run(loaded.train())[0], want)


def test_a_model_that_holds_one(of_library, check_equal) -> None:
    """Only the CLIP inside is set; undoing gives "sdpa" back."""
    subject = of_library("transformers", "CLIP")
    holder = torch.nn.ModuleDict({"clip": subject.model})
    report = subject.accelerate(holder)
    assert subject.model.vision_model.config._attn_implementation == transformers_modules.NAME
    assert report.undo() == len(report.replaced)
    assert subject.model.vision_model.config._attn_implementation == "sdpa"
    assert subject.model.config._attn_implementation == "sdpa"


def test_other_models_keep_their_attention() -> None:
    import transformers

    from farl_kernels.integrations.transformers import accelerate

    config = transformers.Dinov2Config(hidden_size=48, num_attention_heads=3, num_hidden_layers=2, image_size=28)
    model = transformers.Dinov2Model(config).double()
    x = torch.randn(1, 3, 28, 28, dtype=torch.float64)
    want = model(x).last_hidden_state
    report = accelerate(model)
    assert any("not known here" in x.reason for x in report.left) and report.replaced
    assert torch.allclose(model(x).last_hidden_state, want, rtol=1e-12)
