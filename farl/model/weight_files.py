"""Reading of files of weights, without executing anything that they hold."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def read_weights(path: Path) -> Mapping[str, Any]:
    """What a file of weights holds: names and tensors, or a dict of torch.save that has them somewhere in it.

    Args:
        path: a .safetensors file, a file of torch.save, or a folder with checkpoints, of which the latest is read. Of a
            .safetensors file of `farl.export` the result is {"model": weights, "model_config": sizes}.

    Raises:
        ValueError: not such a file. OSError: it cannot be read at all.
    """
    if path.is_dir():
        path = _latest_of_run(path)
    if not path.exists():
        raise FileNotFoundError(2, "no such file", str(path))
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if _is_torchscript(path):
        raise ValueError(
            f"{path} is a TorchScript archive, which is not opened because it may hold code; if you trust it, convert "
            "it once: torch.save(torch.jit.load(path, map_location='cpu').state_dict(), 'weights.pt')"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        wanted = "wanted a state dict of torch.save, a .safetensors file or a run folder"
        raise ValueError(f"{path} cannot be read as weights ({reason}): {wanted}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dict of weights")
    return content


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            # `farl.export` writes the sizes beside the weights.
            recorded = (file.metadata() or {}).get("model_config")
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
    return weights if recorded is None else {"model": weights, "model_config": json.loads(recorded)}


def _latest_of_run(folder: Path) -> Path:
    from farl_engine.checkpoint import CheckpointStore

    for directory in (folder / "checkpoints", folder):
        store = CheckpointStore(directory)
        step = store.latest()
        if step is not None:
            return store.path(step)
    raise ValueError(f"{folder} is a folder without checkpoints: name a file or the folder of a training run")


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") or "/code/" in name for name in archive.namelist())
