from __future__ import annotations

import copy

import pytest
import torch

import farl
from farl.model import MODELS, FaRL, ModelConfig, PackedText


def step(model, pairs):
    model.zero_grad(set_to_none=True)
    output = model(pairs.images, pairs.text, mask=pairs.mask, masked_positions=pairs.positions, targets=pairs.targets)
    features = torch.cat([output.image_features, output.text_features]).float()
    (features.square().sum() * output.logit_scale + output.mim_loss_sum).backward()
    return output, {name: parameter.grad for name, parameter in model.named_parameters()}


def test_every_parameter_takes_part_in_a_step(make_model, pairs):
    _, gradients = step(make_model(dtype=torch.float32), pairs)
    assert [name for name, gradient in gradients.items() if gradient is None] == []


def test_the_masked_branch_alone_is_that_of_the_joint_pass(make_model, pairs):
    model = make_model()
    branch = {"mask": pairs.mask, "masked_positions": pairs.positions}
    both, alone = (model(pairs.images, text, **branch).mim_hidden for text in (pairs.text, None))
    assert torch.allclose(both, alone, atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="neither captions nor a mask"):
        model(pairs.images, None)


def test_two_runs_are_equal_to_the_last_bit(make_model, pairs):
    model = make_model(dtype=torch.float32)
    (first, before), (second, after) = step(model, pairs), step(model, pairs)
    assert torch.equal(first.image_features, second.image_features)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_recomputed_activations_change_nothing(make_model, pairs):
    kept = make_model(dtype=torch.float32)
    recomputed = copy.deepcopy(kept)
    recomputed.checkpoint_activations = True
    assert recomputed.checkpoint_activations and not kept.checkpoint_activations
    calls = []
    recomputed.visual.transformer.block(0).register_forward_pre_hook(lambda *_: calls.append(1))
    (first, before), (second, after) = step(kept, pairs), step(recomputed, pairs)
    assert len(calls) == 2
    assert torch.equal(first.mim_loss_sum, second.mim_loss_sum)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_bfloat16_autocast_is_close_and_leaves_gradients_in_float32(make_model, pairs):
    model = make_model(dtype=torch.float32)
    wanted, wanted_gradients = step(model, pairs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, gradients = step(model, pairs)
    assert got.image_features.dtype == got.text_features.dtype == torch.bfloat16
    for name in ("image_features", "text_features", "mim_loss_sum"):
        error = (getattr(wanted, name) - getattr(got, name).float()).norm() / getattr(wanted, name).norm()
        assert error < 0.03, name
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        if wanted_gradients[name].norm() > 1e-3:
            assert (gradient - wanted_gradients[name]).norm() / wanted_gradients[name].norm() < 0.2, name


def test_a_fully_masked_and_an_unmasked_image(make_model, pairs):
    model = make_model(dtype=torch.float32)
    pairs.mask[0], pairs.mask[1] = True, False
    pairs.positions = torch.full((3, 9), -1, dtype=torch.int32)
    pairs.positions[0] = torch.arange(9)
    pairs.targets = torch.full((3, 9), -1).masked_fill(pairs.positions >= 0, 3)
    output, gradients = step(model, pairs)
    assert int(output.mim_count) == 9
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_visual_features_are_the_outputs_of_the_blocks(make_model, pairs):
    model = make_model()
    deep, shallow = model.visual_features(pairs.images, [2, 0])
    assert deep.shape == shallow.shape == (3, 16, 3, 3)
    outputs = []
    for index in range(3):
        model.visual.transformer.block(index).register_forward_hook(lambda *call: outputs.append(call[-1].value()))
    model.visual_features(pairs.images, [2])
    assert torch.allclose(deep[1, :, 1, 2], outputs[2][1, 1 + 1 * 3 + 2])
    assert torch.allclose(shallow[0, :, 2, 0], outputs[0][0, 1 + 2 * 3])
    # The class token of the last block is what the image features are made of.
    pooled = model.visual.ln_post(type(model.visual.embed(pairs.images))(outputs[2][:, 0]))[0] @ model.visual.proj
    assert torch.allclose(pooled, model.encode_image(pairs.images))


def test_visual_features_at_another_size(make_model):
    model = make_model()
    images = torch.randn(2, 3, 40, 56, dtype=torch.float64)
    (features,) = model.visual_features(images, [1])
    assert features.shape == (2, 16, 5, 7)
    features.sum().backward()
    assert model.visual.positional_embedding.grad is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(3, 32, 24, 3, dtype=torch.uint8)}, "32 x 24 pixels: the model takes 24 x 24"),
        ({"images": torch.zeros(3, 25, 24, 3, dtype=torch.uint8)}, "multiples of the patch size 8"),
        ({"images": torch.zeros(3, 3, 24, 24, dtype=torch.uint8)}, "must be uint8"),
        ({"images": torch.zeros(2, 24, 24, 3, dtype=torch.uint8)}, "2 images but 3 captions"),
        ({"mask": torch.zeros(3, 8, dtype=torch.bool)}, r"mask must be bool \[3, 9\]"),
        ({"mask": torch.zeros(3, 9)}, "mask must be bool"),
        ({"mask": None}, "need a mask"),
        ({"masked_positions": None}, "needs masked_positions"),
        ({"masked_positions": torch.zeros(2, 4, dtype=torch.int32)}, "masked_positions must be int32"),
        ({"targets": torch.zeros(3, 5, dtype=torch.int64)}, r"targets must be \[3, 4\]"),
    ],
)
def test_inputs_that_do_not_fit_are_named(make_model, pairs, change, message):
    inputs = {"images": pairs.images, "mask": pairs.mask, "masked_positions": pairs.positions}
    inputs |= {"targets": pairs.targets} | change
    with pytest.raises(ValueError, match=message):
        make_model(dtype=torch.float32)(inputs.pop("images"), pairs.text, **inputs)


def test_a_mask_needs_the_masked_branch(make_model, pairs):
    with pytest.raises(ValueError, match="no masked branch"):
        make_model(mim=None)(pairs.images, pairs.text, mask=pairs.mask, masked_positions=pairs.positions)


def test_too_long_captions_and_unknown_blocks(make_model, pairs):
    model = make_model()
    with pytest.raises(ValueError, match="up to 12 tokens: the model takes 11"):
        model.encode_text(torch.ones(1, 12, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"0\.\.2"):
        model.visual_features(pairs.images, [3])


def test_parts_of_packed_captions(pairs):
    parts = [pairs.text.part(slice(0, 1)), pairs.text.part(slice(1, 3))]
    assert [len(part) for part in parts] == [1, 2]
    assert torch.equal(torch.cat([part.tokens for part in parts]), pairs.text.tokens)
    assert parts[1].cu_seqlens.tolist() == [0, 11, 13] and parts[1].cu_seqlens.dtype == torch.int32
    with pytest.raises(ValueError, match="consecutive"):
        pairs.text.part(slice(0, 3, 2))


def test_packing_ends_at_the_first_largest_id():
    packed = PackedText.from_padded(torch.tensor([[8, 9, 1, 9], [9, 0, 0, 0]]))
    assert packed.tokens.tolist() == [8, 9, 9] and packed.cu_seqlens.tolist() == [0, 2, 3]


def test_named_sizes():
    with torch.device("meta"):
        model = FaRL(MODELS["farl-b16"])
    sizes = {name: value.numel() for name, value in model.state_dict().items()}
    mim = ("visual.mask_token", "visual.lm_", "visual.ln_lm")
    assert sum(size for name, size in sizes.items() if name.startswith(mim)) == 13_389_824
    assert sum(size for name, size in sizes.items() if not name.startswith(mim)) == 149_620_737
    assert MODELS["farl-b16"].vision.grid == (14, 14)
    for config in MODELS.values():
        assert ModelConfig.from_dict(config.to_dict()) == config


def test_wrong_sizes_are_named(config):
    values = config.to_dict()
    with pytest.raises(ValueError, match=r"vision\.width 16 is not a multiple of heads 3"):
        ModelConfig.from_dict(values | {"vision": values["vision"] | {"heads": 3}})
    with pytest.raises(ValueError, match="not a model configuration"):
        ModelConfig.from_dict(values | {"depth": 3})
    with pytest.raises(ValueError, match="activation"):
        ModelConfig.from_dict(values | {"activation": "relu"})


def test_public_names():
    assert farl.FaRL is FaRL and farl.load_pretrained.__module__ == "farl.model.weights"
    assert farl.tokenize(["a face"]).shape == (1, 77)
    assert {"FaRL", "load_pretrained", "tokenize"} <= set(dir(farl))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = farl.nothing
