"""Checkpoints that are whole or absent.

A checkpoint is written under a temporary name, fsynced and renamed, so a file with a checkpoint's name is complete
whatever happened to the process. `latest` is moved only after that::

    checkpoints/
        step-00000500.pt
        step-00001000.pt
        latest              the text "1000"
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from pathlib import Path
from typing import Any

import torch

_NAME = re.compile(r"step-(\d{8,})\.pt")


class CheckpointError(OSError):
    """A checkpoint could not be written or read; the message says which, why and what is left."""


class CheckpointStore:
    """The checkpoints of one run, in one directory.

    Args:
        directory: made on the first save.
        keep_last: how many of the newest to keep (0 keeps all).
    """

    def __init__(self, directory: str | Path, *, keep_last: int = 3) -> None:
        self.directory = Path(directory)
        self._keep_last = keep_last
        self._writer: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, step: int, state: dict[str, Any], *, background: bool = False, copy: bool = True) -> None:
        """Write `state` (nested dicts and lists of tensors and plain values) as the checkpoint of `step`.

        With `background` the state is copied first and written by a thread; the copy is all that the caller waits for.
        An error of a background write is raised by the next `save` or `wait`. `copy=False`: nobody else changes the
        state, so it needs no copy.

        Raises:
            CheckpointError: disk full, no permission and the like. Checkpoints written before are untouched.
        """
        self.wait()
        if not background:
            self._write(step, state)
            return
        copied = _copy_to_host(state) if copy else state
        self._writer = threading.Thread(target=self._write_noting_errors, args=(step, copied), name="checkpoint")
        self._writer.start()

    def wait(self) -> None:
        """Wait until the write in the background, if any, is on disk; raise what went wrong with it."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, ascending."""
        if not self.directory.is_dir():
            return []
        found = (_NAME.fullmatch(entry.name) for entry in self.directory.iterdir())
        return sorted(int(match.group(1)) for match in found if match)

    def latest(self) -> int | None:
        """Step of the newest durable checkpoint, or None. A lost or stale `latest` falls back to the files there."""
        steps = self.steps()
        try:
            pointed = int((self.directory / "latest").read_text())
        except (OSError, ValueError):
            pointed = -1
        if pointed in steps:
            return pointed
        return steps[-1] if steps else None

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}.pt"

    def load(self, step: int | None = None) -> dict[str, Any]:
        """Read the checkpoint of `step` (default: the latest) on the CPU, without running any code from the file.

        Raises:
            CheckpointError: there is none, or it cannot be read.
        """
        self.wait()
        if step is None:
            step = self.latest()
            if step is None:
                raise CheckpointError(f"there is no checkpoint in {self.directory}")
        path = self.path(step)
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            have = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(
                f"there is no checkpoint of step {step} in {self.directory}; there are: {have}"
            ) from None
        except Exception as error:
            raise CheckpointError(f"{path} cannot be read as a checkpoint: {_first_line(error)}") from error

    def _write_noting_errors(self, step: int, state: dict[str, Any]) -> None:
        try:
            self._write(step, state)
        # Whatever it is, a save that did not happen must not pass in silence.
        except Exception as error:
            self._error = error

    def _write(self, step: int, state: dict[str, Any]) -> None:
        temporary = self.directory / f".writing-{step:08d}-{os.getpid()}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for leftover in self.directory.glob(".writing-*"):
                leftover.unlink(missing_ok=True)
            with temporary.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(self.path(step))
            _fsync_directory(self.directory)
            pointer = self.directory / f".writing-latest-{os.getpid()}"
            pointer.write_text(str(step))
            pointer.rename(self.directory / "latest")
            _fsync_directory(self.directory)
        # torch's zip writer turns a full disk into a RuntimeError.
        except (OSError, RuntimeError) as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            kept = self.latest()
            left = f"the checkpoint of step {kept} is intact" if kept is not None else "there is no earlier checkpoint"
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.directory}: {_first_line(error)}; "
                f"{left}. Free space or mend permissions there, then run the same command again"
            ) from error
        self._prune(step)

    def _prune(self, newest: int) -> None:
        if self._keep_last == 0:
            return
        steps = [step for step in self.steps() if step <= newest]
        for step in steps[: -self._keep_last]:
            try:
                self.path(step).unlink(missing_ok=True)
            except OSError as error:
                print(f"warning: an old checkpoint could not be removed: {error}", flush=True)


def _copy_to_host(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return value.clone() if value.device.type == "cpu" else value.to("cpu")
    if isinstance(value, dict):
        return {key: _copy_to_host(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copy_to_host(entry) for entry in value)
    return value


def _fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
