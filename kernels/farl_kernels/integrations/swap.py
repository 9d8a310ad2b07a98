"""Giving modules a fused class, telling what was done, and undoing it."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from farl_kernels.dispatch import use_backend

# What a fused class keeps in the instance besides what the original keeps there.
OWN_ATTRIBUTES = ("fused_backend", "causal_mask")


class Fused:
    """Base of the classes that modules are given.

    For PyTorch's modules those are written out. For another library's `X`, `FusedX` holds the forward alone, and
    :func:`fused_class` joins the two when it is asked for, because nothing here imports that library before.
    """

    # Where the other library defines the original, "package.module:X".
    home: ClassVar[str]
    # The class that the module had.
    original: Any
    # Handed to every op that the module calls; set on the instance where `accelerate` was given one.
    fused_backend: str | None = None

    if TYPE_CHECKING:
        # What the original has.
        def __getattr__(self, name: str) -> Any: ...


def fused_class(module: str, name: str) -> type[Fused]:
    """The class `name` of one of our modules, made of its `FusedX` and the original.

    It becomes an attribute of the module, whose ``__getattr__`` calls this: so pickles find it, in any process.
    """
    names = vars(sys.modules[module])
    mixin = names.get(f"Fused{name}")
    if mixin is None or "home" not in mixin.__dict__:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    package, _, attribute = mixin.home.partition(":")
    original = getattr(importlib.import_module(package), attribute)
    made = type(name, (mixin, original), {"__module__": module, "__doc__": mixin.__doc__, "original": original})
    return names.setdefault(name, made)


# For a module of a known class: its fused class, or why it is left.
Rule = Callable[[Any], type[Fused] | str]
Rules = Mapping[type[nn.Module], Rule | type[Fused] | str]


@dataclass(frozen=True)
class Change:
    """A module that runs fused ops now."""

    name: str
    kind: str
    ops: str


@dataclass(frozen=True)
class Left:
    """A module that runs as before, and why."""

    name: str
    kind: str
    reason: str


@dataclass
class Report:
    """What `accelerate` did to a model. Print it to read it; :meth:`undo` takes it back.

    Attributes:
        replaced: modules that run fused ops now.
        left: modules of the same kinds that were left, each with the reason.
        notes: what else is worth knowing.
    """

    title: str
    replaced: list[Change] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _model: nn.Module | None = field(default=None, repr=False)
    _undo: Callable[[nn.Module], int] | None = field(default=None, repr=False)

    def undo(self) -> int:
        """Give every module of the model its own class back, and return how many had another one.

        Raises:
            ValueError: another tool has changed the class of an accelerated module since.
        """
        assert self._model is not None and self._undo is not None
        return self._undo(self._model)

    def __str__(self) -> str:
        lines = [f"{self.title}: {len(self.replaced)} modules run fused ops, {len(self.left)} run as before"]
        lines += _section("replaced", [(f"{x.kind} -> {x.ops}", x.name) for x in self.replaced])
        lines += _section("left", [(f"{x.kind}: {x.reason}", x.name) for x in self.left])
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def _section(title: str, entries: list[tuple[str, str]]) -> list[str]:
    groups: dict[str, list[str]] = {}
    for what, name in entries:
        groups.setdefault(what, []).append(name or "the model itself")
    lines = [f"  {title}:"] if groups else []
    for what, names in groups.items():
        shown = ", ".join(names[:2]) + (f", ... {names[-1]}" if len(names) > 2 else "")
        lines.append(f"    {len(names)} x {what}  ({shown})")
    return lines


def check_model(library: str, model: object, example: str) -> nn.Module:
    """`model`, if any of its modules is defined by `library`.

    Raises:
        ValueError: it is not a module, or has none of that library.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"accelerate: model is a {type(model).__name__}, want a model of {library} such as {example}")
    found = {origin(module).__module__.partition(".")[0] for module in model.modules()}
    if library not in found:
        others = sorted(found & {"timm", "open_clip", "transformers"})
        hint = f"; use farl_kernels.integrations.{others[0]}" if others else ""
        raise ValueError(
            f"accelerate: model is a {type(model).__name__} without {library} modules, want one such as {example}{hint}"
        )
    return model


def swap(model: nn.Module, rules: Rules, report: Report, backend: str | None) -> None:
    """Give the modules of `model` the classes that `rules` say, children before parents, and note it in `report`."""
    modules: dict[str, Any] = dict(model.named_modules())
    before = sum(isinstance(module, Fused) for module in modules.values())
    if before:
        report.notes.append(f"{before} modules ran fused ops before")
    for name in reversed(modules):
        module = modules[name]
        kind = type(module).__name__
        if isinstance(module, Fused):
            continue
        found = _decide(module, rules)
        if isinstance(found, str):
            report.left.append(Left(name, kind, found))
        elif found is not None:
            module.__class__ = found
            if backend is not None:
                module.fused_backend = backend
            report.replaced.append(Change(name, kind, (found.__doc__ or "").partition(".")[0]))
    # In the order of the model.
    report.replaced.reverse()
    report.left.reverse()


def _decide(module: nn.Module, rules: Rules) -> type[Fused] | str | None:
    """The fused class, the reason to leave a module that has or might have one, or None for any other module."""
    rule = rules.get(type(module))
    if rule is None:
        return _unknown(module)
    if not isinstance(rule, str) and "forward" in module.__dict__:
        return "its forward is patched on the instance"
    found = rule(module) if inspect.isfunction(rule) else rule
    if isinstance(found, type) and issubclass(found, Fused) and _parameters(found) != _parameters(found.original):
        return "its forward takes other arguments in this version"
    return found


def _parameters(cls: type) -> list[str]:
    return list(inspect.signature(cls.forward).parameters)  # type: ignore[attr-defined]


def _unknown(module: nn.Module) -> str | None:
    name = type(module).__name__
    if "Attention" in name or "Attn" in name:
        return "attention of a kind not known here"
    if isinstance(module, nn.LayerNorm):
        return "a LayerNorm with a forward of its own"
    if "RmsNorm" in name or "RMSNorm" in name:
        return "there is no fused RMSNorm"
    if isinstance(module, nn.GELU) or "gelu" in name.lower():
        return "an activation not known here"
    return None


def restore(model: nn.Module) -> int:
    """Give every accelerated module of `model` its own class back; the number of modules changed.

    Raises:
        ValueError: another tool has changed the class of an accelerated module since.
    """
    accelerated: list[tuple[str, Any]] = [
        (name, module) for name, module in model.named_modules() if isinstance(module, Fused)
    ]
    for name, module in accelerated:
        # Whoever derived a class from ours undoes that first.
        if "original" not in type(module).__dict__:
            raise ValueError(f"restore: {name} is a {type(module).__qualname__} now; undo that change first")
    for _, module in accelerated:
        module.__class__ = type(module).original
        for attribute in OWN_ATTRIBUTES:
            module.__dict__.pop(attribute, None)
    return len(accelerated)


def origin(module: nn.Module) -> type[nn.Module]:
    """The class of a module as its library made it."""
    kind = type(module)
    return kind.original if issubclass(kind, Fused) else kind


def untouched(module: nn.Module) -> bool:
    """Whether calling `module` would do no more than its class says, so that a fused op may stand for the call."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def top_modules(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Iterator[nn.Module]:
    """The modules of `kinds` that lie in no other one of them."""
    if isinstance(model, kinds):
        yield model
        return
    for child in model.children():
        yield from top_modules(child, kinds)


def check_backend(backend: str | None) -> None:
    """Raise ValueError unless some op has a backend of that name."""
    with use_backend(backend):
        pass


def is_identity(module: nn.Module) -> bool:
    return type(module) is nn.Identity
