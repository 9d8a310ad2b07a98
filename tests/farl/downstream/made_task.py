"""A tiny task for tests of the shared parts: the mean colour of an image. Run as a program it is `farl.finetune` with
this task in the place of parsing."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from farl.downstream.task import TuneSettings, fingerprint


class Colours:
    """Images of noise around a colour; a broken one says so when it is decoded."""

    def __init__(self, path: str, count: int, broken: int | None = None) -> None:
        self.path, self.count, self.broken = path, count, broken
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == self.broken:
            raise ValueError(f"{index:04d}.jpg is cut short")
        self.read.append(index)
        random = np.random.default_rng(index)
        colour = random.uniform(0.2, 0.8, 3)
        image = np.clip(colour + random.normal(0, 0.1, (12, 10, 3)), 0, 1)
        return {"image": (image * 255).astype(np.uint8), "name": f"{index:04d}.jpg", "colour": colour}

    def sources(self) -> list[tuple[str, int]]:
        return [(self.path, index) for index in range(self.count)]

    def about(self) -> dict[str, Any]:
        files = fingerprint((f"{index}.jpg", index) for index in range(self.count))
        return {"path": self.path, "layout": "made", "samples": self.count, "fingerprint": files, "points": 1}


class Error:
    """Mean distance of the colours; also the sum of the indices seen, to tell which they were."""

    def __init__(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64)

    def update(self, outputs: torch.Tensor, batch: dict[str, Any]) -> None:
        error = (outputs.float() - batch["colour"]).norm(dim=1).double().sum()
        self.sums += torch.stack([error, torch.tensor(float(len(outputs))), batch["index"].double().sum()]).double()

    def state(self) -> torch.Tensor:
        return self.sums.clone()

    def load_state(self, state: torch.Tensor) -> None:
        self.sums = state.clone()

    def compute(self) -> dict[str, float]:
        error, count, indices = self.sums.tolist()
        return {"error": error / count if count else float("nan"), "images": count, "sum_of_indices": indices}


class Head(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(width, 3)

    def forward(self, features: Any) -> torch.Tensor:
        return self.linear(self.dropout(self.norm(features.maps[-1].mean((2, 3)) + features.class_tokens[-1])))


class ColourTask:
    name = "parsing"
    main_metric = "error"
    higher_is_better = False

    def __init__(self, crop: int, head: str) -> None:
        self.head = head
        self.protocol = TuneSettings(
            epochs=2, batch=4, lr_backbone=1e-3, lr_head=1e-2, resolution=32, crop=crop, milestones=(1,)
        )

    def about(self) -> dict[str, Any]:
        return {"crop": self.protocol.crop, "head": self.head}

    def make_head(self, backbone: Any) -> nn.Module:
        return Head(backbone.width, 0.5 if self.head == "dropout" else 0.0)

    def batch(self, samples: list[dict[str, Any]], device: torch.device, *, rng: Any) -> dict[str, Any]:
        crop = self.protocol.crop
        images = torch.stack([torch.from_numpy(sample["image"]).permute(2, 0, 1) / 255 for sample in samples])
        images = nn.functional.interpolate(images, (crop, crop), mode="bilinear", antialias=True)
        colour = torch.tensor(np.stack([sample["colour"] for sample in samples]), dtype=torch.float32)
        if rng is not None:
            change = 0.1 * rng.normal(shape=(3,))
            images, colour = images + change[:, :, None, None], colour + change
        index = torch.tensor([sample["index"] for sample in samples])
        return {"images": images.to(device), "colour": colour.to(device), "index": index.to(device)}

    def loss(self, outputs: torch.Tensor, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        loss = (outputs.float() - batch["colour"]).square().mean()
        return {"loss": loss, "loss_double": 2 * loss}

    def metric(self) -> Error:
        return Error()

    def predict(self, outputs: torch.Tensor, batch: dict[str, Any]) -> list[Any]:
        return list(outputs.float().cpu().numpy())

    def draw(self, samples: Any, predictions: Any, scores: Any) -> Image.Image:
        assert list(scores) == sorted(scores, reverse=not self.higher_is_better)
        sheet = np.concatenate([sample["image"] for sample in samples])
        return Image.fromarray(sheet)


def open_set(path: str, *, split: str) -> Colours:
    """ "made:COUNT" or "made:COUNT:BROKEN"."""
    kind, *numbers = path.split(":")
    if kind != "made":
        raise ValueError(f"{path} is no made set")
    return Colours(path, *map(int, numbers))


def make_task(train: Colours, *, crop: int = 32, head: str = "plain") -> ColourTask:
    return ColourTask(crop, head)


def restore_task(about: dict[str, Any]) -> ColourTask:
    return ColourTask(about["crop"], about["head"])


if __name__ == "__main__":
    from farl import cli
    from farl.finetune import main

    sys.modules["farl.downstream.parsing"] = sys.modules["__main__"]
    cli.run(main, "farl.finetune")
