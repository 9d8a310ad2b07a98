from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from farl.tokens import DalleEncoder, PatchCodebook, VisualTokenizer, build_tokenizer, token_usage


def _images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8, generator=generator)


def _tokens_of(tokenizer: VisualTokenizer, images: torch.Tensor) -> torch.Tensor:
    tokens = tokenizer(images)
    assert tokens.min() >= 0 and tokens.max() < tokenizer.vocab_size
    return tokens


def test_codebook_is_fitted_on_the_images() -> None:
    images = _images()
    tokenizer = build_tokenizer("codebook", images=images, patch_size=8, vocab_size=16, seed=4, device="cpu")
    assert isinstance(tokenizer, PatchCodebook) and tokenizer.token_image_size is None
    assert torch.equal(_tokens_of(tokenizer, images), PatchCodebook.fit(images, 8, 16, 4)(images))


def test_dalle_is_loaded_with_the_size_of_the_grid(tmp_path: Path) -> None:
    encoder = DalleEncoder(16, hidden=8, blocks_per_group=1)
    path = tmp_path / "encoder.safetensors"
    save_file(encoder.state_dict(), path)
    tokenizer = build_tokenizer(f"dalle:{path}", grid=(4, 4), vocab_size=16)
    assert (tokenizer.token_image_size, tokenizer.token_resample) == (32, "lanczos")
    assert torch.equal(_tokens_of(tokenizer, _images()), encoder(_images()))
    assert build_tokenizer(f"dalle:{path}").token_image_size == 112
    with pytest.raises(ValueError, match=r"^vocab_size: .* has 16 tokens, the model wants 8192"):
        build_tokenizer(f"dalle:{path}", vocab_size=8192)
    with pytest.raises(ValueError, match=r"^grid: "):
        build_tokenizer(f"dalle:{path}", grid=(4, 5))


@pytest.mark.parametrize("spec", ["", "dalle", "dalle:", "vqgan:x", "codebook:64"])
def test_other_specs_are_refused(spec: str) -> None:
    with pytest.raises(ValueError, match=r'^spec: wanted "codebook" or "dalle:FILE.safetensors"'):
        build_tokenizer(spec)


def test_missing_arguments_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^images, patch_size, vocab_size: "):
        build_tokenizer("codebook", images=_images(), patch_size=8)
    with pytest.raises(ValueError, match=r"no such file"):
        build_tokenizer(f"dalle:{tmp_path / 'none.safetensors'}")


def test_token_usage() -> None:
    even = token_usage(torch.arange(8).repeat(3), 16)
    assert even["utilisation"] == 0.5 and even["perplexity"] == pytest.approx(8)
    single = token_usage(torch.tensor([[3, 3], [3, -1]]), 4)
    assert single == {"utilisation": 0.25, "perplexity": pytest.approx(1)}
    uneven = token_usage(torch.tensor([0, 0, 0, 1]), 2)
    assert uneven["perplexity"] == pytest.approx(4 / 27**0.25)
