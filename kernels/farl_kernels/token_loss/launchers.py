"""Starts the kernels of the masked-token loss, between the products that PyTorch does."""

from __future__ import annotations

import torch
from torch import Tensor

from farl_kernels import tables
from farl_kernels.gemm import logit_chunk_bytes, matmul, matmul_add_
from farl_kernels.launch import launch
from farl_kernels.token_loss import kernels
from farl_kernels.token_loss.reference import Results

# float16 cannot hold the small entries of a softmax; times this, all of 2e-11 to 1 can be told from zero.
_FLOAT16_SCALE = 4096.0
# Longer rows would not stay in registers.
_LONGEST_ROW = 8192
_BUCKETS = (1024, 4096, _LONGEST_ROW)


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    mean: bool,
    hidden_gradient: bool,
    weight_gradient: bool,
    bias_gradient: bool,
) -> Results:
    """:func:`farl_kernels.token_loss.reference.forward` for 16-bit and float32 `hidden`."""
    rows, vocab = len(hidden), len(weight)
    dtype, device = hidden.dtype, hidden.device
    kept_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    scale = _FLOAT16_SCALE if dtype == torch.float16 else 1.0
    d_hidden = torch.empty(hidden.shape if hidden_gradient else 0, dtype=kept_dtype, device=device)
    d_weight = torch.zeros(weight.shape if weight_gradient else 0, dtype=torch.float32, device=device)
    d_bias = torch.zeros(vocab if bias_gradient else 0, dtype=torch.float32, device=device)
    losses = torch.empty(rows, dtype=torch.float32, device=device)
    hits = torch.empty(rows, dtype=torch.int32, device=device)
    matrix, targets = weight.to(dtype), targets.contiguous()
    bias = None if bias is None else bias.contiguous()
    chunk = max(1, logit_chunk_bytes(device) // (4 * max(1, vocab)))
    for start in range(0, rows, chunk):
        at = slice(start, start + chunk)
        logits = matmul(hidden[at], matrix.T)
        if not (hidden_gradient or weight_gradient or bias_gradient):
            loss_rows(logits, None, bias, targets[at], ignore_index, losses[at], hits[at], False)
            continue
        gradient = over(logits, dtype)
        sums = loss_rows(
            logits, gradient, bias, targets[at], ignore_index, losses[at], hits[at], bias_gradient, scale=scale
        )
        if sums is not None:
            d_bias += sums.sum(0)
        if hidden_gradient:
            product = matmul(gradient, matrix)
            d_hidden[at] = product if scale == 1 else product.mul_(1 / scale)
        if weight_gradient:
            matmul_add_(d_weight, gradient.T, hidden[at])
    if scale != 1 and weight_gradient:
        d_weight.mul_(1 / scale)
    return *total(losses, hits, targets, ignore_index, mean), d_hidden, d_weight, d_bias


def over(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix of `dtype` in the memory of contiguous float32 `logits`: the first half of each row, for 16 bits.

    Logits are float32, as the products accumulate them, and 16 bits would cost the loss its last digits; the products
    of the gradient want 16 bits. So nothing but the logits is ever allocated, and no cast is a pass of its own.
    """
    return logits.view(dtype)[:, : logits.shape[1]]


def loss_rows(
    logits: Tensor,
    gradient: Tensor | None,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    losses: Tensor,
    hits: Tensor,
    bias_gradient: bool,
    scale: float = 1.0,
) -> Tensor | None:
    """Loss and hit of each row [R] of float32 `logits` [R, V], without bias yet.

    Args:
        gradient: [R, V], where the gradient goes, `scale` times; it may lie over the logits, see :func:`over`.
        losses, hits: float32 and int32 [R], written.

    Returns:
        float32 [programs, V], with `bias_gradient`: column sums of the gradient, in parts.
    """
    rows, vocab = logits.shape
    gradient_stride = 0 if gradient is None else gradient.stride(0)
    config = tables.lookup(
        "token_loss", "row", bucket(vocab, logits.dtype if gradient is None else gradient.dtype), logits.device
    )
    programs = -(-rows // config["ROWS"])
    if vocab <= _LONGEST_ROW:
        kernel, allocate = kernels.token_loss_row_kernel, torch.empty
        config["BLOCK_V"] = max(16, 1 << max(0, vocab - 1).bit_length())
    else:
        kernel, allocate = kernels.token_loss_long_row_kernel, torch.zeros
    sums = allocate(programs, vocab, dtype=torch.float32, device=logits.device) if bias_gradient else None
    launch(
        kernel,
        (programs,),
        logits,
        gradient,
        bias,
        targets,
        losses,
        hits,
        sums,
        rows,
        vocab,
        logits.stride(0),
        gradient_stride,
        ignore_index,
        scale,
        **config,
    )
    return sums


def bucket(vocab: int, gradient_dtype: torch.dtype) -> str:
    """The table bucket: bits of the gradient, and the longest row it is for."""
    size = next((str(most) for most in _BUCKETS if vocab <= most), "long")
    return f"bits{8 * gradient_dtype.itemsize}_{size}"


def total(
    losses: Tensor, hits: Tensor, targets: Tensor, ignore_index: int, mean: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, correct, count), 0-d."""
    device = losses.device
    loss = torch.empty((), dtype=torch.float32, device=device)
    correct = torch.empty((), dtype=torch.float32, device=device)
    count = torch.empty((), dtype=torch.int64, device=device)
    config = tables.lookup("token_loss", "total", "any", device)
    launch(
        kernels.token_loss_total_kernel,
        (1,),
        losses,
        hits,
        targets,
        loss,
        correct,
        count,
        len(losses),
        ignore_index,
        MEAN=mean,
        **config,
    )
    return loss, correct, count
