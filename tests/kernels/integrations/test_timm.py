"""Variants of timm's blocks: what is preserved, and what is left with which reason."""

from __future__ import annotations

import pytest
import torch


def _vit(of_library, **options):
    return of_library("timm", "vit_base_patch16_224", **options)


@pytest.mark.parametrize(
    "options",
    [
        {"qk_norm": True},
        {"scale_attn_norm": True, "scale_mlp_norm": True},
        {"init_values": 0.3},
        {"init_values": 0.3, "drop_path_rate": 0.5},
        {"proj_drop_rate": 0.4},
        {"qkv_bias": False, "proj_bias": False},
        {"pre_norm": True, "reg_tokens": 4, "class_token": True},
        {"act_layer": "quick_gelu"},
    ],
    ids=str,
)
def test_options_of_vit(options, of_library, check_equal) -> None:
    subject = _vit(of_library, **options)
    truth = subject.run(subject.model.train())
    report = subject.accelerate(subject.model)
    assert not report.left
    check_equal(subject.run(subject.model), truth)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("eva02_base_patch14_224", {}),
        ("eva_large_patch14_196", {"init_values": 0.2}),
        ("vit_base_patch16_rope_224", {}),
        ("vit_base_patch16_rope_mixed_224", {}),
        ("vit_small_patch16_dinov3", {"drop_path_rate": 0.5}),
        ("vit_base_patch16_224", {"dynamic_img_size": True}),
        ("deit3_small_patch16_224", {}),
    ],
)
def test_other_models(name, options, of_library, check_equal) -> None:
    """Models that were not written for: what is replaced is equal, what is not is left."""
    subject = of_library("timm", name, **options)
    truth = subject.run(subject.model.train())
    report = subject.accelerate(subject.model)
    assert any("masked_attention" in x.ops for x in report.replaced), report
    assert any("residual add" in x.ops for x in report.replaced), report
    check_equal(subject.run(subject.model), truth)


@pytest.mark.parametrize("mask", ["causal", "bool"])
def test_masks_of_the_caller(mask, of_library, check_equal) -> None:
    """`is_causal` is fused; a mask runs the original attention."""
    subject = _vit(of_library)
    allowed = torch.rand(5, 5).lt(0.5) | torch.eye(5, dtype=torch.bool)
    options = {"is_causal": True} if mask == "causal" else {"attn_mask": allowed}
    subject.model.forward = lambda x: type(subject.model).forward_features(subject.model, x, **options)
    plain = subject.model.forward_features(subject.inputs["x"].double())
    truth = subject.run(subject.model)
    assert not torch.allclose(truth[0], plain.flatten(), rtol=1e-3)
    subject.accelerate(subject.model)
    check_equal(subject.run(subject.model), truth)


def test_attention_dropout_is_left(of_library) -> None:
    subject = _vit(of_library, attn_drop_rate=0.1)
    truth = subject.run(subject.model.train())
    report = subject.accelerate(subject.model)
    assert [x.reason for x in report.left] == ["attention dropout > 0"] * 2
    assert (subject.run(subject.model)[0] - truth[0]).abs().max() <= 1e-12 * truth[0].abs().max()


def test_attention_dropout_set_later_counts(of_library) -> None:
    subject = _vit(of_library)
    subject.accelerate(subject.model.train())
    subject.model.blocks[0].attn.attn_drop.p = 0.5
    got = subject.run(subject.model)[0]
    subject.model.blocks[0].attn.attn_drop.p = 0.0
    assert not torch.allclose(got, subject.run(subject.model)[0])


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("beit_base_patch16_224", "Attention", "relative position bias"),
        ("vit_relpos_base_patch16_224", "RelPosAttention", "not known here"),
        ("vit_base_patch16_siglip_224", "AttentionPoolLatent", "not known here"),
        ("vit_small_patch16_18x2_224", "ParallelThingsBlock", "side by side"),
        ("vit_base_patch16_224", "PatchDropout", "on the device already"),
        ("vit_base_patch16_siglip_gap_224", "GELUTanh", "tanh"),
        ("samvit_base_patch16_224", "Attention", "not known here"),
    ],
)
def test_left_with_the_reason(name, kind, reason) -> None:
    import timm

    from farl_kernels.integrations.timm import accelerate

    options = {"patch_drop_rate": 0.5} if kind == "PatchDropout" else {}
    if kind == "GELUTanh":
        options["act_layer"] = "gelu_tanh"
    with torch.device("meta"):
        model = timm.create_model(name, depth=2, **options)
    report = accelerate(model)
    assert any(x.kind == kind and reason in x.reason for x in report.left), report
    assert reason in str(report)


def test_checkpointing(of_library, check_equal) -> None:
    subject = _vit(of_library, drop_path_rate=0.5)
    truth = subject.run(subject.model.train())
    subject.accelerate(subject.model)
    subject.model.set_grad_checkpointing()
    check_equal(subject.run(subject.model), truth)


@pytest.mark.parametrize("kind", ["Attention", "AttentionRope", "EvaAttention"])
def test_gated_attention(kind) -> None:
    import timm

    from farl_kernels.integrations.timm import accelerate

    torch.manual_seed(0)
    cls = timm.models.eva.EvaAttention if kind == "EvaAttention" else getattr(timm.layers, kind)
    options = {"scale_norm": False} if kind == "EvaAttention" else {}
    attention = cls(48, num_heads=3, gated=True, **options).double()
    x = torch.randn(2, 5, 48, dtype=torch.float64)
    want = attention(x)
    assert accelerate(attention).replaced
    assert torch.allclose(attention(x), want, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_layer_norm_rounds_once(dtype, autocast) -> None:
    """The affine part is applied in float32, as PyTorch does; dtypes are the original's under autocast too."""
    import timm

    from farl_kernels.integrations.timm import accelerate

    torch.manual_seed(0)
    norm = timm.layers.LayerNorm(64)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    x = torch.randn(200, 64).to(dtype)
    truth = torch.nn.functional.layer_norm(x.double(), (64,), norm.weight.double(), norm.bias.double(), norm.eps)
    norm = norm if autocast else norm.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        want = norm(x)
        accelerate(norm)
        got = norm(x)
    assert got.dtype == want.dtype
    assert (got - truth).norm() <= 1.05 * (want - truth).norm()
