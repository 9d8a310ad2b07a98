"""One confusion matrix over a whole set, and the figures of segmentation that come from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

UNLABELLED = 255  # truth of pixels that count nowhere


class ConfusionMatrix:
    """Counts of (truth, prediction) over pixels, int64 [C, C], on the device of what it counts.

    Args:
        classes: names, by class number.
        background: the class left out of the mean F1.
    """

    def __init__(self, classes: Sequence[str], *, background: int = 0) -> None:
        self.classes = tuple(classes)
        self.background = background
        self.counts = torch.zeros(len(self.classes), len(self.classes), dtype=torch.int64)

    def update(self, prediction: Tensor, truth: Tensor) -> None:
        """Count label maps of one shape; `truth` may hold UNLABELLED.

        Raises:
            ValueError: shapes differ, or a label is neither a class nor UNLABELLED.
        """
        if prediction.shape != truth.shape:
            raise ValueError(f"prediction {list(prediction.shape)} and truth {list(truth.shape)} differ in shape")
        number = len(self.classes)
        truth = truth.flatten().to(prediction.device, torch.int64)
        # Two more rows, for unlabelled pixels and for wrong labels, so that nothing has to be selected first.
        row = torch.where(truth == UNLABELLED, number, truth.where(truth < number, number + 1))
        counts = torch.bincount(row * number + prediction.flatten(), minlength=number * (number + 2))
        counts = counts.view(number + 2, number)
        if counts[number + 1].any():
            wrong = truth[(truth >= number) & (truth != UNLABELLED)].max()
            raise ValueError(f"a label map holds {int(wrong)}, but there are only {number} classes")
        self.counts = self.counts.to(counts.device) + counts[:number]

    def f1(self) -> Tensor:
        """2 TP / (predicted + true) of each class, float64 [C]; NaN for a class that is in neither."""
        hits, total = self._sums()
        return 2 * hits / total

    def iou(self) -> Tensor:
        """TP / (predicted + true - TP) of each class, float64 [C]; NaN for a class that is in neither."""
        hits, total = self._sums()
        return hits / (total - hits)

    def compute(self) -> dict[str, float]:
        """Figures of the set, each 0 to 1.

        "mean_f1": over the classes but the background; "mean_iou": over all classes; "pixel_accuracy"; "f1/NAME" and
        "iou/NAME" of each class. A class that is neither in the truth nor predicted has NaN and is left out of the
        means; "absent_classes" counts those. All are NaN where nothing was counted.
        """
        f1, iou, counts = self.f1(), self.iou(), self.counts.double()
        foreground = torch.arange(len(f1)) != self.background
        figures = {
            "mean_f1": f1[foreground].nanmean().item(),
            "mean_iou": iou.nanmean().item(),
            "pixel_accuracy": (counts.trace() / counts.sum()).item(),
            "absent_classes": float(f1.isnan().sum()),
        }
        figures |= {f"f1/{name}": value for name, value in zip(self.classes, f1.tolist(), strict=True)}
        return figures | {f"iou/{name}": value for name, value in zip(self.classes, iou.tolist(), strict=True)}

    def state(self) -> Tensor:
        """float64 [C * C] on the CPU; exact up to 2**53 pixels."""
        return self.counts.flatten().double().cpu()

    def load_state(self, state: Tensor) -> None:
        self.counts = state.round().long().view(self.counts.shape)

    def _sums(self) -> tuple[Tensor, Tensor]:
        counts = self.counts.double().cpu()
        return counts.diagonal(), counts.sum(0) + counts.sum(1)
