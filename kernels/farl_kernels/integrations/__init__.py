"""The fused ops inside other people's models: ``accelerate(model)`` of `timm`, `open_clip` and `transformers`.

A module is accelerated by giving it another class: ``module.__class__`` becomes a subclass of what it was, with another
`forward`. Parameters, buffers, hooks and state-dict keys are not touched, and undoing it is giving back the old class.
PyTorch's own `fully_shard` works in this way too. The other ways were weighed and left:

- new modules in place of the old ones lose hooks, break references that others hold (wrappers, tied modules) and
  `isinstance`;
- a `forward` patched onto the instance is bound to it: copies made by `nn.DataParallel` would run the original,
  closures do not pickle, and `torch.compile` guards every patched instance.

With a subclass, `isinstance`, `deepcopy`, `pickle`, hooks, `torch.compile`, DDP and FSDP work as before. The subclasses
keep the names of their originals, because wrapping policies and device maps look modules up by class name.

Only modules of exactly a known class are changed, and only while their `forward` has the known arguments; everything
else is left, with the reason in the :class:`Report`. What cannot be seen beforehand (a mask of the caller, hooks on an
inner module, attention weights wanted) is met at the call by the original `forward`.
"""

from farl_kernels.integrations.swap import Report, restore

__all__ = ["Report", "restore"]
