"""Attention by PyTorch's scaled_dot_product_attention: flash, memory-efficient, cuDNN or the fused CPU kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from farl_kernels.attention import reference

# Before 9.15.1 cuDNN's attention read out of bounds or gave NaN at lengths that are no multiple of 128
# (pytorch/pytorch#169849).
FIRST_SOUND_CUDNN = 91501


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, key_mask: Tensor | None, scale: float) -> Tensor:
    """q [B, H, M, D], k and v [B, H, N, D] -> [B, H, M, D]."""
    if 0 in q.shape or 0 in k.shape:
        return reference.attention(q, k, v, causal=causal, key_mask=key_mask, scale=scale)
    out_dtype = q.dtype
    if _slow_half_backward(q, k, v):
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if key_mask is None:
        out = _sdpa(q, k, v, None, causal, scale)
    else:
        # What SDPA gives for a row without keys depends on the kernel it picks, so such rows get every key, then 0.
        allowed = reference.allowed_keys(q.shape[2], k.shape[2], causal=causal, key_mask=key_mask, device=q.device)
        assert allowed is not None
        dead = ~allowed.any(-1, keepdim=True)
        out = _sdpa(q, k, v, allowed | dead, False, scale).masked_fill(dead, 0.0)
    return out.to(out_dtype)


def _slow_half_backward(q: Tensor, k: Tensor, v: Tensor) -> bool:
    # The CPU kernel's backward in bf16 measures 3-7x slower than in float32 (its forward does not).
    half = q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16)
    return half and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    odd_length = q.shape[2] % 128 != 0 or k.shape[2] % 128 != 0
    if q.is_cuda and odd_length and (torch.backends.cudnn.version() or 0) < FIRST_SOUND_CUDNN:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
