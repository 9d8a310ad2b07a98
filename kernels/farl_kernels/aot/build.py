"""From a case to the kernels that it compiles: the launches are recorded and specialised as triton's JIT does it."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.compiler import compile as triton_compile
from triton.runtime.jit import create_function_from_signature

from farl_kernels import tables
from farl_kernels.aot.resources import Resources, read_once
from farl_kernels.cases import Case
from farl_kernels.launch import Launch, recorded_launches


@dataclass(frozen=True)
class Build:
    """One kernel to compile, and the case that starts it.

    `own` is false for the helpers that a launcher starts beside the kernel of the table entry.
    """

    case: Case
    architecture: str
    name: str
    own: bool
    source: ASTSource
    target: GPUTarget
    options: dict[str, Any]
    key: str

    @property
    def num_warps(self) -> int:
        return self.options["num_warps"]

    def compile(self) -> tuple[bytes, int]:
        """The machine code (from triton's cache where it has it) and the bytes of shared memory it is started with."""
        made = triton_compile(self.source, target=self.target, options=self.options)
        return made.asm["cubin"], made.metadata.shared


def builds(case: Case, architecture: str) -> list[Build]:
    """What `case` starts on `architecture`, in order.

    Raises:
        ValueError: the case starts nothing, or does not look up its own table entry.
    """
    entry = (case.op, case.kernel, case.bucket)
    with tables.use_architecture(architecture), tables.recorded_lookups() as lookups, recorded_launches() as launches:
        case.prepare(torch.device("meta"))()
    if entry not in lookups:
        found = ", ".join(sorted({".".join(x) for x in lookups})) or "nothing"
        raise ValueError(f"does not look up its entry, but {found}")
    if not launches:
        raise ValueError("starts no kernel")
    with tables.use_architecture(architecture):
        config = tables.lookup(*entry, torch.device("meta"))
    own = [case.kernel in launch.kernel.__name__ for launch in launches]
    if not any(own):
        own = [config.items() <= launch.options.items() for launch in launches]
    if not any(own):
        raise ValueError("starts no kernel with the configuration of its entry")
    made: list[Build] = []
    for launch, is_own in zip(launches, own, strict=True):
        one = _build(case, architecture, launch, is_own)
        if all(one.key != other.key for other in made):
            again = sum(other.name.partition("#")[0] == one.name for other in made)
            made.append(replace(one, name=f"{one.name}#{again + 1}") if again else one)
    return made


def _build(case: Case, architecture: str, launch: Launch, own: bool) -> Build:
    """Specialise as ``JITFunction.run`` does, with its own functions: they are internal, and the gate exists to see
    exactly what a launch would compile."""
    kernel = launch.kernel
    target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    backend: Any = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, _ = binder(*launch.args, **launch.options)
    values = list(bound.values())
    specialisation = [_unaligned(s, value) for s, value in zip(specialisation, values, strict=True)]
    options, signature, constexprs, attributes = kernel._pack_args(
        backend, launch.options, bound, specialisation, launch.options
    )
    source = ASTSource(kernel, signature, constexprs, attributes)
    key = hashlib.sha256(f"{source.hash()} {target} {sorted(options.__dict__.items())}".encode()).hexdigest()
    return Build(case, architecture, f"{case.name}/{kernel.__name__}", own, source, target, dict(options.__dict__), key)


def _unaligned(specialisation: tuple[Any, Any], value: object) -> tuple[Any, Any]:
    """Meta tensors have no address: a view is aligned to 16 bytes where it starts at a multiple of them."""
    if isinstance(value, Tensor) and value.storage_offset() * value.itemsize % 16:
        return specialisation[0], ""
    return specialisation


def compiled(wanted: list[Build], jobs: int) -> Iterator[tuple[Build, Resources | str]]:
    """Compile on `jobs` processes; each build comes, in order, with its resources or with what went wrong."""
    distinct = {build.key: build for build in wanted}
    # Forked, because jitted functions are found in the memory of the parent only.
    context = multiprocessing.get_context("fork")
    global _to_compile
    _to_compile = list(distinct.values())
    done: dict[str, Resources | str] = {}
    with context.Pool(max(1, min(jobs, len(_to_compile)))) as pool:
        results = pool.imap(_compile, range(len(_to_compile)))
        coming = zip(distinct, results, strict=True)
        for build in wanted:
            while build.key not in done:
                key, found = next(coming)
                done[key] = found
            yield build, done[build.key]


_to_compile: list[Build] = []


def _compile(index: int) -> Resources | str:
    build = _to_compile[index]
    try:
        cubin, shared = build.compile()
        return read_once(cubin, shared, build.num_warps, build.architecture)
    except Exception as error:
        return f"does not compile: {type(error).__name__}: {' '.join(str(error).split())[-300:]}"
