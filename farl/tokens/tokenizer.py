"""What every visual tokenizer has in common."""

from __future__ import annotations

from typing import Protocol

import torch


class VisualTokenizer(Protocol):
    """Images -> the tokens that the masked branch predicts: `PatchCodebook` or `DalleEncoder`."""

    @property
    def vocab_size(self) -> int:
        """Number of different tokens."""
        ...

    @property
    def token_image_size(self) -> int | None:
        """Side in pixels of the images that it wants, resized from the same crop by Lanczos; None: the model's own."""
        ...

    def __call__(self, images: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """uint8 [B, H, W, 3] -> int64 [B, P]; with `positions` int32 [B, K] -> int64 [B, K], -1 where that is -1."""
        ...
