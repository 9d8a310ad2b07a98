"""Kernels run on the GPU where there is one, else in triton's interpreter."""

from __future__ import annotations

import os

import torch

# Before anything imports triton, which reads the variable when it decorates kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
