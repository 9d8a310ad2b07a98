"""Face attributes: yes or no to each of a list of questions.

FaRL's code trains no attributes; the pooled head is that of facer's inference model (`facer/farl/classification.py`),
the lengths and rates of the protocols are our own.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from farl.downstream.attribute_scores import AttributeScores
from farl.downstream.attributes_data import AttributeSet, open_attribute_set
from farl.downstream.backbone import Backbone, Features
from farl.downstream.draw_attributes import draw_sheet
from farl.downstream.draws import Draws
from farl.downstream.task import LabelledSet, Sample, Split, TuneSettings
from farl.downstream.upernet import BatchNorm
from farl.downstream.warp import (
    RoiWarp,
    align_to_points,
    crop_box,
    crop_whole,
    image_to_device,
    random_similarity,
    similarity,
)

Head = Literal["probe", "frozen", "full"]
HEADS: tuple[Head, ...] = ("probe", "frozen", "full")
# Hats, necklaces and ties lie outside FaRL's aligned crop, which this scale of the face widens.
FACE_SCALE = 0.8
BOX_SCALE = 0.5
# Augmentation: shift (share of the side), rotation (radians), scale and brightness, each uniform within +- this. No
# gray, gamma or blur: colours of hair, pale skin and blur are attributes.
SHIFT, ROTATION, SCALE, BRIGHTNESS = 0.03, 0.1, 0.05, 0.1
# Crops of so many pixels and fewer take the short protocol, for drawn faces and models that train on a CPU.
SMALL_CROP = 128
# Of drawn faces of 96 pixels, at most: the resolution of farl-tiny, and less than half the time of 96.
DRAWN_CROP = 64

FULL = TuneSettings(
    epochs=10,
    batch=128,
    layer_decay=0.75,
    weight_decay=0.05,
    schedule="cosine",
    warmup=500,
    resolution=224,
    crop=224,
)
SMALL = TuneSettings(
    epochs=20, batch=32, lr_backbone=5e-4, lr_head=2e-3, weight_decay=0.05, schedule="cosine", warmup=50, ema=0.99
)
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|\d+")


@dataclass(frozen=True)
class AttributesTask:
    """Binary cross-entropy on crops.

    Attributes:
        attributes: names.
        head: "probe": a linear layer on the class token of the last block named, backbone frozen; "frozen": a head over
            all named blocks, backbone frozen; "full": that head, and the backbone trained.
        crop: side of the crops in pixels.
        crop_from: "points": similarity from the sample's five points; "whole": the whole image as it is, in a square.
        frame: where the five points of whole images lie, as shares of the side of the crop; then a sample that has
            points (a photograph to predict, which is not aligned as the training set was) is brought there.
        flip: mirror in training.
        layout: of the training set, which decides the length of the protocol.
    """

    attributes: tuple[str, ...]
    head: Head
    crop: int
    crop_from: Literal["points", "whole"] = "whole"
    frame: tuple[tuple[float, float], ...] | None = None
    flip: bool = True
    layout: str = "folder"

    name = "attributes"
    main_metric = "mean_accuracy"
    higher_is_better = True

    @property
    def protocol(self) -> TuneSettings:
        small = self.crop <= SMALL_CROP
        settings = SMALL if small else FULL
        if not small and self.layout != "celeba":
            # Some thousand images, of which ten passes are too little.
            settings = dataclasses.replace(settings, epochs=30, batch=64, warmup=100)
        if self.head != "full":
            rate = 1e-2 if small else 1e-3
            settings = dataclasses.replace(settings, lr_head=rate, weight_decay=1e-5, frozen=True)
        return dataclasses.replace(settings, crop=self.crop, resolution=self.crop)

    def about(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "attributes": list(self.attributes)}

    def make_head(self, backbone: Backbone) -> nn.Module:
        outputs = len(self.attributes)
        if self.head == "probe":
            return ProbeHead(backbone.width, outputs)
        return PooledHead(backbone.width, len(backbone.blocks), outputs)

    def batch(self, samples: list[Sample], device: torch.device, *, rng: Draws | None) -> dict[str, Any]:
        """Crops, and labels where the samples have them.

        Returns:
            "images" float [B, 3, S, S] in 0..1; "labels" float [B, A] of 0, 1 or NaN (unknown).
        """
        matrices = torch.cat([self._matrix(sample) for sample in samples])
        mirrored = torch.zeros(len(samples), dtype=torch.bool)
        if rng is not None:
            moves = random_similarity(rng, self.crop, shift=SHIFT, rotation=ROTATION, scale=SCALE, normal=False)
            matrices = moves @ matrices
            mirrored = rng.chance(0.5) & self.flip
            mirror = torch.tensor([[-1.0, 0, self.crop - 1], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)
            matrices = torch.where(mirrored[:, None, None], mirror @ matrices, matrices)
        warp = RoiWarp(matrices, self.crop)
        shrink = warp.shrink()
        images = [image_to_device(sample["image"], device) for sample in samples]
        crops = warp.to(device).images(images, shrink=shrink)
        if rng is not None:
            gain = rng.uniform(1 - BRIGHTNESS, 1 + BRIGHTNESS).to(device)
            crops = (crops * gain[:, None, None, None]).clamp(0, 1)
        batch: dict[str, Any] = {"images": crops}
        if all("attributes" in sample for sample in samples):
            labels = torch.from_numpy(np.stack([sample["attributes"] for sample in samples])).float()
            labels = torch.where(mirrored[:, None], labels[:, _mirrored_order(self.attributes)], labels)
            batch["labels"] = labels.to(device)
        return batch

    def loss(self, outputs: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The mean over all labels, to which unknown ones add 0: so means of processes average to that of the batch."""
        labels = batch["labels"]
        losses = F.binary_cross_entropy_with_logits(outputs.float(), labels.nan_to_num(0.0), reduction="none")
        return {"loss": losses.masked_fill(labels.isnan(), 0.0).mean()}

    def metric(self) -> AttributesMetric:
        return AttributesMetric(self.attributes)

    def predict(self, outputs: Tensor, batch: dict[str, Any]) -> list[np.ndarray]:
        """Probabilities of yes, float32 [A]."""
        return list(outputs.detach().float().sigmoid().cpu().numpy())

    def draw(self, samples: Sequence[Sample], predictions: Sequence[Any], scores: Sequence[float]) -> Image.Image:
        """Image and wrong answers of each."""
        return draw_sheet(samples, predictions, scores, self.attributes)

    def _matrix(self, sample: Sample) -> Tensor:
        """[1, 3, 3] in float64, from pixels of the image to those of the crop.

        A "box" (left, top, right, bottom), of which labelled sets have none, is taken where there are no points.
        """
        if "points" in sample and (self.crop_from == "points" or self.frame is not None):
            points = torch.from_numpy(np.asarray(sample["points"], np.float64))[None]
            try:
                standard = align_to_points(points, self.crop, scale=FACE_SCALE)
            except ValueError as error:
                raise ValueError(f"{sample['name']}: {error}") from None
            if self.frame is None:
                return standard
            return similarity(points, torch.tensor(self.frame, dtype=torch.float64) * self.crop - 0.5)
        if "box" in sample:
            box = torch.from_numpy(np.asarray(sample["box"], np.float64))[None]
            return crop_box(box, self.crop, scale=BOX_SCALE, square=True)
        if self.crop_from == "points":
            raise ValueError(f"{sample['name']} has no five points, from which the crops of this model are made")
        return crop_whole([sample["image"].shape[:2]], self.crop)


class AttributesMetric:
    """`AttributeScores` of a task's batches."""

    def __init__(self, names: Sequence[str]) -> None:
        self.scores = AttributeScores(names)

    def update(self, outputs: Tensor, batch: dict[str, Any]) -> None:
        self.scores.update(outputs, batch["labels"])

    def state(self) -> Tensor:
        return self.scores.state()

    def load_state(self, state: Tensor) -> None:
        self.scores.load_state(state)

    def compute(self) -> dict[str, float]:
        """See `AttributeScores.compute`."""
        return self.scores.compute()


class ProbeHead(nn.Module):
    """A linear probe: the last class token, standardised by the statistics of the batch, and one linear layer.

    The standardisation (as in the probes of MAE, He et al. 2022) keeps it linear; without it features that hardly
    differ from image to image would be learnt slowly.
    """

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm = BatchNorm(width)
        self.classifier = nn.Linear(width, outputs)

    def forward(self, features: Features) -> Tensor:
        """Logits float32 [B, outputs], in float32 under autocast too."""
        token = features.class_tokens[-1]
        with torch.autocast(token.device.type, enabled=False):
            return self.classifier(self.norm(token.float()[..., None, None]).flatten(1))


class PooledHead(nn.Module):
    """facer's head: of each block the mean and the maximum over patches and the class token, a LayerNorm each, their
    sum with weights from a softmax, and one linear layer.

    Args:
        width: C of the features. blocks: their number.
    """

    def __init__(self, width: int, blocks: int, outputs: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3 * blocks))
        self.weights = nn.Parameter(torch.zeros(3 * blocks))
        self.classifier = nn.Linear(width, outputs)

    def forward(self, features: Features) -> Tensor:
        """Logits float32 [B, outputs], in float32 under autocast too: bfloat16 would tie most of the scores."""
        with torch.autocast(features.class_tokens[0].device.type, enabled=False):
            pooled = []
            for grid, token in zip(features.maps, features.class_tokens, strict=True):
                patches = grid.float().flatten(2)
                pooled += [patches.mean(2), patches.amax(2), token.float()]
            normed = torch.stack([norm(vector) for norm, vector in zip(self.norms, pooled, strict=True)])
            return self.classifier(torch.einsum("k,kbc->bc", self.weights.softmax(0), normed))


def open_set(path: str, *, split: Split) -> AttributeSet:
    """See `open_attribute_set`."""
    return open_attribute_set(path, split=split)


def make_task(train: LabelledSet, *, crop: int | None = None, head: str | None = None) -> AttributesTask:
    """The task of a set. Images are mirrored in training unless `is_mirrorable` denies it.

    Args:
        crop: side of the crops in pixels; None takes 224, of drawn faces 64. At most 128 means the short protocol.
        head: "probe", "frozen" or "full" (see `AttributesTask`); None takes "full".

    Raises:
        ValueError: another head.
    """
    about = train.about()
    if head is not None and head not in HEADS:
        raise ValueError(f"--head is {head!r}; use one of {', '.join(HEADS)}")
    names, drawn = tuple(about["attributes"]), about["layout"] == "faces"
    return AttributesTask(
        attributes=names,
        head=cast(Head, head or "full"),
        crop=crop or min(about.get("image_size", FULL.crop), DRAWN_CROP if drawn else FULL.crop),
        crop_from=about["crop_from"],
        frame=_pairs(about.get("frame")),
        flip=is_mirrorable(names),
        layout=about["layout"],
    )


def restore_task(about: dict[str, Any]) -> AttributesTask:
    """The task that said `about`."""
    fields: dict[str, Any] = {**about, "attributes": tuple(about["attributes"]), "frame": _pairs(about["frame"])}
    return AttributesTask(**fields)


def is_mirrorable(names: Sequence[str]) -> bool:
    """Whether the attributes of a mirrored image are known: each name with the word left or right has its partner."""
    return all((partner := _partner(name)) is None or partner in names for name in names)


def _mirrored_order(names: Sequence[str]) -> list[int]:
    """Which attribute of the image each attribute of the mirrored image is."""
    places = {name: index for index, name in enumerate(names)}
    return [places.get(_partner(name) or name, index) for index, name in enumerate(names)]


def _partner(name: str) -> str | None:
    """The name with left and right swapped; None where it has neither word ("Bright" is none)."""
    swap = {"left": "right", "Left": "Right", "LEFT": "RIGHT"}
    swap |= {right: left for left, right in swap.items()}
    swapped = _WORD.sub(lambda word: swap.get(word[0], word[0]), name)
    return None if swapped == name else swapped


def _pairs(points: Sequence[Sequence[float]] | None) -> tuple[tuple[float, float], ...] | None:
    return None if points is None else tuple((x, y) for x, y in points)
