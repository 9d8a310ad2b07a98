"""What the ahead-of-time gate compiles and the tuner measures: for every table entry, a call that uses it.

Each folder with kernels lists its own in `cases.py`, as ``cases() -> list[Case]``.
"""

from __future__ import annotations

import fnmatch
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from farl_kernels.tables import Config

FOLDERS = (
    "activation",
    "attention.short",
    "attention.long",
    "attention.packed",
    "attention.single_query",
    "contrastive",
    "layer_norm",
    "patch_masking",
    "token_loss",
)


@dataclass(frozen=True)
class Case:
    """One table entry in use.

    Args:
        op, kernel, bucket: the entry of `tables/<architecture>/<op>.json`, as in :func:`farl_kernels.tables.lookup`.
        prepare: ``prepare(device)`` makes inputs of a typical size on "cuda", "cpu" or "meta", and returns a function
            of no arguments that runs the launcher on them and returns the tensors it made.
        candidates: the configurations that the tuner tries.
        hgmma: whether the kernel has a dot tile of 64 rows or more, which must become HGMMA on sm_90.
        streams: whether the gate wants asynchronous copies (LDGSTS or TMA loads).
    """

    op: str
    kernel: str
    bucket: str
    prepare: Callable[[torch.device], Callable[[], Any]]
    candidates: tuple[Config, ...] = ()
    hgmma: bool = False
    streams: bool = False

    @property
    def name(self) -> str:
        return f"{self.op}.{self.kernel}.{self.bucket}"


def all_cases() -> list[Case]:
    """The cases of all folders."""
    return [case for folder in FOLDERS for case in _of(folder)]


def select(patterns: list[str]) -> tuple[list[Case], list[str]]:
    """The cases of which the name has a pattern in it or fits it as a glob (all, for no patterns), and what is wrong.

    A folder that cannot be imported is a fault, but no reason to give up the others.
    """
    found: list[Case] = []
    faults: list[str] = []
    for folder in FOLDERS:
        try:
            found += _of(folder)
        except Exception as error:
            faults.append(f"farl_kernels.{folder}.cases: {type(error).__name__}: {error}")
    if patterns:
        found = [case for case in found if any(p in case.name or fnmatch.fnmatch(case.name, p) for p in patterns)]
        faults = [fault for fault in faults if any(p.split(".")[0] in fault for p in patterns)]
    return found, faults


def _of(folder: str) -> list[Case]:
    return importlib.import_module(f"farl_kernels.{folder}.cases").cases()
