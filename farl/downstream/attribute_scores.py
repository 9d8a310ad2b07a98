"""Figures of yes-or-no attributes from counts alone, so that the parts of several processes can be added."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Logits are counted in bins of 1/256 from -16 to 16; the outermost ones hold what lies beyond.
BINS = 8192
LIMIT = 16.0


class AttributeScores:
    """Histograms of the logits of known positives and negatives: int64 [A, 2, BINS], on the device of what it counts.

    Args:
        names: of the A attributes.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.counts = torch.zeros(len(self.names), 2, BINS, dtype=torch.int64)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch.

        Args:
            logits: [B, A]. labels: [B, A] of 0, 1 or NaN (unknown, counts nowhere).

        Raises:
            ValueError: shapes do not fit.
        """
        if logits.shape != labels.shape or logits.shape[1:] != (len(self.names),):
            raise ValueError(
                f"logits {list(logits.shape)} and labels {list(labels.shape)} must both be [B, {len(self.names)}]"
            )
        labels = labels.to(logits.device)
        half = BINS // 2
        # Rounded down before the shift, or a small negative number would become 0 and so a yes.
        bins = (logits.float() * (half / LIMIT)).floor().clamp(-half, half - 1).long() + half
        row = 2 * torch.arange(len(self.names), device=logits.device) + (labels == 1)
        known = (row * BINS + bins)[~labels.isnan()]
        self.counts = self.counts.to(logits.device)
        self.counts += torch.bincount(known, minlength=self.counts.numel()).view_as(self.counts)

    def state(self) -> Tensor:
        """float64 [A * 2 * BINS] on the CPU; exact up to 2**53 images."""
        return self.counts.flatten().double().cpu()

    def load_state(self, state: Tensor) -> None:
        self.counts = state.round().long().view(self.counts.shape)

    def compute(self) -> dict[str, float]:
        """Figures of the set, each 0 to 1; NaN where a figure has no meaning.

        A "yes" is a logit of 0 or more (a probability of one half).

        For each attribute: "accuracy/NAME"; "majority/NAME", the accuracy of always giving the answer that is more
        frequent in this very set; "balanced/NAME", the mean of the accuracies on positives and on negatives; "ap/NAME",
        average precision; "positives/NAME", the share of positives, which is also the average precision of guessing.

        Over the attributes that have the figure, their means "mean_accuracy" (mAcc), "majority_accuracy",
        "balanced_accuracy", "average_precision", "chance_average_precision", and "average_precision_error": the mean
        average precision of the logits themselves differs from the one given by no more than this (see
        `binned_average_precision`).
        """
        counts = self.counts.double().cpu()
        negative, positive = counts.unbind(1)
        half = BINS // 2
        hits, rejections = positive[:, half:].sum(1), negative[:, :half].sum(1)
        positives, negatives = positive.sum(1), negative.sum(1)
        known = positives + negatives
        precision = torch.stack([binned_average_precision(p, n) for p, n in zip(positive, negative, strict=True)])
        share = positives / known
        columns = {
            "accuracy": (hits + rejections) / known,
            "majority": torch.maximum(positives, negatives) / known,
            "balanced": (hits / positives + rejections / negatives) / 2,
            "ap": precision[:, 0],
            "positives": share,
        }
        # Guessing has an average precision where the model has one, so that both means are over the same attributes.
        chance = share.where(positives > 0, torch.nan)
        figures = {
            "mean_accuracy": columns["accuracy"].nanmean().item(),
            "majority_accuracy": columns["majority"].nanmean().item(),
            "balanced_accuracy": columns["balanced"].nanmean().item(),
            "average_precision": columns["ap"].nanmean().item(),
            "average_precision_error": precision[:, 1].nanmean().item(),
            "chance_average_precision": chance.nanmean().item(),
        }
        for kind, values in columns.items():
            figures |= {f"{kind}/{name}": value for name, value in zip(self.names, values.tolist(), strict=True)}
        return figures


def binned_average_precision(positive: Tensor, negative: Tensor) -> Tensor:
    """Average precision of counts by rising score, and how far that of the exact scores may lie from it: float64 [2].

    All items of a bin enter together, as scikit-learn's `average_precision_score` has it for equal scores. For exact
    scores, ties or not, a bin of p positives and n negatives above which lie H positives among N items gives the sum of
    the precisions at its positives, which is at least that of all negatives first, sum over k = 1..p of
    (H + k) / (N + n + k), and at most p (H + p) / (N + p), all positives tied in front.

    Args:
        positive, negative: float64 [bins], lowest score first.

    Returns:
        NaN twice where there is no positive.
    """
    total = positive.sum()
    used = (positive + negative > 0).flip(0)
    p, n = positive.flip(0)[used], negative.flip(0)[used]
    if total == 0:
        return torch.full((2,), torch.nan, dtype=torch.float64)
    hits, negatives = p.cumsum(0), n.cumsum(0)
    before = hits - p + negatives - n
    together = p * hits / (hits + negatives)
    # (H + k) / (N + n + k) is 1 - negatives / (N + n + k), and sums of reciprocals are differences of digamma.
    lowest = p - negatives * (torch.digamma(before + n + p + 1) - torch.digamma(before + n + 1))
    highest = p * hits / (before + p).clamp(min=1)
    error = torch.maximum((together - lowest).sum(), (highest - together).sum())
    return torch.stack([together.sum(), error.clamp(min=0)]) / total
