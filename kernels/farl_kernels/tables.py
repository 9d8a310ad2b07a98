"""Launch configurations of the kernels: measured or chosen once per architecture, looked up, never tuned in training.

`tables/<architecture>/<op>.json` holds ``{kernel: {bucket: {"BLOCK_M": 64, ..., "num_warps": 4, "num_stages": 2}}}``.
A bucket is a word that the op's launcher makes from the sizes that matter. A GPU takes the table of the newest
architecture that is not newer than itself. `python -m farl_kernels.tune` writes tables for the GPU at hand; the
environment variable FARL_KERNELS_TABLES names their folder, which is then looked at first.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch

Config = dict[str, int]
FOLDER = Path(__file__).with_name("tables")
ENVIRONMENT = "FARL_KERNELS_TABLES"

_architecture: str | None = None
_overrides: dict[tuple[str, str, str], Config] = {}
_lookups: list[tuple[str, str, str]] | None = None


@functools.cache
def architectures() -> tuple[str, ...]:
    """The architectures with a shipped table, oldest first: "sm_80", "sm_90"."""
    return tuple(sorted((path.name for path in FOLDER.iterdir() if path.is_dir()), key=_number))


def architecture_of(device: torch.device) -> str:
    """Whose table a device takes: CPU and meta tensors the oldest, unless :func:`use_architecture` says another."""
    if _architecture is not None:
        return _architecture
    return architectures()[0] if device.type != "cuda" else _architecture_of_gpu(device)


def lookup(op: str, kernel: str, bucket: str, device: torch.device) -> Config:
    """The configuration of a launch, a new dict.

    Raises:
        KeyError: the shipped tables lack the entry, which is a fault of the package.
    """
    if _lookups is not None:
        _lookups.append((op, kernel, bucket))
    found = _overrides.get((op, kernel, bucket))
    own = os.environ.get(ENVIRONMENT)
    if found is None and own:
        found = _read(own, op).get(kernel, {}).get(bucket)
    if found is None:
        found = shipped(architecture_of(device), op)[kernel][bucket]
    return dict(found)


@contextlib.contextmanager
def use_architecture(name: str) -> Iterator[None]:
    """Look up the tables of `name` whatever the device."""
    global _architecture
    before, _architecture = _architecture, name
    try:
        yield
    finally:
        _architecture = before


@contextlib.contextmanager
def override(op: str, kernel: str, bucket: str, config: Config) -> Iterator[None]:
    """Use `config` for one entry."""
    key = (op, kernel, bucket)
    before = _overrides.get(key)
    _overrides[key] = config
    try:
        yield
    finally:
        if before is None:
            del _overrides[key]
        else:
            _overrides[key] = before


@contextlib.contextmanager
def recorded_lookups() -> Iterator[list[tuple[str, str, str]]]:
    """Inside, the entries that are looked up are listed: (op, kernel, bucket)."""
    global _lookups
    before, _lookups = _lookups, []
    try:
        yield _lookups
    finally:
        _lookups = before


def formatted(table: dict[str, dict[str, Config]]) -> str:
    """A table as its file has it: an entry a line, so that a change is seen in one."""
    kernels = (
        f" {json.dumps(kernel)}: {{\n"
        + ",\n".join(f"  {json.dumps(bucket)}: {json.dumps(config)}" for bucket, config in buckets.items())
        + "\n }"
        for kernel, buckets in table.items()
    )
    return "{\n" + ",\n".join(kernels) + "\n}\n"


# A lookup stands before every launch, so all of these are kept: together they would cost more than the launch.
@functools.cache
def _architecture_of_gpu(device: torch.device) -> str:
    return _nearest(architectures(), *torch.cuda.get_device_capability(device))


def _nearest(known: tuple[str, ...], major: int, minor: int) -> str:
    capability = 10 * major + minor
    return max((name for name in known if _number(name) <= capability), key=_number, default=known[0])


@functools.cache
def shipped(architecture: str, op: str) -> dict[str, dict[str, Config]]:
    """The whole table of an op, ``{kernel: {bucket: configuration}}``."""
    return _read(str(FOLDER / architecture), op)


@functools.cache
def _read(folder: str, op: str) -> dict[str, dict[str, Config]]:
    path = Path(folder) / f"{op}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _number(name: str) -> int:
    return int(name.removeprefix("sm_"))
