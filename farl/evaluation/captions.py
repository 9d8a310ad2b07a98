"""Which captions are the same caption."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def normalise_caption(caption: str) -> str:
    """Lower case, runs of white space made one space, none at the ends: captions equal after this are one caption."""
    return " ".join(caption.casefold().split())


def caption_digest(caption: str) -> tuple[int, int]:
    """128 bits of the normalised caption as two int64, so that ranks can compare captions by gathering tensors."""
    digest = hashlib.blake2b(normalise_caption(caption).encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little", signed=True), int.from_bytes(digest[8:], "little", signed=True)


def group_captions(digests: Tensor) -> tuple[Tensor, Tensor]:
    """Number the captions in order of first appearance.

    Args:
        digests: int64 [N, 2] from `caption_digest`.

    Returns:
        int64 [N], the group of each item, and int64 [U], the first item of each group (ascending).
    """
    _, inverse = torch.unique(digests, dim=0, return_inverse=True)
    count = int(inverse.max()) + 1 if len(inverse) else 0
    first = torch.full((count,), len(inverse), dtype=torch.int64)
    first.scatter_reduce_(0, inverse, torch.arange(len(inverse)), reduce="amin")
    first, order = first.sort()
    number = torch.empty_like(order)
    number[order] = torch.arange(count)
    return number[inverse], first
