"""Captions padded to a few total lengths, for which an update is recorded once each (`--engine graph`)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch.nn.functional as F

if TYPE_CHECKING:
    from farl.model.text import PackedText

# Also what Triton kernels ask of a size before they read it in wide words: all lengths so share their code.
SMALLEST = 16


def bucket_of(tokens: int) -> int:
    """The length that this many tokens are padded to: a multiple of a sixteenth of the power of two below.

    From 256 tokens on the padding is less than a sixteenth, and 2.2 % on average, of the text tower alone. How many
    lengths a run has follows from how much captions vary: with 18 tokens on average and a standard deviation of 10, all
    totals within three standard deviations of their mean take 3 lengths at 640 captions, 10 at 64 and 16 at 16.
    """
    step = max(SMALLEST, (1 << max(tokens, 1).bit_length() - 1) // 16)
    return -(-tokens // step) * step


def padded(parts: tuple[PackedText, ...], context_length: int) -> tuple[PackedText, ...]:
    """The same captions, each part as long as the bucket of the longest; nothing else of them says how long they are.

    Runs on the host, before the batch moves to a device.
    """
    length = bucket_of(max(len(part.tokens) for part in parts))
    return tuple(
        replace(part, tokens=F.pad(part.tokens, (0, length - len(part.tokens))), max_seqlen=context_length)
        for part in parts
    )
