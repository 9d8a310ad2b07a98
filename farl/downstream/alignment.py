"""Face alignment: N landmarks from N heatmaps. Protocol of FaRL (`farl/experiments/face_alignment`)."""

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

from farl.downstream.alignment_data import AFLW_SUBSETS, IBUG_SUBSETS, WFLW_SUBSETS, AlignmentSet, open_alignment_set
from farl.downstream.backbone import Backbone
from farl.downstream.color_augment import augment_colors
from farl.downstream.dense_head import Kind, check_kind, make_dense_head
from farl.downstream.draw_alignment import draw_sheet
from farl.downstream.draws import Draws
from farl.downstream.heatmaps import centroids, gaussian_maps, to_normalised, to_pixels
from farl.downstream.landmark_errors import EYE_CORNERS, LandmarkErrors
from farl.downstream.task import LabelledSet, Sample, Split, TuneSettings
from farl.downstream.warp import RoiWarp, crop_box, crop_whole, image_to_device, random_similarity

# FaRL's shifts (share of the side), rotations (radians) and scales of a crop in training, all uniform.
SHIFT, ROTATION, SCALE = 0.05, 0.174, 0.1
NOISE_CHANCE, NOISE_MOST = 0.5, 0.5
# Sides of the black rectangle as shares of the crop's: the width differs from the height by at most `OCCLUSION_ASPECT`.
OCCLUSION, OCCLUSION_ASPECT = (0.1, 0.4), 0.1
# Of the head, at most: FaRL's, and what a CPU can train.
CHANNELS, SMALL_CHANNELS = 768, 64


@dataclass(frozen=True)
class Protocol:
    """What differs between benchmarks.

    Attributes:
        settings: of the training.
        scale: of the face's box in the crop, in evaluation; in training it is the mean.
        stretch: the box fills the crop even if it is not square (FaRL on AFLW-19), else its longer side counts.
        antialias: shrink images by means where the crop is much smaller (FaRL does not).
        kinds: of normalisation, the main metric's first; see `unit_lengths`.
        curve: kind and threshold of failure rate and AUC.
        subsets: reported besides the whole set.
        heatmap, radius: side of the target maps and radius of their bumps, in their pixels.
        channels: of the head, at most.
        start: logit of the maps at the start. At FaRL's 0 some hundred updates go by until they are empty but for their
            bumps.
    """

    settings: TuneSettings
    scale: float = 0.8
    stretch: bool = False
    antialias: bool = False
    kinds: tuple[str, ...] = ("inter_ocular", "inter_pupil")
    curve: tuple[str, float] = ("inter_ocular", 0.1)
    subsets: tuple[str, ...] = ()
    heatmap: int = 128
    radius: float = 5.0
    channels: int = CHANNELS
    start: float = 0.0


def _paper(epochs: int) -> TuneSettings:
    return TuneSettings(epochs=epochs, lr_head=1e-2)


# Of a user's own points.
OWN_LAYOUTS = ("folder", "shards", "faces")
OWN = Protocol(_paper(250), antialias=True, kinds=("diagonal", "box"), curve=("box", 0.07))
PROTOCOLS = {
    "aflw-19": Protocol(
        _paper(150),
        scale=1.0,
        stretch=True,
        kinds=("diagonal", "box"),
        curve=("box", 0.07),
        subsets=AFLW_SUBSETS,
    ),
    "300w": Protocol(_paper(250), subsets=IBUG_SUBSETS),
    "wflw": Protocol(_paper(150), subsets=WFLW_SUBSETS),
    "folder": OWN,
    "shards": OWN,
    # Small drawn faces, for models that train on a CPU.
    "faces": dataclasses.replace(
        OWN,
        settings=TuneSettings(
            epochs=10,
            batch=32,
            lr_backbone=5e-4,
            lr_head=5e-3,
            weight_decay=0.01,
            schedule="cosine",
            warmup=50,
            ema=0.99,
            resolution=64,
        ),
        heatmap=16,
        radius=2.0,
        channels=SMALL_CHANNELS,
        start=-5.0,
    ),
}


@dataclass(frozen=True)
class AlignmentTask:
    """Crops by box, heatmaps, points by centroids; figures in pixels of the original images.

    Attributes:
        points: number of landmarks.
        layout: of the training set, which decides the protocol.
        crop: side of the crops in pixels.
        head: FaRL's neck and UPerNet, or one linear layer.
    """

    points: int
    layout: str
    crop: int
    head: Kind = "upernet"

    name = "alignment"
    higher_is_better = False

    @property
    def rules(self) -> Protocol:
        """The benchmark's, and for sets of a user the distances of the eyes where the points have them."""
        rules = PROTOCOLS[self.layout]
        if self.layout in OWN_LAYOUTS and self.points in EYE_CORNERS:
            kinds = (*rules.kinds, "inter_ocular", "inter_pupil")
            return dataclasses.replace(rules, kinds=kinds, curve=("inter_ocular", 0.1))
        return rules

    @property
    def main_metric(self) -> str:
        return f"nme_{self.rules.kinds[0]}"

    @property
    def protocol(self) -> TuneSettings:
        return dataclasses.replace(self.rules.settings, crop=self.crop)

    def about(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def make_head(self, backbone: Backbone) -> nn.Module:
        """A map for each landmark; see `make_dense_head`."""
        rules = self.rules
        return make_dense_head(self.head, backbone, self.points, channels=rules.channels, start=rules.start)

    def batch(self, samples: list[Sample], device: torch.device, *, rng: Draws | None) -> dict[str, Any]:
        """Crops, and labels where the samples have points.

        Returns:
            "images" float [B, 3, S, S] in 0..1; "warp": the `RoiWarp`; "points": normalised points of the crops,
            float32 [B, N, 2]; in evaluation also "original": the samples, without their images.
        """
        rules = self.rules
        scale = rules.scale if rng is None else 1.0
        matrices = torch.cat([_matrix(sample, self.crop, scale, square=not rules.stretch) for sample in samples])
        if rng is not None:
            moves = random_similarity(
                rng, self.crop, shift=SHIFT, rotation=ROTATION, scale=SCALE, mean_scale=rules.scale, normal=False
            )
            matrices = moves @ matrices
        warp = RoiWarp(matrices, self.crop)
        shrink = warp.shrink() if rules.antialias else None
        batch: dict[str, Any] = {"warp": warp}
        if all("points" in sample for sample in samples):
            points = torch.from_numpy(np.stack([_points(sample, self.points) for sample in samples]))
            # In float64 and before the move to the device: points of large images keep their hundredths.
            batch["points"] = to_normalised(warp.points(points), self.crop).float().to(device, non_blocking=True)
            if rng is None:
                batch["original"] = [{key: sample[key] for key in sample if key != "image"} for sample in samples]
        images = [image_to_device(sample["image"], device) for sample in samples]
        crops = warp.to(device).images(images, shrink=shrink)
        if rng is not None:
            crops = augment_colors(blend_noise(occlude(crops, rng), rng), rng)
        return batch | {"images": crops}

    def loss(self, outputs: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Mean Euclidean distance in sides of the crop, plus binary cross-entropy of the resized maps."""
        rules, points = self.rules, batch["points"]
        distance = torch.linalg.vector_norm(centroids(outputs) - points, dim=-1).mean()
        size = (rules.heatmap, rules.heatmap)
        logits = F.interpolate(outputs.float(), size, mode="bilinear", align_corners=False)
        with torch.no_grad():
            target = gaussian_maps(points, rules.heatmap, rules.radius)
        maps = F.binary_cross_entropy_with_logits(logits, target)
        return {"loss": distance + maps, "loss_points": distance, "loss_maps": maps}

    def metric(self) -> AlignmentMetric:
        return AlignmentMetric(self)

    def predict(self, outputs: Tensor, batch: dict[str, Any]) -> list[np.ndarray]:
        """Points float64 [N, 2] in pixels of the original images; they may lie outside."""
        points = to_pixels(centroids(outputs).double().cpu(), self.crop)
        return list(batch["warp"].points_back(points).numpy())

    def draw(self, samples: Sequence[Sample], predictions: Sequence[Any], scores: Sequence[float]) -> Image.Image:
        """True and found points over each face."""
        return draw_sheet(samples, predictions, scores)


class AlignmentMetric:
    """See `LandmarkErrors`."""

    def __init__(self, task: AlignmentTask) -> None:
        rules = task.rules
        self.errors, self._task = LandmarkErrors(rules.kinds, rules.curve, rules.subsets), task

    def update(self, outputs: Tensor, batch: dict[str, Any]) -> None:
        original = batch["original"]
        points, boxes = (np.stack([sample[key] for sample in original]).astype(np.float64) for key in ("points", "box"))
        found = np.stack(self._task.predict(outputs, batch))
        self.errors.update(found, points, boxes, [sample.get("subsets", ()) for sample in original])

    def state(self) -> Tensor:
        return self.errors.state()

    def load_state(self, state: Tensor) -> None:
        self.errors.load_state(state)

    def compute(self) -> dict[str, float]:
        """See `LandmarkErrors`."""
        return self.errors.compute()


def occlude(images: Tensor, draws: Draws) -> Tensor:
    """One black rectangle in each image, centred anywhere in it.

    Args:
        images: float [B, 3, S, S]. draws: of B samples.
    """
    side = images.shape[-1]
    height = draws.uniform(*OCCLUSION)
    width = height + draws.uniform(-OCCLUSION_ASPECT, OCCLUSION_ASPECT)
    reach = torch.stack([width, height], 1) * side / 2
    center = draws.uniform(0, side - 1, (2,))
    first, last = ((center + sign * reach).round().to(images.device) for sign in (-1, 1))
    axis = torch.arange(side, device=images.device)
    x, y = ((axis >= first[:, i, None]) & (axis <= last[:, i, None]) for i in range(2))
    return images.masked_fill((y[:, None, :, None] & x[:, None, None, :]), 0)


def blend_noise(images: Tensor, draws: Draws) -> Tensor:
    """Every second image by chance is mixed with uniform noise, at a uniform share of at most a half.

    Args:
        images: float [B, 3, S, S] in 0..1. draws: of B samples.
    """
    chosen = draws.chance(NOISE_CHANCE).tolist()
    shares = draws.uniform(0, NOISE_MOST).tolist()
    blended = []
    for image, is_chosen, share, seed in zip(images, chosen, shares, draws.integers(0, 2**31).tolist(), strict=True):
        if is_chosen:
            # Drawn on the device: a generator of its own for each image keeps it apart from the rest of the batch.
            generator = torch.Generator(images.device).manual_seed(seed)
            noise = torch.rand(image.shape, generator=generator, device=images.device, dtype=images.dtype)
            image = torch.lerp(image, noise, share)
        blended.append(image)
    return torch.stack(blended)


def open_set(path: str, *, split: Split) -> AlignmentSet:
    """See `open_alignment_set`."""
    return open_alignment_set(path, split=split)


def make_task(train: LabelledSet, *, crop: int | None = None, head: str | None = None) -> AlignmentTask:
    """The task of a set, as FaRL has it for AFLW-19, 300W and WFLW.

    Args:
        crop: side of the crops in pixels; None takes 512, or the size of drawn faces.
        head: "upernet" (FaRL's; what None takes) or "linear".
    """
    about = train.about()
    default = about["image_size"] if about["layout"] == "faces" else TuneSettings.crop
    return AlignmentTask(points=about["points"], layout=about["layout"], crop=crop or default, head=check_kind(head))


def restore_task(about: dict[str, Any]) -> AlignmentTask:
    """The task that said `about`."""
    return AlignmentTask(**about)


def _matrix(sample: Sample, crop: int, scale: float, *, square: bool) -> Tensor:
    """[1, 3, 3] in float64, from the face's box; the whole image where there is none."""
    if "box" not in sample:
        return crop_whole([sample["image"].shape[:2]], crop)
    box = torch.from_numpy(np.asarray(sample["box"], np.float64))[None]
    try:
        return crop_box(box, crop, scale=scale, square=square)
    except ValueError as error:
        raise ValueError(f"{sample['name']}: {error}") from None


def _points(sample: Sample, count: int) -> np.ndarray:
    points = np.asarray(sample["points"], np.float64)
    if points.shape != (count, 2):
        raise ValueError(f"{sample['name']} has points of shape {list(points.shape)}; the task has {count}")
    return points
