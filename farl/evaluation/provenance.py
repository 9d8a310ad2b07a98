"""What a report says of its own making: the checkpoint, the data, the versions."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

import farl
from farl.evaluation.features import Features
from farl.model import FaRL
from farl_engine.checkpoint import CheckpointStore
from farl_engine.data import ShardIndex


def describe_checkpoint(path: str, model: FaRL) -> dict[str, Any]:
    """Path, number of parameters and sizes, and of a run folder the step of its latest checkpoint."""
    description: dict[str, Any] = {"path": path}
    if Path(path).is_dir():
        stores = (CheckpointStore(folder) for folder in (Path(path) / "checkpoints", Path(path)))
        description["step"] = next((step for store in stores if (step := store.latest()) is not None), None)
    description["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    description["model"] = model.config.to_dict()
    return description


def describe_data(path: str, index: ShardIndex, features: Features) -> dict[str, Any]:
    """Shards, fingerprint, how many samples there are, how many were taken, and what was wrong with others."""
    return {
        "shards": path,
        "number_of_shards": len(index.shard_names),
        "fingerprint": index.fingerprint,
        "samples": len(index),
        "evaluated": len(features.positions),
        "bad": features.bad,
        "problems": dict(index.problems),
    }


def describe_versions(device: torch.device) -> dict[str, str]:
    """Versions of what computed the figures, and where."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "farl": farl.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "device": f"{device.type} ({where})",
    }
