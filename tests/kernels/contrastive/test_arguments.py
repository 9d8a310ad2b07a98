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
        (
            {"image": torch.ones(4, 8, 1)},
            r"image_features is torch.float32 \(4, 8, 1\), want a floating-point tensor \[n, D\]",
        ),
        ({"image": torch.ones(4, 8, dtype=torch.int64)}, "image_features is torch.int64 .* want a floating-point"),
        ({"image": torch.ones(0, 8), "text": torch.ones(0, 8)}, "image_features is .* n >= 1"),
        ({"text": torch.ones(4, 7)}, r"text_features has shape \(4, 7\), want \(4, 8\), the shape of image_features"),
        ({"text": torch.ones(4, 8, dtype=torch.float64)}, "text_features is torch.float64, want torch.float32"),
        ({"text": gather_features(torch.ones(3, 8))}, "text_features has shape"),
        ({"text": torch.ones(4, 8, device="meta")}, "text_features is on meta, want cpu"),
        ({"scale": 10.0}, "logit_scale is float, want a 0-d"),
        ({"scale": torch.ones(1)}, r"logit_scale is torch.float32 \(1,\) on cpu, want a 0-d"),
        ({"kind": "softmin"}, "kind is 'softmin', want one of 'softmax', 'sigmoid'"),
        ({"reduction": "max"}, "reduction is 'max', want one of"),
        ({"precision": "fp8"}, "precision is 'fp8', want one of"),
        ({"label_smoothing": 1.0}, r"label_smoothing is 1.0, want a number in \[0, 1\)"),
        ({"label_smoothing": 0.1, "kind": "sigmoid"}, "label_smoothing is 0.1, want 0 with kind='sigmoid'"),
        ({"logit_bias": torch.tensor(0.0)}, "logit_bias is given, want None with kind='softmax'"),
        ({"logit_bias": torch.zeros(4), "kind": "sigmoid"}, "logit_bias is .* want a 0-d"),
        ({"duplicates": "drop"}, "duplicates is 'drop', want one of"),
        ({"duplicates": "mask"}, "ids is None, want .* with duplicates='mask'"),
        ({"duplicates": "mask", "ids": torch.zeros(4)}, r"ids is torch.float32 .* want int64 \[4\]"),
        (
            {"duplicates": "mask", "ids": torch.zeros(5, dtype=torch.int64)},
            r"ids is torch.int64 \(5,\) .* want int64 \[4\]",
        ),
        ({"return_lse": True, "kind": "sigmoid"}, "return_lse is True, want False with kind='sigmoid'"),
        ({"chunk_bytes": 0}, "chunk_bytes is 0, want a positive"),
        ({"backend": "cuda"}, "backend 'cuda' is not one of"),
        ({"group": object()}, "group is given, want torch.distributed initialised"),
    ],
)
def test_refused_by_name(change: dict[str, Any], message: str) -> None:
    change = {"image": IMAGE, "text": TEXT, "scale": SCALE} | change
    with pytest.raises(ValueError, match=f"^contrastive_loss: {message}"):
        contrastive_loss(change.pop("image"), change.pop("text"), change.pop("scale"), **change)


def test_module_checks_its_settings_when_made() -> None:
    for settings in ({"kind": "x"}, {"reduction": "x"}, {"precision": "x"}, {"duplicates": "x"}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} is 'x', want one of"):
            ContrastiveLoss(**settings)


def test_gather_of_something_else() -> None:
    with pytest.raises(ValueError, match="text_features is list, want a floating-point tensor"):
        gather_features([1.0])  # type: ignore[arg-type]
