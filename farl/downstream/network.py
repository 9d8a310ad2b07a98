"""Backbone and head as one module, and the files that hold a trained one."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from farl.downstream.backbone import Backbone, restore_backbone
from farl.downstream.task import Task, TaskModule
from farl.model.weight_files import read_weights

TASKS = ("parsing", "alignment", "attributes")


class Network(nn.Module):
    """A backbone and the head of a task. A frozen backbone stays in evaluation mode."""

    def __init__(self, backbone: Backbone, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Any:
        """float [B, 3, H, W] in 0..1 to what the head gives."""
        return self.head(self.backbone(images))

    def train(self, mode: bool = True) -> Network:
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.backbone.parameters()):
            self.backbone.eval()
        return self


def task_module(name: str) -> TaskModule:
    """`farl.downstream.NAME`. ValueError where there is no such task."""
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}; use one of {', '.join(TASKS)}")
    return importlib.import_module(f"farl.downstream.{name}")  # type: ignore[return-value]


def describe_network(task: Task, network: Network) -> dict[str, Any]:
    """Plain values from which `load_network` builds the same task and architecture."""
    return {"task": task.name, "task_about": task.about(), "backbone": network.backbone.about()}


def save_network(path: Path, about: dict[str, Any], weights: dict[str, Tensor], **more: Any) -> None:
    """Write a trained network for `load_network`; `more` holds plain values to keep beside it. Whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    torch.save({"about": about, "ema": weights, **more}, temporary)
    temporary.replace(path)


def load_network(path: str | Path) -> tuple[Task, Network]:
    """The task and the averaged weights of a fine-tuning run, in fp32 on the CPU, in evaluation mode.

    Args:
        path: its folder (the last epoch's weights), its last.pt or best.pt, or one of its checkpoints.

    Raises:
        ValueError: not a file of a fine-tuning run. OSError: it cannot be read.
    """
    path = Path(path)
    content = read_weights(path / "last.pt" if (path / "last.pt").is_file() else path)
    if "ema" not in content or "about" not in content:
        raise ValueError(f"{path} holds no network of farl.finetune; give the folder of a finished run, or its best.pt")
    about = content["about"]
    task = task_module(about["task"]).restore_task(about["task_about"])
    backbone = restore_backbone(about["backbone"])
    network = Network(backbone, task.make_head(backbone))
    try:
        network.load_state_dict(content["ema"])
    except RuntimeError:
        raise ValueError(
            f"the weights in {path} do not fit the head that this version builds for them; fine-tune again with it"
        ) from None
    return task, network.eval()
