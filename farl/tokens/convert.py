"""OpenAI's `encoder.pkl`, a pickled module, turned into a safetensors file without running anything that it holds.

A pickle names functions and calls them. This reader resolves every name to a stand-in of its own, made anew for each
file, and refuses all others; nothing of torch, of `dall_e` or of the standard library can be reached from the file. It
reads both formats of `torch.save`: the zip archive and, of torch before 1.6, a row of pickles followed by the storages.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors.torch import save_file

from farl.tokens.dalle import DalleEncoder

_MODULES = (
    "dall_e.encoder.Encoder",
    "dall_e.encoder.EncoderBlock",
    "dall_e.utils.Conv2d",
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.pooling.MaxPool2d",
)
_DTYPES = {"HalfStorage": np.dtype("<f2"), "FloatStorage": np.dtype("<f4"), "DoubleStorage": np.dtype("<f8")}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def convert_encoder_pickle(path: str | Path, out: str | Path) -> DalleEncoder:
    """Read OpenAI's `encoder.pkl` (or a saved state dict of it) and write its weights to `out` as safetensors.

    The package `dall_e` is not needed.

    Returns:
        The encoder, loaded from what was written.

    Raises:
        ValueError: `path` is missing, is no such file, or names anything but the encoder's classes; or `out` lies in no
            folder.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    if not Path(out).parent.is_dir():
        raise ValueError(f"{out}: the folder {Path(out).parent} is not there; make it first")
    try:
        state = _read(Path(path))
        DalleEncoder.from_state_dict(state)
    except Exception as error:  # whatever a hostile or broken file makes the reader raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: not OpenAI's encoder.pkl: {reason}") from error
    save_file(state, out, metadata={"format": "pt", "model": "dall_e.encoder.Encoder"})
    return DalleEncoder.from_file(out)


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def load(self, values: np.ndarray) -> torch.Tensor:
        """A contiguous fp32 copy; torch refuses a view that leaves the storage."""
        whole = torch.from_numpy(values.astype(np.float32))
        return whole.as_strided(self.size, self.stride, self.offset).clone(memory_format=torch.contiguous_format)


class _InertUnpickler(pickle.Unpickler):
    """Builds dictionaries, stand-ins for modules, and descriptions of tensors."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="latin1")

        class Module:
            """Takes the attributes of a pickled module."""

        def tensor(storage: _Storage, offset: int, size: Any, stride: Any, *_: object) -> _Tensor:
            return _Tensor(storage, int(offset), tuple(size), tuple(stride))

        self._names: dict[str, Any] = dict.fromkeys(_MODULES, Module)
        self._names |= {f"torch.{name}": dtype for name, dtype in _DTYPES.items()}
        self._names |= {
            "collections.OrderedDict": OrderedDict,
            "builtins.set": set,
            "__builtin__.set": set,  # its name in pickles of protocol 2
            "torch.device": lambda *_: None,
            "torch._utils._rebuild_tensor": tensor,
            "torch._utils._rebuild_tensor_v2": tensor,
            "torch._utils._rebuild_parameter": lambda data, *_: data,
        }

    def find_class(self, module: str, name: str) -> Any:
        found = self._names.get(f"{module}.{name}")
        if found is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no encoder needs")
        return found

    def persistent_load(self, pid: Any) -> Any:
        kind, what = pid[0], pid[1]
        if kind == "module":  # legacy: (class, file, source text)
            return what
        if kind != "storage" or not isinstance(what, np.dtype) or (len(pid) > 5 and pid[5] is not None):
            raise pickle.UnpicklingError(f"it stores a {kind} that no encoder needs")
        return _Storage(str(pid[2]), what)


def _read(path: Path) -> dict[str, torch.Tensor]:
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            file.seek(0)
            return _read_legacy(file)
        with zipfile.ZipFile(file) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(names) != 1:
                raise ValueError("a zip archive, but none of torch.save")
            folder = names[0].removesuffix("data.pkl")
            with archive.open(names[0]) as pickled:
                tensors = _tensors(_InertUnpickler(pickled).load())
            return _load(tensors, lambda storage: archive.read(f"{folder}data/{storage.key}"))


def _read_legacy(file: IO[bytes]) -> dict[str, torch.Tensor]:
    """Pickles of the magic number, the protocol, the system, the object and the storages' keys; then the storages."""
    if _InertUnpickler(file).load() != _LEGACY_MAGIC:
        raise ValueError("no file of torch.save")
    _InertUnpickler(file).load()
    _InertUnpickler(file).load()
    tensors = _tensors(_InertUnpickler(file).load())
    widths = {tensor.storage.key: tensor.storage.dtype.itemsize for tensor in tensors.values()}
    content = {}
    for key in _InertUnpickler(file).load():
        count = int.from_bytes(file.read(8), "little")
        content[str(key)] = file.read(count * widths[str(key)])
    return _load(tensors, lambda storage: content[storage.key])


def _load(tensors: dict[str, _Tensor], content: Callable[[_Storage], bytes]) -> dict[str, torch.Tensor]:
    return {
        name: tensor.load(np.frombuffer(content(tensor.storage), tensor.storage.dtype))
        for name, tensor in tensors.items()
    }


def _tensors(root: Any, prefix: str = "") -> dict[str, _Tensor]:
    """Names and tensors of a module tree as `nn.Module.state_dict` gives them, or of a saved state dict."""
    if isinstance(root, dict):
        found = dict(root)
    else:
        attributes = vars(root)
        found = {prefix + name: value for name, value in attributes["_parameters"].items() if value is not None}
        for name, child in attributes["_modules"].items():
            found |= _tensors(child, f"{prefix}{name}.")
    if not all(isinstance(value, _Tensor) for value in found.values()):
        raise ValueError("it holds something else than tensors")
    return found
