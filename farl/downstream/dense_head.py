"""Heads that turn the maps of a backbone into dense outputs: FaRL's UPerNet, or one linear layer."""

from __future__ import annotations

from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from farl.downstream.backbone import Backbone, Features
from farl.downstream.upernet import DenseHead

Kind = Literal["upernet", "linear"]


class LinearHead(nn.Module):
    """`Features` to maps of `outputs` channels by one linear layer on each patch.

    The maps of all chosen blocks are normalised (LayerNorm) and joined; each patch gives a square of cells of about 4
    pixels, as fine as UPerNet's. Nothing here looks beyond its own patch, so what the outputs know of the rest of the
    face is the backbone's: a measure of the backbone, where UPerNet is a small network that learns much by itself.

    Args:
        width, patch_size: of the backbone. blocks: how many of its blocks come in.
    """

    def __init__(self, width: int, patch_size: int, blocks: int, outputs: int) -> None:
        super().__init__()
        side = max(1, round(patch_size / 4))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.classifier = nn.Conv2d(blocks * width, outputs * side**2, 1)
        self.shuffle = nn.PixelShuffle(side)
        self.stride = patch_size / side

    def forward(self, features: Features) -> Tensor:
        """Outputs [B, outputs, H / stride, W / stride]."""
        maps = [norm(x.movedim(1, -1)).movedim(-1, 1) for norm, x in zip(self.norms, features.maps, strict=True)]
        return self.shuffle(self.classifier(torch.cat(maps, 1)))


def check_kind(kind: str | None) -> Kind:
    """`--head` of a dense task; None is FaRL's. ValueError for one that is none."""
    if kind is not None and kind not in get_args(Kind):
        raise ValueError(f"--head is {kind!r}; parsing and alignment have {' and '.join(get_args(Kind))}")
    return cast(Kind, kind or "upernet")


def make_dense_head(
    kind: Kind, backbone: Backbone, outputs: int, *, channels: int, start: float | None = None
) -> DenseHead | LinearHead:
    """A head for `backbone`.

    Args:
        channels: of UPerNet, at most; it never has more than the backbone is wide.
        start: what all outputs are at the start, about; None leaves the last layer's bias random.

    Raises:
        ValueError: UPerNet and another number of blocks than 4.
    """
    width, blocks = backbone.width, len(backbone.blocks)
    if kind == "linear":
        head: DenseHead | LinearHead = LinearHead(width, backbone.patch_size, blocks, outputs)
        classifier = head.classifier
    else:
        if blocks != 4:
            raise ValueError(f"an UPerNet head reads 4 blocks, not {blocks}: name 4 with --blocks, or none")
        head = DenseHead(width, backbone.patch_size, outputs, channels=min(channels, width))
        classifier = head.head.classifier
    if start is not None:
        assert isinstance(classifier, nn.Conv2d) and classifier.bias is not None
        nn.init.constant_(classifier.bias, start)
    return head
