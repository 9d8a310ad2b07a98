"""Packed rows [T, ...] <-> padded sequences [S, L, ...], on the device, without asking the host for a length.

`cu_seqlens` int32 [S + 1] are the cumulative lengths: sequence s holds the rows cu_seqlens[s] .. cu_seqlens[s + 1] - 1.
Rows from cu_seqlens[-1] on belong to no sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def segment_ids(cu_seqlens: Tensor, total: int) -> Tensor:
    """The sequence of each of `total` packed rows, int64 [T]; S for rows past cu_seqlens[-1]."""
    positions = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), positions, right=True)


class _MoveRows(torch.autograd.Function):
    """Row j of the result is row source[j] of `rows` [R, C], or 0 where source[j] == R.

    `target` is the same map seen from the other side (where each of the R rows goes, or the number of rows of the
    result), so that the backward moves rows too and adds none.
    """

    @staticmethod
    def forward(rows: Tensor, source: Tensor, target: Tensor) -> Tensor:
        # A row of zeros behind the others serves the empty places: no mask has to be applied, and no NaN is read.
        return torch.cat([rows, rows.new_zeros(1, rows.shape[1])]).index_select(0, source)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        _, source, target = inputs
        ctx.save_for_backward(source, target)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        source, target = ctx.saved_tensors
        # Through the Function again: the gradient of a gradient is then right as well.
        return _MoveRows.apply(grads[0], target, source), None, None


@dataclass(frozen=True)
class PaddedLayout:
    """Where each packed row stands in the padded array and back. L = max_seqlen, slots = S * L."""

    slot_of_row: Tensor  # int64 [T], S * L where the row is past the end (of all sequences, or of L rows)
    row_of_slot: Tensor  # int64 [S * L], T where the slot is empty
    key_mask: Tensor  # bool [S, L], True where a row stands
    sequences: int
    length: int

    @classmethod
    def build(cls, cu_seqlens: Tensor, total: int, max_seqlen: int) -> PaddedLayout:
        """`total` rows in S >= 1 sequences of at most `max_seqlen` >= 1 rows each; rows past that are left out."""
        starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff()
        sequences, device = lengths.shape[0], cu_seqlens.device
        steps = torch.arange(max_seqlen, device=device)
        key_mask = steps < lengths[:, None]
        row_of_slot = (starts[:, None] + steps).masked_fill_(~key_mask, total).flatten()
        segments = segment_ids(cu_seqlens, total)
        inside = segments.clamp(max=sequences - 1)
        step = torch.arange(total, device=device) - starts[inside]
        # A bound that is too small cuts sequences; without it a row would meet another sequence, or leave the array.
        nowhere = (segments == sequences) | (step >= max_seqlen)
        slot_of_row = (inside * max_seqlen + step).masked_fill_(nowhere, sequences * max_seqlen)
        return cls(slot_of_row, row_of_slot, key_mask, sequences, max_seqlen)

    def pad(self, rows: Tensor) -> Tensor:
        """[T, ...] -> [S, L, ...], zero in empty slots."""
        flat = rows.reshape(rows.shape[0], -1)
        out = _MoveRows.apply(flat, self.row_of_slot, self.slot_of_row)
        return out.view(self.sequences, self.length, *rows.shape[1:])

    def unpad(self, padded: Tensor) -> Tensor:
        """[S, L, ...] -> [T, ...], zero past the end."""
        flat = padded.reshape(self.row_of_slot.shape[0], -1)
        out = _MoveRows.apply(flat, self.slot_of_row, self.row_of_slot)
        return out.view(-1, *padded.shape[2:])
