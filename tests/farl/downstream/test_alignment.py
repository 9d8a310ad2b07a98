"""The alignment task: crops with points, losses, and figures in the original images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from farl.downstream.alignment import AlignmentTask, blend_noise, make_task, occlude, open_set, restore_task
from farl.downstream.backbone import load_backbone
from farl.downstream.draws import Draws
from farl.downstream.heatmaps import centroids, gaussian_maps
from farl.downstream.network import Network
from farl.faces.face import draw
from farl.faces.shards import FaceSet, write_faces

CPU = torch.device("cpu")


def face_samples(count: int, size: int = 64) -> list[dict[str, Any]]:
    samples = []
    for face in (draw(i, size=size) for i in range(count)):
        p = face.landmarks
        box = np.concatenate([p.min(0), p.max(0)])
        samples.append({"image": face.image, "points": p, "box": box, "name": str(face.index), "subsets": ("common",)})
    return samples


@pytest.fixture(scope="module")
def samples() -> list[dict[str, Any]]:
    return face_samples(3)


def spotted(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """A black image with a soft white spot at each point (x, y)."""
    rows, columns = np.mgrid[:height, :width]
    spots = [np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 8) for x, y in points]
    return np.repeat(np.round(255 * np.max(spots, 0))[..., None], 3, 2).astype(np.uint8)


def brightest(image: Tensor) -> tuple[float, float]:
    """Centre of mass (x, y) of the only spot."""
    mass = image.double().clamp(min=0.02) - 0.02
    total = mass.sum()
    x, y = torch.arange(image.shape[1]), torch.arange(image.shape[0])
    return float((mass.sum(0) * x).sum() / total), float((mass.sum(1) * y).sum() / total)


@pytest.mark.parametrize("layout", ["300w", "aflw-19", "folder"])
@pytest.mark.parametrize("augment", [False, True])
def test_points_lie_where_the_image_has_them(layout: str, augment: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A spot drawn at a point of a wide photograph is at that point of the crop, to a twentieth of its pixel."""
    monkeypatch.setattr("farl.downstream.alignment.occlude", lambda images, draws: images)
    monkeypatch.setattr("farl.downstream.alignment.blend_noise", lambda images, draws: images)
    monkeypatch.setattr("farl.downstream.alignment.augment_colors", lambda images, draws: images)
    point = np.array([[61.3, 42.6]], np.float32)
    sample = {"image": spotted(point, 90, 130), "points": point, "box": np.array([30.5, 20, 100, 71]), "name": "a"}
    task = AlignmentTask(1, layout, 96)
    batch = task.batch([sample], CPU, rng=Draws([(7, 1)]) if augment else None)
    assert batch["images"].shape == (1, 3, 96, 96) and batch["points"].shape == (1, 1, 2)
    x, y = brightest(batch["images"][0, 0])
    assert ((x + 0.5) / 96, (y + 0.5) / 96) == pytest.approx(batch["points"][0, 0].tolist(), abs=0.05 / 96)
    assert ("original" in batch) is not augment


@pytest.mark.parametrize("layout", ["wflw", "aflw-19"])
def test_the_box_in_the_crop(layout: str) -> None:
    """Its outer edges: at 0.8 of the side, or on it and stretched on AFLW-19."""
    box = np.array([9.5, 19.5, 49.5, 39.5], np.float32)
    corners = np.array([[9.5, 19.5], [49.5, 39.5]], np.float32)
    sample = {"image": np.zeros((60, 60, 3), np.uint8), "points": corners, "box": box, "name": "a"}
    points = AlignmentTask(2, layout, 64).batch([sample], CPU, rng=None)["points"][0]
    wanted = [[0.1, 0.3], [0.9, 0.7]] if layout == "wflw" else [[0.0, 0.0], [1.0, 1.0]]
    torch.testing.assert_close(points, torch.tensor(wanted))


def perfect(batch: dict[str, Any], size: int) -> Tensor:
    return gaussian_maps(batch["points"], size, 4.0).clamp(1e-7, 1 - 1e-6).logit()


def test_perfect_maps_give_the_points_of_the_original(samples: list[dict[str, Any]]) -> None:
    wide = {**samples[1], "image": np.zeros((40, 90, 3), np.uint8), "points": samples[1]["points"] + (20, -13)}
    wide["box"] = samples[1]["box"] + (20, -13, 20, -13)
    task = AlignmentTask(68, "300w", 128)
    several = [samples[0], wide, samples[2]]
    batch = task.batch(several, CPU, rng=None)
    metric = task.metric()
    metric.update(perfect(batch, 64), batch)
    for sample, found in zip(several, task.predict(perfect(batch, 64), batch), strict=True):
        assert found.shape == (68, 2)
        assert np.abs(found - sample["points"]).max() < 0.2
    figures = metric.compute()
    assert task.main_metric == "nme_inter_ocular"
    assert figures["nme_inter_ocular"] < 0.005 and figures["fr_inter_ocular_10"] == 0
    assert figures["nme_inter_ocular/common"] == figures["nme_inter_ocular"]
    assert math.isnan(figures["nme_inter_ocular/challenge"])


def test_figures_are_of_predictions_in_the_original(samples: list[dict[str, Any]]) -> None:
    torch.manual_seed(0)
    task = AlignmentTask(68, "faces", 32)
    batch = task.batch(samples, CPU, rng=None)
    outputs = torch.randn(3, 68, 8, 8)
    metric = task.metric()
    metric.update(outputs, batch)
    errors = []
    for sample, found in zip(samples, task.predict(outputs, batch), strict=True):
        box = sample["box"].astype(float)
        distances = np.linalg.norm(found - sample["points"], axis=1)
        errors.append(distances.mean() / math.hypot(box[2] - box[0], box[3] - box[1]))
    assert metric.compute()["nme_diagonal"] == pytest.approx(np.mean(errors), rel=1e-9)
    again = task.metric()
    again.load_state(metric.state())
    assert again.compute() == pytest.approx(metric.compute(), nan_ok=True)


def test_losses_by_hand(samples: list[dict[str, Any]]) -> None:
    torch.manual_seed(0)
    task = AlignmentTask(68, "300w", 64)
    batch = task.batch(samples, CPU, rng=None)
    outputs = torch.randn(3, 68, 16, 16, requires_grad=True)
    losses = task.loss(outputs, batch)
    found = centroids(outputs).double()
    distance = (found - batch["points"].double()).square().sum(-1).sqrt().mean()
    torch.testing.assert_close(losses["loss_points"].double(), distance)
    # At 128 x 128, against bumps of 5 pixels; written out as -t log(s) - (1 - t) log(1 - s).
    logits = F.interpolate(outputs, scale_factor=8, mode="bilinear").double()
    target = gaussian_maps(batch["points"], 128, 5.0).double()
    entropy = -target * F.logsigmoid(logits) - (1 - target) * F.logsigmoid(-logits)
    torch.testing.assert_close(losses["loss_maps"].double(), entropy.mean())
    torch.testing.assert_close(losses["loss"], losses["loss_points"] + losses["loss_maps"])
    losses["loss"].backward()
    assert outputs.grad is not None and outputs.grad.isfinite().all()
    assert task.loss(outputs.detach().bfloat16(), batch)["loss"].dtype == torch.float32


def test_augmentation_depends_on_the_sample_alone(samples: list[dict[str, Any]]) -> None:
    task = AlignmentTask(68, "faces", 40)
    whole = task.batch(samples, CPU, rng=Draws((5, i) for i in range(3)))
    part = task.batch(samples[1:], CPU, rng=Draws((5, i) for i in (1, 2)))
    torch.testing.assert_close(whole["images"][1:], part["images"])
    torch.testing.assert_close(whole["points"][1:], part["points"])
    assert not torch.equal(whole["images"], task.batch(samples, CPU, rng=None)["images"])


def test_augmentation_is_never_a_mirror_and_stays_in_its_ranges() -> None:
    sample = {
        "image": np.zeros((8, 8, 3), np.uint8),
        "points": np.array([[10, 10], [20, 10], [10, 20]], np.float32),
        "box": np.array([0, 0, 100, 100], np.float32),
        "name": "a",
    }
    task = AlignmentTask(3, "wflw", 16)
    moved = task.batch([sample] * 300, CPU, rng=Draws((i,) for i in range(300)))["points"].double()
    across, down = moved[:, 1] - moved[:, 0], moved[:, 2] - moved[:, 0]
    scale = across.norm(dim=1) * 10
    angle = torch.atan2(across[:, 1], across[:, 0])
    assert 0.7 <= scale.min() < 0.72 and 0.88 < scale.max() <= 0.9
    assert -0.174 <= angle.min() < -0.16 and 0.16 < angle.max() <= 0.174
    assert (across[:, 0] * down[:, 1] - across[:, 1] * down[:, 0] > 0).all()
    # The middle of the crop moves by the shift alone.
    middle = {**sample, "points": np.full((3, 2), 50, np.float32)}
    shift = task.batch([middle] * 300, CPU, rng=Draws((i,) for i in range(300)))["points"][:, 0] - 0.5
    assert 0.045 < shift.abs().max() <= 0.05 + 1e-6


def test_occlusion_is_one_rectangle_of_the_given_sizes() -> None:
    images = occlude(torch.ones(400, 3, 100, 100), Draws((i,) for i in range(400)))
    heights, widths = [], []
    for image in images:
        black = image == 0
        assert torch.equal(black[0], black[2])
        rows, columns = black[0].any(1).nonzero().flatten(), black[0].any(0).nonzero().flatten()
        if not len(rows):
            continue
        assert black[0, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        if rows[0] > 0 and rows[-1] < 99 and columns[0] > 0 and columns[-1] < 99:
            heights.append(len(rows))
            widths.append(len(columns))
        assert 0 < black[0].float().mean() < 0.22
    assert 9 <= min(heights) < 14 and 36 < max(heights) <= 42
    assert max(abs(h - w) for h, w in zip(heights, widths, strict=True)) <= 12
    assert (images == 0).any((1, 2, 3)).float().mean() > 0.97


def test_noise_is_blended_into_half_of_the_images() -> None:
    images = blend_noise(torch.full((300, 3, 16, 16), 0.5), Draws((i,) for i in range(300)))
    spread = images.flatten(1).std(1) * math.sqrt(12)  # of uniform noise: the share
    noisy = spread > 1e-4
    assert 0.4 < noisy.float().mean() < 0.6
    assert 0.45 < spread.max() < 0.55 and 0.2 < spread[noisy].mean() < 0.3
    assert (images[noisy].mean((1, 2, 3)) - 0.5).abs().max() < 0.03
    assert (images >= 0).all() and (images <= 1).all()


def test_an_image_without_labels_can_be_predicted(samples: list[dict[str, Any]]) -> None:
    task = AlignmentTask(68, "300w", 32)
    batch = task.batch([{"image": samples[0]["image"], "name": "bare"}], CPU, rng=None)
    assert "points" not in batch
    (found,) = task.predict(torch.zeros(1, 68, 8, 8), batch)
    # A flat map's centre is the middle of the whole image.
    assert found == pytest.approx(np.full((68, 2), 31.5), abs=1e-4)


def test_wrong_labels_are_refused(samples: list[dict[str, Any]]) -> None:
    task = AlignmentTask(19, "aflw-19", 32)
    with pytest.raises(ValueError, match=r"0 has points of shape \[68, 2\]; the task has 19"):
        task.batch(samples, CPU, rng=None)
    with pytest.raises(ValueError, match="0: a box has no area"):
        AlignmentTask(68, "300w", 32).batch([{**samples[0], "box": np.array([1, 1, 1, 5])}], CPU, rng=None)


class Told:
    def __init__(self, **about: Any) -> None:
        self._about = {"path": "here", **about}

    def about(self) -> dict[str, Any]:
        return self._about


@pytest.mark.parametrize(
    ("layout", "points", "epochs", "scale", "kinds", "curve"),
    [
        ("aflw-19", 19, 150, 1.0, ("diagonal", "box"), ("box", 0.07)),
        ("300w", 68, 250, 0.8, ("inter_ocular", "inter_pupil"), ("inter_ocular", 0.1)),
        ("wflw", 98, 150, 0.8, ("inter_ocular", "inter_pupil"), ("inter_ocular", 0.1)),
        ("folder", 68, 250, 0.8, ("diagonal", "box", "inter_ocular", "inter_pupil"), ("inter_ocular", 0.1)),
        ("folder", 21, 250, 0.8, ("diagonal", "box"), ("box", 0.07)),
    ],
)
def test_protocols(layout: str, points: int, epochs: int, scale: float, kinds: Any, curve: Any) -> None:
    task = make_task(Told(layout=layout, points=points))  # type: ignore[arg-type]
    rules, settings = task.rules, task.protocol
    assert (settings.epochs, rules.scale, rules.kinds, rules.curve) == (epochs, scale, kinds, curve)
    assert task.main_metric == f"nme_{kinds[0]}"
    assert (settings.lr_backbone, settings.lr_head, settings.weight_decay) == (1e-4, 1e-2, 1e-5)
    assert (settings.batch, settings.resolution, settings.crop, settings.ema) == (40, 448, 512, 0.999)
    assert settings.milestones == (200,) and (rules.heatmap, rules.radius) == (128, 5.0)
    assert rules.antialias is (layout == "folder")
    assert restore_task(task.about()) == task


def test_protocol_of_drawn_faces(tmp_path: Path) -> None:
    write_faces(tmp_path, FaceSet(train=2, val=1, size=48), workers=0)
    task = make_task(open_set(str(tmp_path / "train-*.tar"), split="train"))
    assert (task.crop, task.points, task.protocol.resolution) == (48, 68, 64)
    assert task.main_metric == "nme_diagonal"
    assert make_task(Told(layout="folder", points=5), crop=64).protocol.crop == 64  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="UPerNet head reads 4 blocks, not 2"):
        task.make_head(load_backbone("scratch:farl-micro", resolution=48, blocks=(0, 1)))


def test_a_few_steps_learn_where_points_are() -> None:
    """On eight faces, from nothing: far better than the mean shape, which is what a blind network would find."""
    torch.manual_seed(0)
    samples = face_samples(8, size=48)
    task = AlignmentTask(68, "faces", 48)
    backbone = load_backbone("scratch:farl-micro", resolution=32)
    network = Network(backbone, task.make_head(backbone)).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    batch = task.batch(samples, CPU, rng=None)
    for _ in range(45):
        loss = task.loss(network(batch["images"]), batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    metric = task.metric()
    with torch.no_grad():
        metric.update(network(batch["images"]), batch)
    blind = (batch["points"] - batch["points"].mean(0)).norm(dim=-1).mean()
    found = (centroids(network(batch["images"])) - batch["points"]).norm(dim=-1).mean()
    assert found < 0.6 * blind
    assert metric.compute()["nme_diagonal"] < 0.04
