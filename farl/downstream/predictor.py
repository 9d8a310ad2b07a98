"""A trained network from Python: images to label maps, points or probabilities, and parsing inside a loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from farl.downstream.attributes import AttributesTask
from farl.downstream.given_faces import Face, landmarks_box, make_face
from farl.downstream.image_files import read_image
from farl.downstream.network import Network, load_network
from farl.downstream.parsing import BOX_SCALE, ParsingTask, original_logits
from farl.downstream.task import Sample, Task
from farl.downstream.warp import RoiWarp, crop_face

ImageLike = str | Path | Image.Image | NDArray[np.uint8]


class Predictor:
    """A task and its network, in evaluation mode on a device.

    Args:
        device: "auto" takes a GPU where there is one.
        batch: faces a forward pass.
        bf16: compute in bfloat16 by autocast; None does so on a GPU.
    """

    def __init__(
        self, task: Task, network: Network, *, device: str = "auto", batch: int = 8, bf16: bool | None = None
    ) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError("there is no CUDA device here: use the device cpu")
        self.task, self.device, self.batch = task, torch.device(device), batch
        self.network = network.to(self.device).eval()
        self.bf16 = self.device.type == "cuda" if bf16 is None else bf16

    @classmethod
    def load(cls, path: str | Path, *, device: str = "auto", batch: int = 8, bf16: bool | None = None) -> Predictor:
        """From a run folder of `farl.finetune`, its last.pt or best.pt. The weights take no gradients.

        Raises:
            ValueError: not a file of such a run. OSError: it cannot be read.
        """
        task, network = load_network(path)
        return cls(task, network.requires_grad_(False), device=device, batch=batch, bf16=bf16)

    @property
    def names(self) -> tuple[str, ...]:
        """Classes of a parser by number, or attributes; empty for points."""
        if isinstance(self.task, ParsingTask):
            return self.task.classes
        return self.task.attributes if isinstance(self.task, AttributesTask) else ()

    @property
    def needs_face(self) -> bool:
        """Whether the crops of the model are made from a face and cannot be whole images."""
        return isinstance(self.task, AttributesTask) and self.task.crop_from == "points"

    def __call__(
        self,
        images: ImageLike | Sequence[ImageLike],
        boxes: Sequence[Any] | None = None,
        points: Sequence[Any] | None = None,
    ) -> list[NDArray[Any]]:
        """Predict one face in each image; name an image again for its other faces.

        Args:
            images: files, PIL images (turned upright already), or uint8 arrays [H, W, 3] in RGB.
            boxes: for each image (left, top, right, bottom) or None. points: for each image [5, 2] (or 68, 98, 106
                landmarks) or None. Without either the whole image is taken. Pixels of the upright image.

        Returns:
            For each image a label map uint8 [H, W], points float64 [N, 2] in its pixels, or probabilities float32 [A].

        Raises:
            ValueError: an image, box or points that cannot be used. OSError: a file cannot be read.
        """
        listed = [images] if isinstance(images, (str, Path, Image.Image, np.ndarray)) else list(images)
        for name, given in (("boxes", boxes), ("points", points)):
            if given is not None and len(given) != len(listed):
                raise ValueError(f"{len(given)} {name} for {len(listed)} images; give one, or None, for each")
        results: list[NDArray[Any]] = []
        for first in range(0, len(listed), self.batch):
            samples = []
            for index in range(first, min(first + self.batch, len(listed))):
                box, five = (None if given is None else given[index] for given in (boxes, points))
                face = None if box is None and five is None else make_face(box, five)
                samples.append(self.sample(_pixels(listed[index]), face, f"image {index}"))
            results += self.predict(samples)[0]
        return results

    def sample(self, image: NDArray[np.uint8], face: Face | None, name: str) -> Sample:
        """What the task makes its crop from; a face of None is the whole image.

        Raises:
            ValueError: the model needs a face.
        """
        sample: Sample = {"image": image, "name": name}
        if face is None:
            if self.needs_face:
                raise ValueError(f"{name}: the crops of this model are made from five points; give them, or a box")
            return sample
        if self.task.name == "alignment":
            # The points of its samples are labels. Aligners learn from boxes around landmarks; those of detectors are
            # larger, so five points make the better box.
            return sample | {"box": landmarks_box(face["points"]) if "points" in face else face["box"]}
        if self.task.name == "attributes" and "box" not in face:
            return sample | face | {"box": landmarks_box(face["points"])}
        return sample | face

    @torch.no_grad()
    def predict(self, samples: list[Sample]) -> tuple[list[NDArray[Any]], Tensor]:
        """Predictions of the samples in one pass, and their crops: float [B, 3, S, S] in 0..1."""
        batch = self.task.batch(samples, self.device, rng=None)
        return self.task.predict(self._outputs(batch["images"]), batch), batch["images"]

    def logits(self, images: Tensor, *, boxes: Tensor | None = None, points: Tensor | None = None) -> Tensor:
        """Logits of a parser for whole images, differentiable to the images: for use inside a loss.

        Args:
            images: float [B, 3, H, W], RGB in 0..1. boxes: [B, 4]. points: [B, 5, 2]. Pixels, as above; without either
                the whole images are taken.

        Returns:
            float32 [B, C, H, W] on the predictor's device; all 0 where the crop does not reach.

        Raises:
            ValueError: not a parser; other shapes; boxes and points both.
        """
        if not isinstance(self.task, ParsingTask):
            raise ValueError(f"logits of whole images are for parsing; this is a network for {self.task.name}")
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images must be float [B, 3, H, W] in 0..1, not {images.dtype} {list(images.shape)}")
        count, size, crop = len(images), (images.shape[2], images.shape[3]), self.task.crop
        if boxes is not None and points is not None:
            raise ValueError("give boxes or points, not both")
        for given in (boxes, points):
            if given is not None and len(given) != count:
                raise ValueError(f"{len(given)} faces for {count} images; give one for each")
        points, boxes = (given if given is None else given.cpu() for given in (points, boxes))
        matrices = crop_face([size] * count, crop, points=points, boxes=boxes, box_scale=BOX_SCALE)
        warp = RoiWarp(matrices, crop, self.task.warp)
        shrink = warp.shrink() if self.task.antialias else None
        warp = warp.to(self.device)
        outputs = self._outputs(warp.images(images.to(self.device).float(), shrink=shrink))
        batch = {"warp": warp, "sizes": [size] * count}
        return torch.stack([original_logits(outputs, batch, index) for index in range(count)])

    def _outputs(self, crops: Tensor) -> Any:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.network(crops)


def _pixels(image: ImageLike) -> NDArray[np.uint8]:
    if isinstance(image, (str, Path)):
        return read_image(Path(image))
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise ValueError(f"an image must be uint8 [H, W, 3], not {pixels.dtype} {list(pixels.shape)}")
    return pixels
