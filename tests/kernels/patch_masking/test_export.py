"""The plain PyTorch version under torch.export, with a batch of any size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from farl_kernels.patch_masking import mask_patches

PATCHES, CHANNELS = 6, 4


class Masking(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.mask_token, self.class_token = (nn.Parameter(torch.randn(CHANNELS)) for _ in range(2))
        self.position_embedding = nn.Parameter(torch.randn(PATCHES + 1, CHANNELS))

    def forward(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        return mask_patches(
            embeddings,
            None if self.mode == "plain" else mask,
            mask_token=None if self.mode == "plain" else self.mask_token,
            class_token=self.class_token,
            position_embedding=self.position_embedding,
            mode=self.mode,
            backend="reference",
        )


@pytest.mark.parametrize("mode", ["plain", "mask", "fork"])
def test_the_batch_stays_symbolic(mode: str) -> None:
    module = Masking(mode)
    embeddings, mask = torch.randn(5, PATCHES, CHANNELS), torch.rand(5, PATCHES) < 0.4
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(
        module, (embeddings[:2], mask[:2]), dynamic_shapes=({0: batch}, {0: batch}), strict=False
    )
    for count in (1, 5):
        inputs = embeddings[:count], mask[:count]
        torch.testing.assert_close(program.module()(*inputs), module(*inputs), rtol=0, atol=0)
