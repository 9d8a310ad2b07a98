"""What a downstream task is to the fine-tuning loop, to the command and to `farl.predict`.

A module `farl.downstream.NAME` (NAME is a task's name) offers the functions of `TaskModule`; nothing else of it is
called by name. Arrays and tensors: images are RGB, uint8 [H, W, 3] in samples and float [B, 3, S, S] in 0..1 in
batches; label maps are uint8; points are (x, y) in pixels with pixel centres at whole numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from farl.downstream.backbone import Backbone
from farl.downstream.draws import Draws

# "image" uint8 [H, W, 3] (upright whatever EXIF says), "name" (str, for people), and the task's labels as numpy arrays.
# The loop adds "index" (int), the position in the set.
Sample = dict[str, Any]
Split = Literal["train", "test"]


@dataclass(frozen=True)
class TuneSettings:
    """A protocol: the settings of a fine-tuning run. The defaults are FaRL's common ones.

    Attributes:
        epochs: passes over the training set (at a smaller fraction too, with the samples repeated).
        batch: images an update, over all processes.
        lr_backbone: of the last block used; earlier ones get `layer_decay` times the next one's.
        schedule: "multistep" (times 0.1 at each of `milestones`, in epochs) or "cosine" (to 0 at the end).
        warmup: updates of linear warm-up.
        ema: decay of the averaged weights, which are what is evaluated; 0 evaluates the weights themselves.
        resolution: side, in pixels, that the backbone sees.
        crop: side, in pixels, of the task's input and of what its loss compares.
        frozen: leave the backbone as it is and train the head alone.
    """

    epochs: int
    batch: int = 40
    lr_backbone: float = 1e-4
    lr_head: float = 1e-3
    layer_decay: float = 1.0
    weight_decay: float = 1e-5
    schedule: Literal["multistep", "cosine"] = "multistep"
    milestones: tuple[int, ...] = (200,)
    warmup: int = 0
    ema: float = 0.999
    resolution: int = 448
    crop: int = 512
    frozen: bool = False


def fingerprint(files: Iterable[tuple[str, int]]) -> str:
    """What tells one set of files from another: a hash of their names and sizes in bytes, in the given order."""
    digest = hashlib.sha256()
    for name, size in files:
        digest.update(f"{Path(name).as_posix()}\0{size}\0".encode())
    return digest.hexdigest()


class LabelledSet(Protocol):
    """Labelled images: cheap to open, decoded on access, read by several threads at once."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """One sample. ValueError or OSError that names the file where it is broken."""
        ...

    def about(self) -> dict[str, Any]:
        """Plain values for reports and for `TaskModule.make_task`.

        "path", "layout" (such as "lapa", "folder", "shards"), "samples", "fingerprint" (see `fingerprint`), and what
        the labels are, such as "classes" (names) or "points" (their number).
        """
        ...


class OpenedSet(LabelledSet, Protocol):
    """A labelled set that was opened from files."""

    def sources(self) -> Sequence[Hashable]:
        """Where each sample comes from: equal for the same face of the same file, whichever set it is in."""
        ...


class Metric(Protocol):
    """One pass of evaluation. It holds sums alone, so that those of several processes can be added."""

    def update(self, outputs: Any, batch: dict[str, Any]) -> None:
        """Count a batch: what the head gave for it, and the batch as `Task.batch` made it."""
        ...

    def state(self) -> Tensor:
        """All sums, float64 on the CPU, of a fixed length."""
        ...

    def load_state(self, state: Tensor) -> None:
        """Put sums back."""
        ...

    def compute(self) -> dict[str, float]:
        """The figures, `Task.main_metric` among them; NaN where nothing was counted."""
        ...


class Task(Protocol):
    """A task: data to tensors, loss, figures, predictions, pictures. It has no weights; those are in its head."""

    @property
    def name(self) -> str:
        """As the module `farl.downstream.NAME` is called."""
        ...

    @property
    def main_metric(self) -> str:
        """The figure by which the best evaluation is chosen."""
        ...

    @property
    def higher_is_better(self) -> bool:
        """Whether more of `main_metric` is better."""
        ...

    @property
    def protocol(self) -> TuneSettings:
        """Settings of a run for which nothing else is said."""
        ...

    def about(self) -> dict[str, Any]:
        """Plain values from which `TaskModule.restore_task` makes the same task; they lie in each checkpoint."""
        ...

    def make_head(self, backbone: Backbone) -> nn.Module:
        """A head whose forward takes `Features` and gives outputs at its own stride."""
        ...

    def batch(self, samples: list[Sample], device: torch.device, *, rng: Draws | None) -> dict[str, Any]:
        """The task's input on `device`: "images" float [B, 3, S, S] in 0..1, and labels.

        `rng` draws the augmentation of training (every draw has a row a sample); None is plain, for evaluation.
        Samples without labels are for `predict` alone.
        """
        ...

    def loss(self, outputs: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """ "loss" and its parts: 0-d means over the batch, computed in float32 (`outputs` may be bfloat16)."""
        ...

    def metric(self) -> Metric:
        """A new one, at zero."""
        ...

    def predict(self, outputs: Any, batch: dict[str, Any]) -> list[Any]:
        """For each image, in the ORIGINAL image's coordinates: label map uint8 [H, W], points float [N, 2], or
        probabilities float [A]; numpy arrays."""
        ...

    def draw(self, samples: Sequence[Sample], predictions: Sequence[Any], scores: Sequence[float]) -> Image.Image:
        """A sheet of the samples in the given order (worst first), each with its value of `main_metric`."""
        ...


class TaskModule(Protocol):
    """The functions of a module `farl.downstream.{parsing,alignment,attributes}`."""

    def open_set(self, path: str, *, split: Split) -> OpenedSet:
        """A benchmark's own layout, a plain folder, or a glob of our shards; `split` counts where a layout has several.

        ValueError: `path` is none of those; the message says what was looked for.
        """
        ...

    def make_task(self, train: LabelledSet, **options: Any) -> Task:
        """The task that fits the labels of `train`, with the protocol of its layout.

        `crop` (int, pixels) is an option of every task; others are keyword-only parameters with the names that the
        command's options have (`warp`, `head`), and only given ones are passed.
        """
        ...

    def restore_task(self, about: dict[str, Any]) -> Task:
        """The task that said `about`."""
        ...
