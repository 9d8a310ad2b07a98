from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from farl.model import MODELS, FaRL
from farl.report import (
    draw_caption_queries,
    draw_curves,
    draw_image_queries,
    draw_masked_patches,
    predict_tokens,
    read_metrics,
    report_run,
    write_page,
    write_report,
)
from farl.report.curves import _panels, running_mean
from farl.report.retrieval import spread_queries
from farl.report.style import GREEN
from farl.report.text import fitted
from farl_engine.data import CpuDecoder, ShardIndex, ShardWriter

Record = dict[str, Any]


def made_log(steps: int = 100) -> list[Record]:
    lines: list[Record] = []
    for step in range(1, steps + 1):
        t = step / steps
        lines.append(
            {
                "step": step, "samples": 8 * step, "loss": 5 - 3 * t, "loss_contrastive": 2 - t, "loss_mim": 3 - 2 * t,
                "accuracy_image_to_text": 0.5 * t, "accuracy_text_to_image": 0.4 * t, "accuracy_mim": 0.3 * t,
                "logit_scale": 14 + t, "lr": 1e-3 * t, "grad_norm": 2 - t, "pairs_per_second": 800.0,
                "data_wait_fraction": 0.02, "mfu": 0.0, "memory_bytes": 2**30, "bad_samples": 3,
            }
        )  # fmt: skip
        if step % 25 == 0:
            recalls = {f"{way}_r{k}": 0.1 * t * k for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
            chance = {f"chance_r{k}": 0.001 * k for k in (1, 5, 10)}
            lines.append({"step": step, "eval": {**recalls, **chance, "pairs": 1000, "distinct_captions": 900}})
    return lines


def write_log(run_dir: Path, lines: list[Record]) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def has_color(path: Path, color: str) -> int:
    """How many pixels have nearly this colour."""
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(pixels_of(path) - wanted).max(-1) <= 6).sum())


def faces(count: int, size: int = 16) -> torch.Tensor:
    return torch.randint(0, 80, (count, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def test_a_log_is_read_whole_or_cut_and_the_later_line_counts(tmp_path: Path) -> None:
    lines = [
        {"step": 2, "loss": 1.0},
        {"step": 1, "loss": 9.0},
        {"step": 2, "eval": {"pairs": 5}},
        {"step": 2, "loss": 3.0},
    ]
    write_log(tmp_path, lines)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    training, evaluation = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in training] == [(1, 9.0), (2, 3.0)]
    assert evaluation == [{"step": 2, "pairs": 5}]
    assert read_metrics(tmp_path / "none.jsonl") == ([], [])


def test_running_mean_does_not_lag() -> None:
    line = np.linspace(0, 1, 200)
    np.testing.assert_allclose(running_mean(line)[10:-10], line[10:-10], atol=1e-12)
    np.testing.assert_allclose(running_mean(np.ones(100)), 1)


def test_curves_show_what_the_log_has(tmp_path: Path) -> None:
    write_log(tmp_path, made_log())
    training, evaluation = read_metrics(tmp_path / "metrics.jsonl")
    whole = draw_curves(training, evaluation, tmp_path / "all.png", global_batch=8, title="a run")
    part = draw_curves([{"step": 1, "loss": math.nan}, {"step": 2, "loss": 1.5}], [], tmp_path / "part.png")
    assert whole is not None and part is not None
    assert pixels_of(whole).shape[1] > 3 * pixels_of(part).shape[1]
    assert has_color(whole, "#3565c9") > 500 and has_color(whole, "#d9722b") > 500
    assert draw_curves([], [], tmp_path / "nothing.png") is None
    assert not (tmp_path / "nothing.png").exists()


def test_time_waited_is_drawn_by_stage(tmp_path: Path) -> None:
    loader = {"read": 0.1, "decode": 0.3, "text": 0.0, "device_decode": 0.0, "wait": 0.4, "bottleneck": "decode"}
    lines = [{"step": step, "loss": 1.0, "data_wait_fraction": 0.4, "loader": loader} for step in (1, 50, 100)]
    (waited,) = [panel for panel in _panels(None) if panel.areas]
    assert {area.label: area.value(lines[0]) for area in waited.areas} == pytest.approx(
        {"reading": 0.1, "decoding": 0.3, "text": 0.0, "decoding on the GPU": 0.0}
    )
    assert [area.value({"step": 1, "loss": 1.0, "data_wait_fraction": 0.4}) for area in waited.areas] == [None] * 4
    pictures = []
    for name, stage in (("decode", "decode"), ("read", "read")):
        other = dict.fromkeys(loader, 0.0) | {stage: 0.4, "bottleneck": stage}
        pictures.append(draw_curves([line | {"loader": other} for line in lines], [], tmp_path / f"{name}.png"))
    assert pictures[0] is not None and pictures[1] is not None
    assert not np.array_equal(pixels_of(pictures[0]), pixels_of(pictures[1]))
    page = write_page(tmp_path / "index.html", title="a run", training=[x | {"pairs_per_second": 8.0} for x in lines])
    assert "40 % of the time waiting for data, mostly for its decode" in page.read_text().replace("40.0", "40")


def test_captions_are_fitted_into_lines() -> None:
    assert fitted("a short one", 8, 3.0, 2) == "a short one"
    long = fitted("a photograph of somebody with " * 20, 8, 1.75, 3)
    assert long.count("\n") == 2 and long.endswith("…")
    assert max(map(len, long.split("\n"))) < 40
    assert fitted("word" * 60, 8, 1.0, 2).count("\n") == 1  # no blank to break at
    assert fitted("tab\tand\x07bell", 8, 3.0, 1) == "tab and bell"
    assert fitted("\U00013000\U00013001 here", 8, 3.0, 1) == "[Egyptian] here"  # no font has hieroglyphs
    assert fitted("", 8, 1.0, 1) == ""


def test_right_images_are_framed(tmp_path: Path) -> None:
    images, captions = faces(9), ["a", "b", "c", "d", "e", "f", "g", "h", "$x^2$ \t \u4e2d"]
    right = torch.eye(9)
    # Every caption finds the next image first and its own one last.
    wrong = torch.eye(9).roll(1, 0) - torch.eye(9)
    for draw in (draw_caption_queries, draw_image_queries):
        draw(images, captions, right, right, tmp_path / "right.png")
        draw(images, captions, wrong, torch.eye(9), tmp_path / "wrong.png")
        assert not np.array_equal(pixels_of(tmp_path / "right.png"), pixels_of(tmp_path / "wrong.png"))
        assert has_color(tmp_path / "right.png", GREEN) > 100
    with pytest.raises(ValueError, match="got 9 images, 8 captions"):
        draw_caption_queries(images, captions[:8], right, right, tmp_path / "x.png")


def test_queries_are_different_captions_spread_over_all() -> None:
    captions = ["a", "A ", "b", "c", "b", "d"]
    assert spread_queries(captions, 2) == [2, 5]
    assert spread_queries(captions, 10) == [0, 2, 3, 5]


@pytest.mark.parametrize("decodes", [True, False])
def test_masked_patches_mark_right_and_wrong(tmp_path: Path, decodes: bool) -> None:
    images = torch.full((2, 16, 16, 3), 40, dtype=torch.uint8)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, 4:10] = True
    targets = torch.arange(32).view(2, 16)

    def decode(tokens: torch.Tensor) -> torch.Tensor:
        return (tokens.view(2, 4, 4, 1) * 3 + 100).to(torch.uint8).expand(2, 4, 4, 3)

    decoder = decode if decodes else None
    counts = {}
    for name, predictions in (("right", targets), ("wrong", targets + 1), ("outside", targets + (~mask).long())):
        path = draw_masked_patches(
            images, mask, targets, predictions, tmp_path / f"{name}.png", grid=(4, 4), decode=decoder
        )
        shown = pixels_of(path)
        greenish = (shown[..., 1] - shown[..., 0] > 60).sum()
        reddish = (shown[..., 0] - shown[..., 1] > 40).sum()
        counts[name] = (greenish > 2000, reddish > 2000)
    assert counts == {"right": (True, False), "wrong": (False, True), "outside": (True, False)}
    with pytest.raises(ValueError, match="2 images of 3 x 3 patches"):
        draw_masked_patches(images, mask, targets, targets, tmp_path / "x.png", grid=(3, 3))


def test_predictions_fall_on_the_masked_patches() -> None:
    torch.manual_seed(0)
    model = FaRL(MODELS["farl-micro"]).eval()
    images = faces(3, 32)
    with torch.no_grad():
        model.visual.lm_head.bias[7] = 1e4
    mask, predictions = predict_tokens(model, images, mask_ratio=6 / 16, seed=5)
    assert mask.any(1).all() and int(mask.sum(1).max()) <= 6
    assert predictions[mask].tolist() == [7] * int(mask.sum())
    assert (predictions[~mask] == -1).all()


class FewColours:
    """A visual tokenizer of 16 shades for 8 x 8 patches, as `PatchCodebook`."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().view(-1, 4, 8, 4, 8, 3).mean((2, 4, 5)).div(16).long().flatten(1)

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        shades = (tokens.view(-1, 4, 4, 1) * 16 + 8).to(torch.uint8)
        return shades.repeat_interleave(8, 1).repeat_interleave(8, 2).expand(-1, -1, -1, 3)


def test_report_of_a_run_is_one_page_that_works_alone(tmp_path: Path) -> None:
    run_dir = tmp_path / "<my run>"
    write_log(run_dir, made_log())
    (run_dir / "config.json").write_text(json.dumps({"model": "farl-micro", "global_batch": 8, "data": "<b>x</b>"}))
    torch.manual_seed(0)
    model = FaRL(MODELS["farl-micro"]).train()
    captions = [f"face number {i}" for i in range(12)]
    page = write_report(run_dir, model, faces(12, 32), captions, visual_tokenizer=FewColours())
    assert model.training
    text = page.read_text()
    pictures = re.findall(r'<img src="([^"]+)"', text)
    assert pictures == ["curves.png", "caption_to_images.png", "image_to_captions.png", "masked_patches.png"]
    for name in pictures:
        assert pixels_of(page.parent / name).std() > 5
    assert "&lt;my run&gt;" in text and "<b>x</b>" not in text
    assert not re.search(r"https?://|<script|<link", text)
    assert "10.0 %" in text and "100 times that" in text  # held-out R@1 against its chance
    # Redrawn from the files alone, the pictures of the model stay.
    write_report(run_dir)
    assert re.findall(r'<img src="([^"]+)"', page.read_text()) == pictures


def test_an_untrained_text_tower_is_not_asked(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"contrastive_weight": 0.0}))
    torch.manual_seed(0)
    captions = [f"face number {i}" for i in range(3)]
    page = write_report(
        tmp_path, FaRL(MODELS["farl-micro"]), faces(3, 32), captions, visual_tokenizer=FewColours(), mask_ratio=0.25
    )
    assert [path.name for path in page.parent.glob("*.png")] == ["masked_patches.png"]


def test_report_from_shards_leaves_out_what_cannot_be_read(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "held-out-%02d.tar") as writer:
        for i, image in enumerate(faces(9, 32)):
            buffer = io.BytesIO()
            Image.fromarray(image.numpy()).save(buffer, "PNG")
            writer.write(f"{i}", {"png": b"" if i == 4 else buffer.getvalue(), "txt": f"face {i}"})
    index = ShardIndex.build(tmp_path / "held-out-*.tar", cache=False)
    torch.manual_seed(0)
    page = report_run(
        tmp_path / "run", FaRL(MODELS["farl-micro"]), index, CpuDecoder(32), FewColours(), mask_ratio=0.25
    )
    names = ["caption_to_images.png", "image_to_captions.png", "masked_patches.png"]
    assert sorted(path.name for path in page.parent.glob("*.png")) == names


def test_a_page_without_anything_says_so(tmp_path: Path) -> None:
    assert "No log line yet" in write_page(tmp_path / "index.html", title="empty").read_text()
    assert "No log line yet" in write_report(tmp_path / "nothing").read_text()


def test_pictures_of_training_pairs_say_so(tmp_path: Path) -> None:
    (tmp_path / "curves.png").touch()
    (tmp_path / "image_to_captions.png").touch()
    for config, count in ({"eval_data": ""}, 1), ({"eval_data": "val.tar"}, 0), ({}, 0):
        page = write_page(tmp_path / "index.html", title="run", config=config).read_text()
        assert page.count("These are training pairs") == count
