"""A CPU stand-in for CUDA graphs: a tape of tensor calls, played again on the same memory.

As with a CUDA graph, recording leaves everything as it was, a replay runs no Python of the recorded function, numbers
of the host are baked in, and reading a tensor on the host (or making one from host numbers) is refused. Not shown:
streams, memory that recordings share, and waits inside of what PyTorch calls for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Figures = dict[str, Tensor]
aten = torch.ops.aten
# Values or shapes that the host has to learn, and `torch.tensor(...)`, which is a copy from pageable memory on CUDA.
REFUSED = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.lift_fresh.default,
}
# On a CPU these read memory without any call that could be seen.
HOST_METHODS = ("tolist", "numpy", "__array__", "cpu")


class HostReadError(RuntimeError):
    """The recorded function did what no CUDA graph can hold."""


class NoHostRead(TorchDispatchMode):
    """Refuses, within its context, what would wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in REFUSED:
            raise HostReadError(f"{func} waits for the device")
        return self.call(func, args, kwargs or {})

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    def __enter__(self) -> Any:
        self._methods = _refused_methods()
        self._methods.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._methods.__exit__(None, None, None)


class _Recorder(NoHostRead):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, dict[str, Any], Any]] = []
        self._own: dict[int, Tensor] = {}
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            self._keep(argument, value)
        for argument in func._schema.arguments:
            self._keep(argument, kwargs.get(argument.name))
        given = {_address(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and _address(x) not in given:
                # Held, so that no other tensor comes to stand there.
                self._own[_address(x)] = x
        self.calls.append((func, args, kwargs, out))
        return out

    def _keep(self, argument: Any, value: Any) -> None:
        """What `value` holds, if the call writes to it and it was there before the recording."""
        if argument.alias_info is None or not argument.alias_info.is_write:
            return
        for x in tree_leaves(value):
            if isinstance(x, Tensor) and _address(x) not in self._own and _address(x) not in self._before:
                whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
                self._before[_address(x)] = whole, whole.clone()

    def undo(self) -> None:
        for whole, before in self._before.values():
            whole.copy_(before)


class TapeRecording:
    """A `farl_engine.graphs.Recording`."""

    def __init__(self, calls: list[tuple[Any, Any, dict[str, Any], Any]], figures: Figures) -> None:
        self.figures = figures
        self._calls = calls
        self.replays = 0

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, recorded in self._calls:
            aliases = [result.alias_info for result in func._schema.returns]
            if aliases and all(alias is not None and not alias.is_write for alias in aliases):
                # A view, which stands where it stood.
                continue
            out = func(*args, **kwargs)
            if any(alias is not None for alias in aliases):
                continue
            for old, new in zip(tree_leaves(recorded), tree_leaves(out), strict=True):
                if isinstance(old, Tensor) and _address(old) != _address(new):
                    old.copy_(new)


class Tape:
    """A `farl_engine.graphs.Recorder` for a CPU.

    Attributes:
        recordings: all that were made.
        rehearsals: number of plain calls.
        discarded: number of recordings given up.
    """

    def __init__(self) -> None:
        self.recordings: list[TapeRecording] = []
        self.rehearsals = self.discarded = 0

    def rehearse(self, call: Callable[[], Figures]) -> Figures:
        self.rehearsals += 1
        return call()

    def record(self, call: Callable[[], Figures], beside: object) -> TapeRecording:
        recorder = _Recorder()
        with recorder:
            figures = call()
        recorder.undo()
        self.recordings.append(TapeRecording(recorder.calls, figures))
        return self.recordings[-1]

    def discard(self, recordings: dict[Any, Any]) -> None:
        self.discarded += len(recordings)
        recordings.clear()


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


@contextmanager
def _refused_methods() -> Iterator[None]:
    def refuse(name: str) -> Callable[..., Any]:
        def method(self: Tensor, *_: Any, **__: Any) -> Any:
            raise HostReadError(f"Tensor.{name} waits for the device")

        return method

    before = {name: torch.Tensor.__dict__.get(name) for name in HOST_METHODS}
    for name in HOST_METHODS:
        setattr(torch.Tensor, name, refuse(name))
    try:
        yield
    finally:
        for name, method in before.items():
            if method is None:
                delattr(torch.Tensor, name)
            else:
                setattr(torch.Tensor, name, method)
