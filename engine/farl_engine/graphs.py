"""Updates recorded once and replayed: one launch of a CUDA graph in place of thousands of kernels.

A recording repeats the same work on the same memory and runs no Python. So batches are copied into fixed buffers first,
batches of another shape have a recording of their own, and whatever else changes from step to step has to lie on the
device: an update that reads a number of the host keeps that of the step in which it was recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from farl_engine.data import Batch

Figures = dict[str, Tensor]
# Leaves new weights, returns figures to log.
Update = Callable[[Batch], Figures]


class Recording(Protocol):
    """Work that can be done again."""

    @property
    def figures(self) -> Figures:
        """What the recorded call returned; each replay writes new values into these tensors."""
        ...

    def replay(self) -> None: ...


class Recorder(Protocol):
    """Makes recordings of a function."""

    def rehearse(self, call: Callable[[], Figures]) -> Figures:
        """Call it, under the conditions of a recording."""
        ...

    def record(self, call: Callable[[], Figures], beside: Recording | None) -> Recording:
        """Record what the call does, without doing it. Recordings beside each other share memory: any order of
        replays is right, but each overwrites the figures of all others."""
        ...

    def discard(self, recordings: dict[Any, Any]) -> None:
        """Empty `recordings` and give back their memory."""
        ...


class StepGraphs:
    """Calls `update`, or replays it where the batch has the shape of one that was recorded.

    The first updates, and the first of each shape, are plain calls: they compile kernels, make the optimizer's state
    and fill caches, which no recording can. A plain update with recordings about would need memory for its activations
    beside theirs, so at a new shape they are all given up, and made again when they are next needed. A run meets its
    shapes early, and making a recording takes about as long as launching an update.

    Figures are overwritten by the next call. Of a batch only the tensors count: what else there is in it an update must
    not read, or it must be the same for all batches of a shape.

    Args:
        update: see `farl_engine.loop`; reads nothing of the host that changes.
        optimizer: the one that it steps.
        recorder: a `CudaRecorder`.
    """

    # Plain calls at first, as torch's notes on CUDA graphs ask.
    WARM_UP = 3
    # More shapes than this and all are given up, so that memory is bounded.
    MOST = 32

    def __init__(self, update: Update, optimizer: torch.optim.Optimizer, recorder: Recorder) -> None:
        self._update = update
        self._optimizer = optimizer
        self._recorder = recorder
        self._calls = 0
        self._met: set[tuple[Any, ...]] = set()
        self._buffers: dict[tuple[Any, ...], Tensor] = {}
        self._recordings: dict[tuple[Any, ...], Recording] = {}

    def __call__(self, batch: Batch) -> Figures:
        batch, shape = self._in_buffers(batch)
        self._calls += 1
        if self._calls <= self.WARM_UP or shape not in self._met:
            self._met.add(shape)
            self._discard()
            return self._recorder.rehearse(partial(self._update, batch))
        if shape not in self._recordings:
            if len(self._recordings) == self.MOST:
                self._discard()
            self._recordings[shape] = self._record(batch)
        recording = self._recordings[shape]
        recording.replay()
        return recording.figures

    def _in_buffers(self, batch: Batch) -> tuple[Batch, tuple[Any, ...]]:
        """The batch in fixed memory, and its shape."""
        shape: list[tuple[Any, ...]] = []

        def fill(name: str, value: Tensor) -> Tensor:
            key = (name, value.shape, value.dtype)
            shape.append(key)
            if key not in self._buffers:
                self._buffers[key] = torch.empty_like(value, memory_format=torch.contiguous_format)
            return self._buffers[key].copy_(value)

        return _map_tensors(batch, fill), tuple(shape)

    def _record(self, batch: Batch) -> Recording:
        # Set while recording alone: checkpoints so hold the same settings with and without graphs.
        self._set_capturable(True)
        try:
            beside = next(iter(self._recordings.values()), None)
            return self._recorder.record(partial(self._update, batch), beside)
        finally:
            self._set_capturable(False)

    def _set_capturable(self, value: bool) -> None:
        for group in self._optimizer.param_groups:
            group["capturable"] = value

    def _discard(self) -> None:
        if self._recordings:
            self._recorder.discard(self._recordings)


@dataclass(frozen=True)
class CudaRecording:
    """A CUDA graph."""

    graph: torch.cuda.CUDAGraph
    figures: Figures

    def replay(self) -> None:
        self.graph.replay()


class CudaRecorder:
    """Records CUDA graphs, all on one stream of its own and in one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def rehearse(self, call: Callable[[], Figures]) -> Figures:
        """On the stream of the recordings, which the current one waits for and which waits for that."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            figures = call()
        torch.cuda.current_stream().wait_stream(self._stream)
        return figures

    def record(self, call: Callable[[], Figures], beside: Recording | None) -> CudaRecording:
        assert beside is None or isinstance(beside, CudaRecording)
        graph = torch.cuda.CUDAGraph()
        pool = None if beside is None else beside.graph.pool()
        # The loader's threads allocate pinned memory meanwhile, which would spoil a recording in the "global" mode.
        with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
            figures = call()
        return CudaRecording(graph, figures)

    def discard(self, recordings: dict[Any, Any]) -> None:
        torch.cuda.synchronize()
        recordings.clear()
        torch.cuda.empty_cache()


def _map_tensors(value: Any, function: Callable[[str, Tensor], Tensor], name: str = "") -> Any:
    """`value` with ``function(name, tensor)`` for each tensor in it, down through dataclasses and tuples."""
    if isinstance(value, Tensor):
        return function(name, value)
    if is_dataclass(value) and not isinstance(value, type):
        old = {field.name: getattr(value, field.name) for field in fields(value)}
        return replace(value, **{key: _map_tensors(part, function, f"{name}.{key}") for key, part in old.items()})
    if isinstance(value, tuple):
        return tuple(_map_tensors(part, function, f"{name}[{index}]") for index, part in enumerate(value))
    return value
