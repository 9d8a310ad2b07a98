"""Heads of the dense tasks: which there are, where they start, and what a linear one can see."""

from __future__ import annotations

import pytest
import torch

from farl.downstream.alignment import AlignmentTask
from farl.downstream.backbone import Features, load_backbone
from farl.downstream.dense_head import LinearHead, check_kind, make_dense_head
from farl.downstream.parsing import ParsingTask
from farl.downstream.upernet import DenseHead
from farl.faces.face import CLASSES


@pytest.mark.parametrize(("patch_size", "stride"), [(16, 4.0), (14, 14 / 4), (8, 4.0), (4, 4.0), (2, 2.0)])
def test_a_linear_head_sees_one_patch_alone(patch_size: int, stride: float) -> None:
    torch.manual_seed(0)
    head = LinearHead(width=8, patch_size=patch_size, blocks=2, outputs=3)
    maps = [torch.randn(1, 8, 3, 3, requires_grad=True) for _ in range(2)]
    outputs = head(Features(maps, []))
    side = outputs.shape[-1] // 3
    assert outputs.shape == (1, 3, 3 * side, 3 * side) and head.stride == stride == patch_size / side
    outputs[:, :, side : 2 * side, :side].square().sum().backward()
    for x in maps:
        assert x.grad is not None
        touched = x.grad.abs().sum((0, 1)) > 0
        assert touched.nonzero().tolist() == [[1, 0]]


def test_its_cells_lie_where_they_say() -> None:
    """The weights that set cell (y, x) of a patch are its own."""
    head = LinearHead(width=4, patch_size=16, blocks=1, outputs=2)
    torch.nn.init.zeros_(head.classifier.weight)
    assert head.classifier.bias is not None
    torch.nn.init.zeros_(head.classifier.bias)
    with torch.no_grad():
        head.classifier.bias[16 + 4 * 2 + 3] = 1.0  # output 1, row 2, column 3 of the 4 x 4 cells
    outputs = head(Features([torch.randn(1, 4, 2, 2)], []))
    assert outputs.nonzero().tolist() == [[0, 1, y, x] for y in (2, 6) for x in (3, 7)]


def test_both_heads_of_both_tasks_start_where_they_should() -> None:
    backbone = load_backbone("scratch:farl-micro", resolution=32)
    for kind, made in (("upernet", DenseHead), ("linear", LinearHead)):
        alignment = AlignmentTask(points=5, layout="faces", crop=32, head=kind)  # type: ignore[arg-type]
        head = alignment.make_head(backbone)
        assert isinstance(head, made)
        classifier = head.classifier if isinstance(head, LinearHead) else head.head.classifier  # type: ignore[union-attr]
        assert classifier.bias.eq(alignment.rules.start).all() and alignment.rules.start == -5  # type: ignore[union-attr]
        parsing = ParsingTask(CLASSES, warp=0.0, crop=32, small=True, head=kind)  # type: ignore[arg-type]
        with torch.no_grad():
            maps = parsing.make_head(backbone)(backbone(torch.rand(2, 3, 32, 32)))
        assert maps.shape == (2, 11, 8, 8)


def test_kinds_and_blocks() -> None:
    assert check_kind(None) == "upernet" and check_kind("linear") == "linear"
    with pytest.raises(ValueError, match="--head is 'full'; parsing and alignment have upernet and linear"):
        check_kind("full")
    two = load_backbone("scratch:farl-micro", resolution=32, blocks=(0, 1))
    assert isinstance(make_dense_head("linear", two, 3, channels=8), LinearHead)
    with pytest.raises(ValueError, match="UPerNet head reads 4 blocks, not 2"):
        make_dense_head("upernet", two, 3, channels=8)
