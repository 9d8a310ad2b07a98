"""The table entries of the masked-token loss in use."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from farl_kernels.cases import Case
from farl_kernels.tables import Config

# A BEiT vocabulary has 8,192 visual tokens; the others stand for smaller and larger ones.
_VOCABULARIES = {"1024": 1024, "4096": 4096, "8192": 8192, "long": 16384}
_ROWS = 4096


def cases() -> list[Case]:
    """Every entry of `tables/<architecture>/token_loss.json`."""
    found = [
        Case("token_loss", "row", f"bits{8 * dtype.itemsize}_{size}", partial(_row, vocab, dtype), _candidates(vocab))
        for size, vocab in _VOCABULARIES.items()
        for dtype in (torch.bfloat16, torch.float32)
    ]
    totals = tuple({"BLOCK": block, "num_warps": warps, "num_stages": 1} for block in (1024, 2048) for warps in (4, 8))
    return [*found, Case("token_loss", "total", "any", _total, totals)]


def _candidates(vocab: int) -> tuple[Config, ...]:
    found = [
        {"ROWS": rows, "num_warps": warps, "num_stages": 1}
        for rows in (4, 8, 16)
        for warps in (2, 4, 8, 16, 32)
        if 128 <= vocab // warps <= 1024
    ]
    if vocab == 8192:
        # Two blocks on an SM.
        found += [{"ROWS": rows, "num_warps": 16, "num_stages": 1, "maxnreg": 64} for rows in (4, 8, 16)]
    if vocab > 8192:
        return tuple({"BLOCK_V": 256 * config["num_warps"], **config} for config in found)
    return tuple(found)


def _row(vocab: int, dtype: torch.dtype, device: torch.device) -> Callable[[], list[Tensor]]:
    from farl_kernels.token_loss.launchers import loss_rows

    logits = torch.randn(_ROWS, vocab, device=device)
    # Apart from the logits, so that a second run finds the same.
    gradient = torch.empty(_ROWS, 2 * vocab if dtype.itemsize == 2 else vocab, dtype=dtype, device=device)[:, :vocab]
    bias = torch.randn(vocab, dtype=dtype, device=device)
    targets = torch.randint(0, vocab, (_ROWS,), device=device)
    losses = torch.empty(_ROWS, device=device)
    hits = torch.empty(_ROWS, dtype=torch.int32, device=device)

    def run() -> list[Tensor]:
        sums = loss_rows(logits, gradient, bias, targets, -1, losses, hits, True)
        if device.type == "meta":
            # The gate sees what the entry is used for besides: a vocabulary that fills no block, no gradient.
            loss_rows(logits[:, 3:], gradient[:, 3:], bias[3:], targets, -1, losses, hits, True)
            loss_rows(logits, None, None, targets, -1, losses, hits, False)
        assert sums is not None
        return [gradient, losses, hits, sums.sum(0)]

    return run


def _total(device: torch.device) -> Callable[[], list[Tensor]]:
    from farl_kernels.token_loss.launchers import total

    rows = 256 * 75
    losses = torch.rand(rows, device=device)
    hits = torch.ones(rows, dtype=torch.int32, device=device)
    targets = torch.randint(0, 8192, (rows,), device=device)
    return lambda: list(total(losses, hits, targets, -1, True))
