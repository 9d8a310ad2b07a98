"""Accelerated models on the Triton kernels: on a GPU, or in the interpreter."""

from __future__ import annotations

import copy

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from farl_kernels import use_backend
from farl_kernels.integrations import open_clip, timm


class _RawOps(TorchDispatchMode):
    """Collects the names of our raw ops that run with the Triton backend."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "farl_kernels" and "triton" in args:
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


def _check(subject, accelerate, device, wanted) -> None:
    subject.model.float()
    truth = subject.run(copy.deepcopy(subject.model).double())
    subject.model.to(device)
    for name in subject.inputs:
        subject.inputs[name] = subject.inputs[name].to(device)
    accelerate(subject.model)
    ops = _RawOps()
    # The patch embedding is a convolution, for which cuDNN takes tf32 unless told not to.
    with use_backend("triton"), torch.backends.cudnn.flags(enabled=False, allow_tf32=False), ops:
        features, grads = subject.run(subject.model)
    assert all(any(want in name for name in ops.names) for want in wanted), ops.names
    assert (features.cpu().double() - truth[0]).abs().max() <= 1e-5 * truth[0].abs().max()
    largest = max(g.abs().max() for g in truth[1].values())
    for name, grad in grads.items():
        error = (grad.cpu().double() - truth[1][name]).abs().max()
        assert error <= 2e-5 * max(truth[1][name].abs().max(), 1e-2 * largest), name


def test_timm(of_library, device) -> None:
    subject = of_library("timm", "vit_base_patch16_224", embed_dim=64, num_heads=2, drop_path_rate=0.0)
    _check(subject, timm.accelerate, device, ["attention", "layer_norm", "activation"])


def test_open_clip(of_library, device) -> None:
    small = {"width": 64, "layers": 1}
    subject = of_library(
        "open_clip",
        "ViT-B-16-quickgelu",
        vision_cfg=small | {"head_width": 32},
        text_cfg=small | {"heads": 2},
    )
    _check(subject, open_clip.accelerate, device, ["attention", "layer_norm", "activation"])
