"""Loads LAION-Face's torch files without running what is in them.

They are pickles. torch's restricted reader (`weights_only=True`) builds plain containers, numbers and tensors only; for
numpy arrays and scalars, of which the detections consist, this module hands it stand-ins that take bytes of a few
number types and do nothing else. Any other name in a pickle is refused.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np

_DTYPES = {"f2": "<f2", "f4": "<f4", "f8": "<f8", "i4": "<i4", "i8": "<i8"}
_MAX_BYTES = 1 << 20


class Dtype:
    """Stands for numpy.dtype: a little-endian float or integer."""

    __slots__ = ("code",)

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or code.lstrip("<") not in _DTYPES:
            raise ValueError(f"numbers of type {code!r}")
        self.code = _DTYPES[code.lstrip("<")]

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", "="):
            raise ValueError("numbers in an unknown byte order")


class Array:
    """Stands for numpy.ndarray: bytes, kept until `numbers` is called."""

    __slots__ = ("_code", "_raw")

    def __init__(self) -> None:
        self._code, self._raw = "<f4", b""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, _, raw = state
        self._code, self._raw = _checked(dtype, raw, math.prod(shape))

    def numbers(self) -> np.ndarray[Any, Any]:
        """All elements, one-dimensional."""
        return np.frombuffer(self._raw, self._code)


def new_array(*_: Any) -> Array:
    """Stands for numpy's _reconstruct, which makes an empty array to be filled by the array's state."""
    return Array()


def scalar(dtype: Any, raw: Any) -> float:
    """Stands for numpy's scalar."""
    code, raw = _checked(dtype, raw, 1)
    return float(np.frombuffer(raw, code)[0])


def _checked(dtype: Any, raw: Any, count: int) -> tuple[str, bytes]:
    if not isinstance(dtype, Dtype) or not isinstance(raw, bytes):
        raise ValueError("an array that does not consist of plain numbers")
    if len(raw) > _MAX_BYTES or len(raw) != count * np.dtype(dtype.code).itemsize:
        raise ValueError("an array whose size does not fit its shape")
    return dtype.code, raw


def load(path: Path, what: str) -> Any:
    """The containers and numbers in a torch file; numpy arrays come as `Array`.

    Raises:
        ValueError: the file is damaged or holds anything else; the message names `what` was expected.
        OSError: it cannot be read.
    """
    import torch

    stand_ins: list[Any] = [(Dtype, "numpy.dtype"), (Array, "numpy.ndarray")]
    # numpy 2 renamed the module.
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        stand_ins += [(new_array, f"{module}._reconstruct"), (scalar, f"{module}.scalar")]
    try:
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle ends in nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        if "GLOBAL " in reason:
            name = reason.split("GLOBAL ", 1)[1].split(" ", 1)[0]
            reason = f"it asks for {name}, which {what} have no need of"
        raise ValueError(f"{path} does not load safely as {what}: {reason[:200]}") from None


def numbers(value: Any) -> np.ndarray[Any, Any]:
    """A number, a nest of sequences, a tensor or an `Array`, as one-dimensional float64. ValueError for others."""
    import torch

    if isinstance(value, Array):
        return value.numbers().astype(np.float64)
    if isinstance(value, torch.Tensor):
        if not value.is_floating_point() and value.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"a tensor of {value.dtype}")
        return value.detach().reshape(-1).to(torch.float64).numpy()
    if isinstance(value, (list, tuple)):
        if len(value) > _MAX_BYTES:
            raise ValueError("a list that is too long")
        parts = [numbers(part) for part in value]
        return np.concatenate(parts) if parts else np.empty(0)
    if isinstance(value, (int, float)):
        return np.array([value], np.float64)
    raise ValueError(f"{type(value).__name__} where numbers should be")
