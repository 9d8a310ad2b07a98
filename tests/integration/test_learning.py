"""A micro model learns the embedded faces, and the run leaves what it promises."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any


def test_a_run_learns_and_leaves_its_report(
    shards: str, tmp_path: Path, run_train: Callable[..., Any], read_log: Callable[[Path], list[dict[str, Any]]]
) -> None:
    options = ["--steps", "120", "--warmup", "10", "--global-batch", "50", "--lr", "5e-3", "--save-every", "40"]
    held_out = ["--eval-data", shards, "--eval-every", "60", "--keep-last", "2"]
    said = run_train(tmp_path, *options, *held_out).stdout
    lines = read_log(tmp_path)
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == list(range(1, 121))
    for name in ("loss", "loss_contrastive", "loss_mim"):
        assert mean(line[name] for line in trained[-10:]) < 0.9 * mean(line[name] for line in trained[:5]), name
    # Guessing puts the right caption first in 1 of 50.
    assert mean(line["accuracy_image_to_text"] for line in trained[-10:]) > 3 / 50

    evaluations = [line for line in lines if "eval" in line]
    assert [line["step"] for line in evaluations] == [60, 120]
    last = evaluations[-1]["eval"]
    assert last["pairs"] == 150
    assert last["image_to_text_r5"] > 3 * last["chance_r5"] and last["text_to_image_r5"] > 3 * last["chance_r5"]

    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "latest",
        "step-00000080.pt",
        "step-00000120.pt",
    ]
    assert json.loads((tmp_path / "config.json").read_text())["global_batch"] == 50
    report = tmp_path / "report"
    assert str(report / "index.html") in said
    drawn = {path.name for path in report.glob("*.png")}
    assert drawn == {"curves.png", "caption_to_images.png", "image_to_captions.png", "masked_patches.png"}
    assert all(path.stat().st_size > 10_000 for path in report.glob("*.png"))
    # The same command again finds nothing left to do.
    assert "is after step 120 of 120" in run_train(tmp_path, *options, *held_out).stdout
