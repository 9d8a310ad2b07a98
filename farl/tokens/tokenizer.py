"""What every visual tokenizer has in common, and the one that a run asks for."""

from __future__ import annotations

from typing import Protocol

import torch

from farl.tokens.codebook import PatchCodebook
from farl.tokens.dalle import PIXELS_PER_TOKEN, DalleEncoder


class VisualTokenizer(Protocol):
    """Images -> the tokens that the masked branch predicts."""

    @property
    def vocab_size(self) -> int:
        """Number of different tokens."""
        ...

    @property
    def token_image_size(self) -> int | None:
        """Side in pixels of the images that it wants; None: the model's own images."""
        ...

    @property
    def token_resample(self) -> str | None:
        """How those images are resized from the same crop ("lanczos"); None with the model's own images."""
        ...

    def __call__(self, images: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """uint8 [B, H, W, 3] -> int64 [B, P]; with `positions` int32 [B, K] -> int64 [B, K], -1 where that is -1."""
        ...


def build_tokenizer(
    spec: str,
    *,
    images: torch.Tensor | None = None,
    patch_size: int | None = None,
    vocab_size: int | None = None,
    seed: int = 0,
    grid: tuple[int, int] = (14, 14),
    device: torch.device | str | None = None,
) -> VisualTokenizer:
    """The tokenizer that `spec` names.

    Args:
        spec: "codebook" fits a `PatchCodebook` on `images`; "dalle:FILE.safetensors" loads a `DalleEncoder`.
        images, patch_size, vocab_size, seed: as in `PatchCodebook.fit`; all but the seed are needed for "codebook".
            With "dalle" a `vocab_size` is only compared with that of the file.
        grid: (rows, columns) of the image tower's patches, from which "dalle" takes the size of its images.
        device: where it runs; None: the CPU, or the device of `images`.

    Raises:
        ValueError: another spec, a missing argument, a file that does not fit.
    """
    kind, _, path = spec.partition(":")
    if spec == "codebook":
        if images is None or patch_size is None or vocab_size is None:
            raise ValueError('images, patch_size, vocab_size: spec "codebook" needs all three')
        codebook = PatchCodebook.fit(images, patch_size, vocab_size, seed)
        return codebook if device is None else codebook.to(device)
    if kind == "dalle" and path:
        if grid[0] != grid[1]:
            raise ValueError(f'grid: spec "dalle" needs a square, got {grid[0]} x {grid[1]}')
        encoder = DalleEncoder.from_file(path, token_image_size=PIXELS_PER_TOKEN * grid[0])
        if vocab_size is not None and vocab_size != encoder.vocab_size:
            raise ValueError(f"vocab_size: {path} has {encoder.vocab_size} tokens, the model wants {vocab_size}")
        return encoder if device is None else encoder.to(device)
    raise ValueError(f'spec: wanted "codebook" or "dalle:FILE.safetensors", got {spec!r}')


def token_usage(tokens: torch.Tensor, vocab_size: int) -> dict[str, float]:
    """How evenly `tokens` (integers of any shape, negative = ignored) use the vocabulary.

    Returns:
        "utilisation": share of the vocabulary that occurs; "perplexity": exp of the entropy, `vocab_size` at most.
    """
    counts = torch.bincount(tokens[tokens >= 0].flatten().cpu(), minlength=vocab_size).double()
    shares = counts[counts > 0] / counts.sum()
    entropy = -(shares * shares.log()).sum()
    return {"utilisation": float((counts > 0).sum() / vocab_size), "perplexity": float(entropy.exp())}
