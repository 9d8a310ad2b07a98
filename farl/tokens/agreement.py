"""How many tokens of DALL-E's encoder rounding in a 16-bit dtype changes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from farl.tokens.dalle import DalleEncoder


@dataclass
class Agreement:
    """Tokens of convolutions in one dtype beside those in fp32, of the same pictures.

    Attributes:
        cells: how many were compared. same: how many of them have the same token.
        overflowed: how many have a logit that is infinite or not a number.
        largest_loss: how far the fp32 logit of a different token is below the best one, at most.
        total_lead: by how much the best fp32 logit leads over the second, summed over the cells.
    """

    cells: int = 0
    same: int = 0
    overflowed: int = 0
    largest_loss: float = 0.0
    total_lead: float = 0.0

    @property
    def share(self) -> float:
        """Of the cells, those with the same token."""
        return self.same / max(self.cells, 1)

    @property
    def mean_lead(self) -> float:
        """Of the best fp32 logit over the second: a loss far below it is a near tie."""
        return self.total_lead / max(self.cells, 1)

    def add(self, exact: torch.Tensor, other: torch.Tensor) -> None:
        """Count cells: logits [B, P, V] in fp32 all along, and those of convolutions in another dtype."""
        best, second = exact.topk(2).values.unbind(-1)
        loss = best - exact.gather(-1, other.argmax(-1, keepdim=True)).squeeze(-1)
        same = exact.argmax(-1) == other.argmax(-1)
        self.cells += same.numel()
        self.same += int(same.sum())
        self.overflowed += int((~other.isfinite()).any(-1).sum())
        self.largest_loss = max(self.largest_loss, loss.max().item())
        self.total_lead += (best - second).sum().item()


def agreement_with_fp32(
    encoder: DalleEncoder, batches: Iterable[torch.Tensor], dtypes: Sequence[torch.dtype]
) -> dict[torch.dtype, Agreement]:
    """What rounding in each of `dtypes` does to the tokens of all cells.

    Args:
        batches: uint8 [B, H, W, 3] on the encoder's device, of few images: a cell has `vocab_size` fp32 logits, of
            which there are two sets at a time.

    Raises:
        ValueError: as of `DalleEncoder.forward`.
    """
    found = {dtype: Agreement() for dtype in dtypes}
    for images in batches:
        # As cuDNN is set by default, "fp32" would round products to TF32.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            exact = encoder.logits(images, torch.float32)
        for dtype, agreement in found.items():
            agreement.add(exact, encoder.logits(images, dtype))
    return found
