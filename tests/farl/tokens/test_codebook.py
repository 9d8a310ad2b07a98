from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from farl.tokens import PatchCodebook
from farl.tokens.kmeans import kmeans, nearest
from farl.tokens.patch_features import FeatureLayout, patch_features


def smooth_images(count: int, size: int, seed: int = 0) -> torch.Tensor:
    """uint8 [count, size, size, 3]: random blobs with some noise, so that patches have colour, edges and texture."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, size // 6 + 2, size // 6 + 2, generator=generator) * 320 - 30
    images = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    images += torch.randn(images.shape, generator=generator) * 4
    return images.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def codebook() -> PatchCodebook:
    return PatchCodebook.fit(smooth_images(100, 64), 8, 64, seed=3)


@pytest.mark.parametrize("patch_size", [1, 4, 7, 8, 14, 16, 24, 28, 32])
def test_features_are_whole_numbers_with_exact_products(patch_size: int) -> None:
    layout = FeatureLayout(patch_size)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (50, patch_size, patch_size, 3), dtype=torch.uint8, generator=generator)
    extremes = torch.zeros(3, patch_size, patch_size, 3, dtype=torch.uint8)
    extremes[1] = 255
    extremes[2, : patch_size // 2] = 255
    features = patch_features(torch.cat([noise, extremes]), layout)
    assert features.shape == (53, layout.size) and features.dtype == torch.float32
    assert torch.equal(features, features.round()) and features.abs().max() <= 256
    assert torch.equal(features, features.bfloat16().float()), "exact in bf16 as well"
    worst = layout.structure_size * layout.structure_limit**2 + (layout.size - layout.structure_size) * 255**2
    assert worst < 2**23
    assert (features @ features.T).double().equal(features.double() @ features.double().T)


def test_features_split_colour_from_structure() -> None:
    layout = FeatureLayout(8)
    pattern = torch.randint(-20, 21, (1, 8, 8, 1)).expand(1, 8, 8, 3)
    dark, light = ((pattern + level).to(torch.uint8) for level in (60, 160))
    a, b = patch_features(torch.cat([dark, light]), layout)
    size = layout.structure_size
    assert torch.equal(a[:size], b[:size]), "the mean does not change the structure"
    assert ((b - a)[size:] == 200).all(), "half a grey level a step"
    doubled = patch_features((2 * pattern + 110).to(torch.uint8), layout)[0]
    ratio = doubled[:size].norm() / a[:size].norm()
    assert ratio == pytest.approx(2**0.5, rel=0.02), "structure grows with the square root of the contrast"


def test_large_patches_are_averaged() -> None:
    small = torch.randint(0, 256, (5, 8, 8, 3), dtype=torch.uint8)
    large = small.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert FeatureLayout(16).pool == 2
    assert torch.equal(patch_features(small, FeatureLayout(8)), patch_features(large, FeatureLayout(16)))


def test_tokens_are_those_of_an_integer_search(codebook: PatchCodebook) -> None:
    images = smooth_images(4, 64, seed=9)
    patches = images.unflatten(2, (8, 8)).unflatten(1, (8, 8)).transpose(2, 3).flatten(0, 2)
    features = patch_features(patches, FeatureLayout(8)).long().numpy()
    state = codebook.state_dict()["centroids"].long().numpy()
    centroids = np.concatenate([state[:, :192], np.tile(state[:, 192:], (1, 18))], axis=1)
    distances = ((features[:, None] - centroids[None]) ** 2).sum(-1)
    tokens = codebook(images)
    assert tokens.shape == (4, 64) and tokens.dtype == torch.int64
    assert tokens.flatten().tolist() == distances.argmin(1).tolist()


def test_tokens_do_not_depend_on_batch_threads_or_precision(codebook: PatchCodebook) -> None:
    images = smooth_images(40, 64, seed=1)
    expected = codebook(images)
    with threads(2):
        assert torch.equal(codebook(images), expected)
    assert torch.equal(torch.cat([codebook(part) for part in images.split(7)]), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codebook(images), expected)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(codebook(images), expected)
    finally:
        torch.set_float32_matmul_precision(before)


def test_fit_is_equal_for_any_number_of_threads_and_changes_with_the_seed() -> None:
    images = smooth_images(60, 32)
    states = []
    for seed, count in ((0, 1), (0, 2), (1, 1)):
        with threads(count):
            states.append(PatchCodebook.fit(images, 8, 48, seed=seed).state_dict())
    for name in ("centroids", "pictures"):
        assert torch.equal(states[0][name], states[1][name])
        assert not torch.equal(states[0][name], states[2][name])


def test_positions_give_the_targets_of_the_masked_branch(codebook: PatchCodebook) -> None:
    images = smooth_images(3, 64, seed=2)
    positions = torch.tensor([[0, 9, 63], [5, 6, -1], [-1, -1, -1]], dtype=torch.int32)
    tokens = codebook(images)
    expected = tokens.gather(1, positions.long().clamp(min=0)).masked_fill(positions < 0, -1)
    assert torch.equal(codebook(images, positions), expected)


def test_images_need_not_be_square_or_contiguous(codebook: PatchCodebook) -> None:
    wide = smooth_images(2, 80)[:, 8:32, 16:72]
    tokens = codebook(wide)
    assert tokens.shape == (2, 21)
    assert tokens[1, 7 + 2] == codebook(wide[1:, 8:16, 16:24].contiguous())[0, 0]
    decoded = codebook.decode(tokens, (3, 7))
    assert decoded.shape == (2, 24, 56, 3)
    assert torch.equal(decoded[1, 8:16, 16:24], codebook.state_dict()["pictures"][tokens[1, 9]])


def test_decoding_draws_the_patches_of_a_small_world() -> None:
    """As many codes as different patches: every patch is its own code, and images come back exactly."""
    patches = smooth_images(24, 8, seed=4)
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, 24, (50, 16), generator=generator)
    index[0], index[1, :8] = torch.arange(16), torch.arange(16, 24)
    images = patches[index].unflatten(1, (4, 4)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    codebook = PatchCodebook.fit(images, 8, 24, seed=0)
    tokens = codebook(images)
    assert len(tokens.unique()) == 24, "no code is dead"
    assert torch.equal(codebook.decode(tokens), images)


def test_decoded_images_look_like_the_images(codebook: PatchCodebook) -> None:
    images = smooth_images(20, 64, seed=11)
    decoded = codebook.decode(codebook(images))
    assert decoded.dtype == torch.uint8 and decoded.shape == images.shape
    error = (decoded.float() - images.float()).square().mean().sqrt()
    mean = images.float().mean((1, 2), keepdim=True)
    # 64 codes for random colours at every corner: 28 % off the spread. Tokens of other images are 35 % above it.
    spread = (images.float() - mean).square().mean().sqrt()
    assert error < 0.75 * spread
    shuffled = codebook.decode(codebook(images.roll(1, 0)))
    assert (shuffled.float() - images.float()).square().mean().sqrt() > 1.2 * spread


def test_lloyd_improves_on_the_seeding_and_uses_the_codes() -> None:
    features = patch_features(smooth_images(3000, 8), FeatureLayout(8))

    def spread(iterations: int) -> float:
        centroids = kmeans(features, 64, iterations=iterations, seed=0)
        index, score = nearest(features, centroids)
        assert len(index.unique()) == 64
        gaps = features.square().sum(1) - 2 * score
        assert torch.equal(gaps, (features - centroids[index]).square().sum(1)), "scores are exact"
        return float(gaps.mean())

    seeded, fitted = spread(0), spread(10)
    assert fitted < 0.85 * seeded


def test_dead_codes_are_placed_again() -> None:
    """One cloud and a few far points: wherever the seeding falls, codes without members move to the far points."""
    generator = torch.Generator().manual_seed(0)
    cloud = torch.randint(-3, 4, (4000, 6), generator=generator).float()
    cloud = torch.cat([cloud[:1].expand(4000, -1), 100 * torch.eye(6), -100 * torch.eye(6)])
    for seed in range(5):
        centroids = kmeans(cloud, 13, iterations=13, seed=seed)
        index, score = nearest(cloud, centroids)
        assert len(index.unique()) == 13
        assert (cloud.square().sum(1) - 2 * score).max() == 0


def test_more_codes_than_different_patches() -> None:
    images = torch.zeros(4, 16, 16, 3, dtype=torch.uint8)
    images[2:] = 200
    codebook = PatchCodebook.fit(images, 8, 6)
    tokens = codebook(images)
    assert len(tokens.unique()) == 2 and torch.equal(codebook.decode(tokens), images)
    assert set(codebook.state_dict()["pictures"].unique().tolist()) == {0, 200}


def test_state_is_plain_tensors(codebook: PatchCodebook) -> None:
    buffer = io.BytesIO()
    torch.save(codebook.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    again = PatchCodebook.from_state_dict(state)
    images = smooth_images(5, 64, seed=6)
    assert torch.equal(again(images), codebook(images))
    assert torch.equal(again.decode(again(images)), codebook.decode(codebook(images)))
    assert (again.vocab_size, again.patch_size, again.token_image_size) == (64, 8, None)
    with pytest.raises(ValueError, match=r"^state: feature version"):
        PatchCodebook.from_state_dict(state | {"feature_version": torch.tensor(99)})
    with pytest.raises(ValueError, match=r"^state: wanted"):
        PatchCodebook.from_state_dict({"centroids": state["centroids"]})
    with pytest.raises(ValueError, match=r"^centroids, pictures: "):
        PatchCodebook.from_state_dict(state | {"centroids": state["centroids"][:, 1:]})


def test_wrong_arguments_are_named(codebook: PatchCodebook) -> None:
    images = smooth_images(2, 64)
    with pytest.raises(ValueError, match=r"^images: "):
        codebook(images.float())
    with pytest.raises(ValueError, match=r"^images: "):
        codebook(images.permute(0, 3, 1, 2))
    with pytest.raises(ValueError, match=r"^images: "):
        codebook(images[:, :60])
    with pytest.raises(ValueError, match=r"^images: "):
        codebook(images.to("meta"))
    with pytest.raises(ValueError, match=r"^positions: "):
        codebook(images, torch.zeros(3, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"^tokens: "):
        codebook.decode(torch.full((1, 64), 64))
    with pytest.raises(ValueError, match=r"^tokens: "):
        codebook.decode(torch.zeros(1, 63, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^vocab_size: "):
        PatchCodebook.fit(images, 8, 129)
    with pytest.raises(ValueError, match=r"^patch_size: "):
        PatchCodebook.fit(smooth_images(1, 74), 37, 4)


@pytest.mark.skipif(not os.environ.get("FARL_DATA"), reason="FARL_DATA (real photographs) is not set")
def test_real_photographs_use_the_vocabulary_and_come_back() -> None:
    from PIL import Image

    paths = sorted((Path(os.environ["FARL_DATA"]) / "faces" / "images").glob("*.jpg"))[:500]
    opened = [Image.open(path).convert("RGB").crop((45, 45, 205, 205)).resize((64, 64)) for path in paths]
    images = torch.from_numpy(np.stack([np.asarray(image) for image in opened]))
    codebook = PatchCodebook.fit(images[:400], 8, 256, iterations=5)
    tokens = codebook(images[400:])
    shares = torch.bincount(tokens.flatten(), minlength=256).double() / tokens.numel()
    assert (shares > 0).double().mean() > 0.9
    assert torch.exp(torch.special.entr(shares).sum()) > 128  # perplexity
    error = (codebook.decode(tokens).float() - images[400:].float()).square().mean()
    assert 10 * torch.log10(255**2 / error) > 18  # dB
