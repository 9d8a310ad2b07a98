"""Checks of arguments that several ops share. Every message reads ``op: argument is this, want that``."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class OnDevice(Protocol):
    @property
    def device(self) -> torch.device: ...


def check_choice(op: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{op}: {name} is {value!r}, want one of {', '.join(map(repr, choices))}")


def check_device(op: str, name: str, x: OnDevice, like_name: str, like: OnDevice) -> None:
    """Raise ValueError unless `x` is on the device of `like`."""
    if x.device != like.device:
        raise ValueError(f"{op}: {name} is on {x.device}, want {like.device}, the device of {like_name}")


def describe(x: object) -> str:
    """What came in an argument's place: dtype and shape of a tensor, else the type."""
    if isinstance(x, Tensor):
        return f"{x.dtype} {tuple(x.shape)}"
    return "None" if x is None else type(x).__name__
