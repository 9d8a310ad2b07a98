"""Face parsing: a class for each pixel. Protocol of FaRL (`farl/experiments/face_parsing`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from farl.downstream.backbone import Backbone
from farl.downstream.color_augment import augment_colors
from farl.downstream.confusion import UNLABELLED, ConfusionMatrix
from farl.downstream.dense_head import Kind, check_kind, make_dense_head
from farl.downstream.draw_parsing import draw_sheet
from farl.downstream.draws import Draws
from farl.downstream.parsing_data import ParsingSet, check_labels, open_parsing_set
from farl.downstream.processes import mean_over_processes
from farl.downstream.task import LabelledSet, Sample, Split, TuneSettings
from farl.downstream.warp import (
    RoiWarp,
    crop_face,
    image_to_device,
    random_similarity,
    to_device,
)

# FaRL's shifts (share of the side), rotations (radians) and scales of a crop in training.
SHIFT, ROTATION, SCALE = 0.01, 0.314, 0.1
# Of the head, at most: FaRL's, and what a CPU can train.
CHANNELS, SMALL_CHANNELS = 768, 64
# A face's box then fills about what the face fills in a crop that is aligned to points.
BOX_SCALE = 0.6
TANH_FACTOR = 0.8

PAPER = TuneSettings(epochs=300)
# For small drawn faces and models that train on a CPU.
SMALL = TuneSettings(
    epochs=8, batch=16, lr_backbone=1e-3, lr_head=3e-3, weight_decay=0.01, schedule="cosine", warmup=50, ema=0.99
)


@dataclass(frozen=True)
class ParsingTask:
    """Cross-entropy on crops; figures on the original images, to which the logits are warped back.

    Attributes:
        classes: names, by class number; 0 is the background.
        warp: factor of the RoI tanh-warp, 0 to 1.
        crop: side of the crops in pixels.
        antialias: shrink images by means where the crop is much smaller (FaRL does not).
        small: take the short protocol, a narrow head, and a loss that weighs classes (see `balanced_weights`).
        head: FaRL's neck and UPerNet, or one linear layer.
    """

    classes: tuple[str, ...]
    warp: float
    crop: int
    antialias: bool = True
    small: bool = False
    head: Kind = "upernet"

    name = "parsing"
    main_metric = "mean_f1"
    higher_is_better = True

    @property
    def protocol(self) -> TuneSettings:
        if self.small:
            return dataclasses.replace(SMALL, crop=self.crop, resolution=self.crop)
        return dataclasses.replace(PAPER, crop=self.crop)

    def about(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "classes": list(self.classes)}

    def make_head(self, backbone: Backbone) -> nn.Module:
        """A map for each class; see `make_dense_head`."""
        channels = SMALL_CHANNELS if self.small else CHANNELS
        return make_dense_head(self.head, backbone, len(self.classes), channels=channels)

    def batch(self, samples: list[Sample], device: torch.device, *, rng: Draws | None) -> dict[str, Any]:
        """Crops, and labels where the samples have masks.

        Returns:
            "images" float [B, 3, S, S] in 0..1; "labels" int64 [B, S, S]; "warp": the `RoiWarp`; "sizes": (height,
            width) of the originals; "masks": the originals' label maps, uint8 [H, W] (in evaluation alone).
        """
        matrices = torch.cat([_matrix(sample, self.crop) for sample in samples])
        if rng is not None:
            moves = random_similarity(rng, self.crop, shift=SHIFT, rotation=ROTATION, scale=SCALE, normal=True)
            matrices = moves @ matrices
        warp = RoiWarp(matrices, self.crop, self.warp)
        shrink = warp.shrink() if self.antialias else None
        warp = warp.to(device)
        images = [image_to_device(sample["image"], device) for sample in samples]
        crops = warp.images(images, shrink=shrink)
        batch: dict[str, Any] = {
            "images": crops if rng is None else augment_colors(crops, rng),
            "warp": warp,
            "sizes": [sample["image"].shape[:2] for sample in samples],
        }
        if all("mask" in sample for sample in samples):
            for sample in samples:
                check_labels(sample["mask"], len(self.classes), sample["name"])
            masks = [to_device(sample["mask"], device) for sample in samples]
            batch["labels"] = warp.labels(masks).long()
            if rng is None:
                batch["masks"] = masks
        return batch

    def loss(self, outputs: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Cross-entropy at the size of the crop, on bilinearly resized logits; the mean over labelled pixels.

        The small protocol's is the weighted mean, with `balanced_weights`.
        """
        labels = batch["labels"]
        logits = _to_crop(outputs, self.crop)
        if self.small:
            pixels = mean_over_processes(_pixels_by_class(labels, len(self.classes)))
            weights, labelled = balanced_weights(pixels), pixels.sum()
        else:
            weights, labelled = None, mean_over_processes((labels != UNLABELLED).sum().float())
        total = F.cross_entropy(logits, labels, weight=weights, ignore_index=UNLABELLED, reduction="sum")
        return {"loss": total / labelled.clamp(min=1)}

    def metric(self) -> ParsingMetric:
        return ParsingMetric(self.classes)

    def predict(self, outputs: Tensor, batch: dict[str, Any]) -> list[np.ndarray]:
        """Label maps uint8 [H, W] of the original images."""
        return [labels.to(torch.uint8).cpu().numpy() for labels in original_labels(outputs, batch)]

    def draw(self, samples: Sequence[Sample], predictions: Sequence[Any], scores: Sequence[float]) -> Image.Image:
        """Image, truth, prediction and what differs, a row each."""
        return draw_sheet(samples, predictions, scores, self.classes)


def _pixels_by_class(labels: Tensor, classes: int) -> Tensor:
    """float32 [classes]: how many of `labels` (int64, any shape) are each class; 255 is none of them."""
    # All 256 values of a label: unlike bincount, this never asks a GPU for the largest one.
    labels = labels.flatten()
    ones = torch.ones_like(labels, dtype=torch.float32)
    return ones.new_zeros(256).scatter_add_(0, labels, ones)[:classes]


def balanced_weights(pixels: Tensor) -> Tensor:
    """A weight for each class, float32 [classes]: one over the root of its share of the labelled pixels of a batch.

    Brows and lips are a hundredth of a small face: with equal weights thousands of updates pass before they are ever
    the most likely class. Weights are scaled so that those of all labelled pixels add up to the pixels' number; classes
    that do not occur have weight 0.

    Args:
        pixels: how many there are of each class, [classes].
    """
    # In float64, so that any number of processes comes to the same weights.
    pixels = pixels.double()
    weights = torch.where(pixels > 0, pixels.rsqrt(), 0.0)
    return (weights * (pixels.sum() / (weights * pixels).sum().clamp(min=1e-12))).float()


class ParsingMetric:
    """One confusion matrix over all pixels of the original images."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.matrix = ConfusionMatrix(classes)

    def update(self, outputs: Tensor, batch: dict[str, Any]) -> None:
        for prediction, mask in zip(original_labels(outputs, batch), batch["masks"], strict=True):
            self.matrix.update(prediction, mask)

    def state(self) -> Tensor:
        return self.matrix.state()

    def load_state(self, state: Tensor) -> None:
        self.matrix.load_state(state)

    def compute(self) -> dict[str, float]:
        """See `ConfusionMatrix.compute`."""
        return self.matrix.compute()


def original_logits(outputs: Tensor, batch: dict[str, Any], index: int) -> Tensor:
    """Logits [C, H, W] of one original image, differentiable; all 0 where the crop does not reach.

    As FaRL does, logits are first resized to the crop, then sampled from it, both bilinearly.
    """
    warp: RoiWarp = batch["warp"]
    logits = _to_crop(outputs[index : index + 1], warp.size)
    return warp[index : index + 1].back(logits, [batch["sizes"][index]])[0]


@torch.no_grad()
def original_labels(outputs: Tensor, batch: dict[str, Any]) -> list[Tensor]:
    """Label maps int64 [H, W] of the original images; one at a time, since logits of a photograph are large."""
    return [original_logits(outputs, batch, index).argmax(0) for index in range(len(outputs))]


def open_set(path: str, *, split: Split) -> ParsingSet:
    """See `open_parsing_set`."""
    return open_parsing_set(path, split=split)


def make_task(
    train: LabelledSet, *, crop: int | None = None, warp: float | None = None, head: str | None = None
) -> ParsingTask:
    """The task of a set, as FaRL has it for LaPa and CelebAMask-HQ.

    Args:
        crop: side of the crops in pixels; None takes 512, or the size of drawn faces.
        warp: factor of the tanh-warp; None takes 0.8 where crops are aligned to points, else 0.
        head: "upernet" (FaRL's; what None takes) or "linear".

    Raises:
        ValueError: the set does not say its classes, or a factor outside 0 to 1.
    """
    about = train.about()
    if "classes" not in about:
        raise ValueError(f"{about['path']} does not say its classes: open it as the training set, or add classes.txt")
    if warp is not None and not 0 <= warp <= 1:
        raise ValueError(f"--warp is {warp}; it must be 0 to 1")
    small = about["layout"] == "faces"
    return ParsingTask(
        classes=tuple(about["classes"]),
        warp=warp if warp is not None else TANH_FACTOR if about["crop_from"] == "points" else 0.0,
        crop=crop or (about["image_size"] if small else PAPER.crop),
        antialias=about["layout"] not in ("lapa", "celebamask-hq"),
        small=small,
        head=check_kind(head),
    )


def restore_task(about: dict[str, Any]) -> ParsingTask:
    """The task that said `about`."""
    fields: dict[str, Any] = {**about, "classes": tuple(about["classes"])}
    return ParsingTask(**fields)


def _matrix(sample: Sample, crop: int) -> Tensor:
    """[1, 3, 3] in float64, from what the sample knows of its face."""
    points, boxes = (torch.as_tensor(sample[key])[None] if key in sample else None for key in ("points", "box"))
    try:
        return crop_face([sample["image"].shape[:2]], crop, points=points, boxes=boxes, box_scale=BOX_SCALE)
    except ValueError as error:
        raise ValueError(f"{sample['name']}: {error}") from None


def _to_crop(outputs: Tensor, size: int) -> Tensor:
    return F.interpolate(outputs.float(), (size, size), mode="bilinear", align_corners=False)
