"""The model against the same computation written naively: nothing packed, nothing left out, nothing fused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from farl.model import IMAGE_MEAN, IMAGE_STD, MimConfig, PackedText

TOLERANCE = 1e-10


def norm(x, p, name):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
    return (x - mean) / torch.sqrt(variance + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]


def block(x, p, name, heads, activation, causal=False):
    batch, length, width = x.shape
    qkv = norm(x, p, f"{name}.ln_1") @ p[f"{name}.attn.in_proj_weight"].T + p[f"{name}.attn.in_proj_bias"]
    q, k, v = qkv.view(batch, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-1, -2) / (width // heads) ** 0.5
    if causal:
        scores = scores + torch.full((length, length), -torch.inf, dtype=x.dtype).triu(1)
    out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)
    x = x + out @ p[f"{name}.attn.out_proj.weight"].T + p[f"{name}.attn.out_proj.bias"]
    h = norm(x, p, f"{name}.ln_2") @ p[f"{name}.mlp.c_fc.weight"].T + p[f"{name}.mlp.c_fc.bias"]
    h = h * torch.sigmoid(1.702 * h) if activation == "quick_gelu" else F.gelu(h)
    return x + h @ p[f"{name}.mlp.c_proj.weight"].T + p[f"{name}.mlp.c_proj.bias"]


def normalise(images):
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (IMAGE_MEAN, IMAGE_STD))
    return ((images.double() / 255 - mean) / std).permute(0, 3, 1, 2)


def plain_text(model, token_ids):
    p, text = dict(model.named_parameters()), model.config.text
    x = p["token_embedding.weight"][token_ids] + p["positional_embedding"][: token_ids.shape[1]]
    for layer in range(text.layers):
        x = block(x, p, f"transformer.resblocks.{layer}", text.heads, model.config.activation, causal=True)
    x = norm(x, p, "ln_final")
    return x[torch.arange(len(x)), token_ids.argmax(-1)] @ p["text_projection"]


def plain_forward(model, pairs):
    """Image features, text features, and the sum of the token losses."""
    p, vision = dict(model.named_parameters()), model.config.vision
    x = F.conv2d(normalise(pairs.images), p["visual.conv1.weight"], stride=vision.patch_size).flatten(2).transpose(1, 2)
    if model.config.mim is not None:
        x = torch.cat([x, torch.where(pairs.mask[..., None], p["visual.mask_token"], x)])
    x = torch.cat([p["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + p["visual.positional_embedding"]
    x = norm(x, p, "visual.ln_pre")
    for layer in range(vision.layers):
        x = block(x, p, f"visual.transformer.resblocks.{layer}", vision.heads, model.config.activation)
    clean, masked = x[: len(pairs.images)], x[len(pairs.images) :]
    image_features = norm(clean[:, 0], p, "visual.ln_post") @ p["visual.proj"]
    if model.config.mim is None:
        return image_features, plain_text(model, pairs.token_ids), torch.zeros(())
    for layer in range(model.config.mim.layers):
        masked = block(masked, p, f"visual.lm_transformer.resblocks.{layer}", vision.heads, model.config.activation)
    logits = norm(masked[:, 1:], p, "visual.ln_lm") @ p["visual.lm_head.weight"].T + p["visual.lm_head.bias"]
    targets = pairs.targets[pairs.targets >= 0]
    loss = F.cross_entropy(logits[pairs.mask], targets, reduction="sum")
    return image_features, plain_text(model, pairs.token_ids), loss


def fused_forward(model, pairs):
    if model.config.mim is None:
        output = model(pairs.images, pairs.text)
        return output.image_features, output.text_features, torch.zeros(())
    output = model(pairs.images, pairs.text, mask=pairs.mask, masked_positions=pairs.positions, targets=pairs.targets)
    return output.image_features, output.text_features, output.mim_loss_sum


def gradients(model, image_features, text_features, loss_sum):
    similarity = F.normalize(image_features, dim=-1) @ F.normalize(text_features, dim=-1).T
    loss = F.cross_entropy(model.logit_scale.exp() * similarity, torch.arange(len(similarity))) + loss_sum
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_same(model, pairs):
    plain, fused = plain_forward(model, pairs), fused_forward(model, pairs)
    for wanted, got in zip(plain, fused, strict=True):
        assert (wanted - got).abs().max() <= TOLERANCE
    wanted, got = gradients(model, *plain), gradients(model, *fused)
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 1e-9, f"{name}: a gradient of zero tests nothing"
        assert (gradient - got[name]).abs().max() <= TOLERANCE, name


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("layer_norm_cast", ["before", "after"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_outputs_and_all_gradients_equal_the_plain_computation(
    make_model, pairs, activation, layer_norm_cast, checkpointing
):
    model = make_model(activation=activation, layer_norm_cast=layer_norm_cast)
    model.checkpoint_activations = checkpointing
    assert_same(model, pairs)


@pytest.mark.parametrize(("trunk_layers", "mim_layers"), [(1, 1), (2, 2), (1, 3)])
def test_any_depth_equals_the_plain_computation(make_model, config, pairs, trunk_layers, mim_layers):
    model = make_model(
        vision=replace(config.vision, layers=trunk_layers),
        text=replace(config.text, layers=trunk_layers),
        mim=MimConfig(mim_layers, config.mim.vocab_size),
    )
    assert_same(model, pairs)


def test_contrast_alone_equals_the_plain_computation(make_model, pairs):
    assert_same(make_model(mim=None), pairs)


def test_float_images_give_what_their_bytes_give(make_model, pairs):
    model = make_model()
    from_bytes, from_floats = model.encode_image(pairs.images), model.encode_image(normalise(pairs.images))
    assert (from_bytes - from_floats).abs().max() <= TOLERANCE


def test_without_a_mask_the_clean_features_are_the_same(make_model, pairs):
    model = make_model()
    alone = model(pairs.images, pairs.text)
    both = model(pairs.images, pairs.text, mask=pairs.mask, masked_positions=pairs.positions)
    assert (alone.image_features - both.image_features).abs().max() <= TOLERANCE
    assert alone.mim_hidden is None and both.mim_loss_sum is None
    assert both.mim_hidden.shape == (pairs.positions.numel(), model.config.vision.width)


def test_figures_of_the_masked_branch(make_model, pairs):
    model = make_model()
    inputs = {"mask": pairs.mask, "masked_positions": pairs.positions}
    hidden = model(pairs.images, pairs.text, **inputs).mim_hidden
    best = model.visual.lm_head(hidden).argmax(-1).view(pairs.targets.shape)
    targets = torch.where(pairs.positions < 0, -1, best)
    targets[0, 0] = (targets[0, 0] + 1) % 14
    output = model(pairs.images, pairs.text, **inputs, targets=targets)
    assert int(output.mim_count) == int(pairs.mask.sum())
    assert int(output.mim_correct) == int(pairs.mask.sum()) - 1
    assert not output.mim_correct.requires_grad


def test_packed_text_equals_padded_text(make_model, pairs):
    model = make_model()
    wanted = plain_text(model, pairs.token_ids)
    assert (model.encode_text(pairs.token_ids) - wanted).abs().max() <= TOLERANCE
    assert (model.encode_text_packed(pairs.text) - wanted).abs().max() <= TOLERANCE


def test_tokens_past_the_last_caption_change_nothing(make_model, pairs):
    model = make_model()
    budget = PackedText(F.pad(pairs.text.tokens, (0, 20), value=7), pairs.text.cu_seqlens, pairs.text.max_seqlen)
    parameters = [p for name, p in model.named_parameters() if not name.startswith(("visual", "logit"))]
    weight = torch.randn(3, 12, dtype=torch.float64)
    results = []
    for text in (pairs.text, budget):
        features = model.encode_text_packed(text)
        results.append([features, *torch.autograd.grad((features * weight).sum(), parameters)])
    for wanted, got in zip(*results, strict=True):
        assert (wanted - got).abs().max() <= TOLERANCE
