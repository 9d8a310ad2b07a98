"""Which backend an op runs on.

Each op owns one :class:`Op`. A backend is a plain function with the op's tensor arguments, registered with a
``refuses`` function that says in words why it cannot serve a call (or ``None`` when it can), and a ``declines``
function that says why it should not be taken unasked. The order of registration is the order of preference:
``backend=None`` takes the first that does neither.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

# Of the process, not of the thread: autograd runs backward passes, and what activation checkpointing computes again in
# them, in threads of its own.
_forced: str | None = None
_known: set[str] = set()

BackendFn = Callable[..., Any]
RefuseFn = Callable[..., str | None]


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run every op called inside with backend `name`, where the op has one of that name.

    Ops without a backend of that name keep their own choice; an explicit ``backend=`` at a call wins. It holds in all
    threads of the process.

    Raises:
        ValueError: no op has a backend of that name.
    """
    global _forced
    if name is not None and name not in _known:
        raise ValueError(f"use_backend: {name!r} is the backend of no op; there are {', '.join(sorted(_known))}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


class Op:
    """The backends of one public op, in order of preference."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._backends: dict[str, tuple[BackendFn, RefuseFn, RefuseFn]] = {}

    def register(
        self, name: str, fn: BackendFn, refuses: RefuseFn | None = None, declines: RefuseFn | None = None
    ) -> None:
        """Add backend `name`; a later registration is preferred less.

        `refuses` and `declines` get the arguments of the call. One that declines serves when it is asked for by name.
        """
        self._backends[name] = (fn, refuses or _never, declines or _never)
        _known.add(name)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._backends)

    def __call__(self, requested: str | None, *args: Any, **kwargs: Any) -> Any:
        """Run the op on the `requested` backend, on the one that `use_backend` set, or on the first that fits."""
        if requested is None and _forced in self._backends:
            requested = _forced
        if requested is not None:
            if requested not in self._backends:
                raise ValueError(f"{self.name}: backend {requested!r} is not one of {', '.join(self._backends)}")
            fn, refuses, _ = self._backends[requested]
            reason = refuses(*args, **kwargs)
            if reason is not None:
                raise ValueError(f"{self.name}: backend {requested!r} cannot run this call: {reason}")
            return fn(*args, **kwargs)
        reasons = []
        for name, (fn, refuses, declines) in self._backends.items():
            reason = refuses(*args, **kwargs) or declines(*args, **kwargs)
            if reason is None:
                return fn(*args, **kwargs)
            reasons.append(f"{name}: {reason}")
        raise ValueError(f"{self.name}: no backend can run this call ({'; '.join(reasons)})")


def _never(*args: Any, **kwargs: Any) -> str | None:
    return None
