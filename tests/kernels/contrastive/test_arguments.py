"""Wrong arguments get one line that names them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from farl_kernels.contrastive import ContrastiveLoss, contrastive_loss, gather_features

IMAGE, TEXT, SCALE = torch.ones(4, 8), torch.ones(4, 8), torch.tensor(10.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": torch.ones(4, 8, 1)}, "image_features must be .*got torch.float32 \\[4, 8, 1\\]"),
        ({"image": torch.ones(4, 8, dtype=torch.int64)}, "image_features must be a floating-point"),
        ({"image": torch.ones(0, 8), "text": torch.ones(0, 8)}, "image_features must be .* n >= 1"),
        ({"text": torch.ones(4, 7)}, "text_features must have the shape .*\\[4, 8\\]; got \\[4, 7\\]"),
        ({"text": torch.ones(4, 8, dtype=torch.float64)}, "must have one dtype"),
        ({"text": gather_features(torch.ones(3, 8))}, "text_features must have the shape"),
        ({"text": torch.ones(4, 8, device="meta")}, "text_features must be on the device"),
        ({"scale": 10.0}, "logit_scale must be a 0-d .*got float"),
        ({"scale": torch.ones(1)}, "logit_scale must be a 0-d .*got torch.float32 \\[1\\]"),
        ({"kind": "softmin"}, "kind must be one of 'softmax', 'sigmoid'; got 'softmin'"),
        ({"reduction": "max"}, "reduction must be one of"),
        ({"precision": "fp8"}, "precision must be one of"),
        ({"label_smoothing": 1.0}, "label_smoothing must be in"),
        ({"label_smoothing": 0.1, "kind": "sigmoid"}, "label_smoothing is for kind='softmax'"),
        ({"logit_bias": torch.tensor(0.0)}, "logit_bias is for kind='sigmoid'"),
        ({"logit_bias": torch.zeros(4), "kind": "sigmoid"}, "logit_bias must be a 0-d"),
        ({"duplicates": "drop"}, "duplicates must be one of"),
        ({"duplicates": "mask"}, "ids must be given with duplicates='mask'"),
        ({"duplicates": "mask", "ids": torch.zeros(4)}, "ids must be int64 \\[4\\]"),
        ({"duplicates": "mask", "ids": torch.zeros(5, dtype=torch.int64)}, "ids must be int64 \\[4\\]"),
        ({"chunk_bytes": 0}, "chunk_bytes must be a positive"),
        ({"backend": "cuda"}, "backend 'cuda' is not one of"),
        ({"group": object()}, "group is given but torch.distributed is not initialised"),
    ],
)
def test_refused_by_name(change: dict[str, Any], message: str) -> None:
    change = {"image": IMAGE, "text": TEXT, "scale": SCALE} | change
    with pytest.raises(ValueError, match=message):
        contrastive_loss(change.pop("image"), change.pop("text"), change.pop("scale"), **change)


def test_module_checks_its_settings_when_made() -> None:
    for settings in ({"kind": "x"}, {"reduction": "x"}, {"precision": "x"}, {"duplicates": "x"}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} must be one of"):
            ContrastiveLoss(**settings)


def test_gather_of_something_else() -> None:
    with pytest.raises(ValueError, match="text_features must be a floating-point tensor"):
        gather_features([1.0])  # type: ignore[arg-type]
