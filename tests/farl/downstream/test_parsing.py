"""The parsing task: crops with labels, loss, and figures on the original images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from farl.downstream.backbone import load_backbone
from farl.downstream.draws import Draws
from farl.downstream.network import Network
from farl.downstream.parsing import (
    ParsingTask,
    balanced_weights,
    make_task,
    open_set,
    original_logits,
    restore_task,
)
from farl.downstream.warp import random_similarity
from farl.faces.face import CLASSES, draw
from farl.faces.shards import FaceSet, write_faces

CPU = torch.device("cpu")


def face_samples(count: int, size: int = 64) -> list[dict[str, Any]]:
    faces = [draw(i, size=size) for i in range(count)]
    samples = []
    for face in faces:
        p = face.landmarks
        points = np.stack([p[36:42].mean(0), p[42:48].mean(0), p[30], p[48], p[54]])
        samples.append({"image": face.image, "mask": face.mask, "name": str(face.index), "points": points})
    return samples


@pytest.fixture(scope="module")
def samples() -> list[dict[str, Any]]:
    return face_samples(3)


def perfect(batch: dict[str, Any], classes: int = 11) -> Tensor:
    return F.one_hot(batch["labels"], classes).movedim(-1, 1).float() * 10


@pytest.mark.parametrize("warp", [0.0, 0.8])
def test_perfect_logits_of_the_crop_give_the_original_masks(samples: list[dict[str, Any]], warp: float) -> None:
    task = ParsingTask(CLASSES, warp=warp, crop=256)
    batch = task.batch(samples, CPU, rng=None)
    assert batch["images"].shape == (3, 3, 256, 256) and batch["labels"].shape == (3, 256, 256)
    predictions = task.predict(perfect(batch), batch)
    for sample, prediction in zip(samples, predictions, strict=True):
        assert prediction.dtype == np.uint8 and prediction.shape == sample["mask"].shape
    metric = task.metric()
    metric.update(perfect(batch), batch)
    figures = metric.compute()
    if warp:  # a plain crop does not hold the hair at the sides
        assert figures["mean_f1"] > 0.99 and figures["pixel_accuracy"] > 0.995
    assert figures["f1/left_eye"] > 0.99 and figures["f1/nose"] > 0.99 and figures["f1/upper_lip"] > 0.98


def test_figures_are_of_predictions_on_the_original(samples: list[dict[str, Any]]) -> None:
    torch.manual_seed(0)
    task = ParsingTask(CLASSES, warp=0.8, crop=32)
    batch = task.batch(samples, CPU, rng=None)
    outputs = torch.randn(3, 11, 8, 8)
    metric = task.metric()
    metric.update(outputs, batch)
    counts = np.zeros((11, 11), int)
    for sample, prediction in zip(samples, task.predict(outputs, batch), strict=True):
        np.add.at(counts, (sample["mask"], prediction), 1)
    assert np.array_equal(metric.matrix.counts.numpy(), counts)
    assert counts.sum() == 3 * 64 * 64


def test_images_of_several_sizes_in_a_batch(samples: list[dict[str, Any]]) -> None:
    wide = {"image": np.zeros((40, 90, 3), np.uint8), "mask": np.full((40, 90), 3, np.uint8), "name": "wide"}
    box = {**samples[1], "box": np.array([10, 12, 50, 52], np.float32)}
    del box["points"]
    task = ParsingTask(CLASSES, warp=0.0, crop=48)
    batch = task.batch([samples[0], wide, box], CPU, rng=None)
    shapes = [prediction.shape for prediction in task.predict(perfect(batch), batch)]
    assert shapes == [(64, 64), (40, 90), (64, 64)]
    # A whole image lies in the middle of its crop, with its sides kept.
    assert batch["labels"][1].sum(1).nonzero().flatten().tolist() == list(range(13, 35))
    assert (batch["labels"][1, 13:35] == 3).all()


def test_augmentation_moves_image_and_labels_together(samples: list[dict[str, Any]]) -> None:
    """Images painted by their labels: background black, face gray, hair white; they still agree but at edges."""
    shades = np.array([0, *[128] * 9, 255], np.uint8)
    painted = [{**s, "image": np.repeat(shades[s["mask"]][..., None], 3, 2)} for s in samples]
    task = ParsingTask(CLASSES, warp=0.8, crop=128)
    plain, moved = task.batch(painted, CPU, rng=None), task.batch(painted, CPU, rng=Draws((3, i) for i in range(3)))
    assert not torch.equal(plain["labels"], moved["labels"])
    assert "masks" not in moved
    for image, label in zip(moved["images"], moved["labels"], strict=True):
        gray = image[0][(label > 0) & (label < 10)].median()  # gamma has changed it
        agrees = torch.where(label == 0, image[0] < gray / 2, (image[0] > gray / 2) & (image[0] <= (1 + gray) / 2))
        agrees = torch.where(label == 10, image[0] > (1 + gray) / 2, agrees)
        assert agrees.float().mean() > 0.98


def test_augmentation_moves_the_crop_and_not_the_image(samples: list[dict[str, Any]]) -> None:
    task = ParsingTask(CLASSES, warp=0.8, crop=128)
    plain, moved = task.batch(samples, CPU, rng=None), task.batch(samples, CPU, rng=Draws((3, i) for i in range(3)))
    moves = random_similarity(
        Draws((3, i) for i in range(3)), 128, shift=0.01, rotation=0.314, scale=0.1, normal=True
    ).float()
    torch.testing.assert_close(moved["warp"].matrices, moves @ plain["warp"].matrices, atol=1e-3, rtol=1e-4)


def test_augmentation_depends_on_the_sample_alone(samples: list[dict[str, Any]]) -> None:
    task = ParsingTask(CLASSES, warp=0.8, crop=40)
    whole = task.batch(samples, CPU, rng=Draws((5, i) for i in range(3)))
    part = task.batch(samples[1:], CPU, rng=Draws((5, i) for i in (1, 2)))
    torch.testing.assert_close(whole["images"][1:], part["images"])
    assert torch.equal(whole["labels"][1:], part["labels"])


def test_the_loss_is_cross_entropy_at_the_size_of_the_crop(samples: list[dict[str, Any]]) -> None:
    task = ParsingTask(CLASSES, warp=0.8, crop=32)
    batch = task.batch(samples, CPU, rng=None)
    outputs = torch.randn(3, 11, 8, 8)
    # Bilinear resizing by 4 with half pixels, written out for one pixel: crop pixel 5 lies at 0.875 of the small map.
    loss = task.loss(outputs, batch)["loss"]
    full = F.interpolate(outputs, scale_factor=4, mode="bilinear")
    row = 0.125 * outputs[0, :, 0, :] + 0.875 * outputs[0, :, 1, :]
    torch.testing.assert_close(full[0, :, 5, 5], 0.125 * row[:, 0] + 0.875 * row[:, 1])
    probabilities = full.double().softmax(1).gather(1, batch["labels"][:, None])
    torch.testing.assert_close(loss.double(), -probabilities.log().mean())
    assert task.loss(outputs.bfloat16(), batch)["loss"].dtype == torch.float32


def test_rare_classes_weigh_more_in_the_small_protocol(samples: list[dict[str, Any]]) -> None:
    # Shares 4/6 and 2/6 of the labelled pixels: weights in the ratio 1 to sqrt(2), which add up to 6 over the pixels.
    unit = 6 / (4 + 2 * math.sqrt(2))
    weights = balanced_weights(torch.tensor([4.0, 0.0, 2.0, 0.0]))
    torch.testing.assert_close(weights, torch.tensor([unit, 0.0, unit * math.sqrt(2), 0.0]))
    assert balanced_weights(torch.zeros(4)).tolist() == [0.0] * 4

    outputs = torch.randn(len(samples), 11, 32, 32, generator=torch.Generator().manual_seed(0))
    for small in (False, True):
        task = ParsingTask(CLASSES, warp=0.0, crop=32, small=small)
        batch = task.batch(samples, CPU, rng=None)
        each = F.cross_entropy(outputs, batch["labels"], reduction="none")
        pixels = batch["labels"].flatten().bincount(minlength=11).float()
        weights = balanced_weights(pixels)[batch["labels"]] if small else torch.ones_like(each)
        torch.testing.assert_close(task.loss(outputs, batch)["loss"], (weights * each).mean())


def test_pixels_without_a_label_count_nowhere(samples: list[dict[str, Any]]) -> None:
    half = samples[0]["mask"].copy()
    half[:, 32:] = 255
    task = ParsingTask(CLASSES, warp=0.8, crop=32)
    batch = task.batch([{**samples[0], "mask": half}], CPU, rng=None)
    outputs = torch.randn(1, 11, 32, 32, requires_grad=True)
    task.loss(outputs, batch)["loss"].backward()
    assert outputs.grad is not None
    assert ((outputs.grad == 0).all(1) == (batch["labels"] == 255)).all()
    metric = task.metric()
    metric.update(outputs.detach(), batch)
    assert metric.matrix.counts.sum() == 64 * 32
    nothing = task.batch([{**samples[0], "mask": np.full((64, 64), 255, np.uint8)}], CPU, rng=None)
    assert math.isfinite(task.loss(outputs, {**nothing, "labels": torch.full((1, 32, 32), 255)})["loss"].item())


def test_labels_beyond_the_classes_are_refused(samples: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="0: the mask holds 10, but the 4 classes"):
        ParsingTask(CLASSES[:4], warp=0.0, crop=32).batch(samples[:1], CPU, rng=None)
    bad = {**samples[0], "points": np.zeros((5, 2))}
    with pytest.raises(ValueError, match="0: the 5 points of a face lie at one place"):
        ParsingTask(CLASSES, warp=0.0, crop=32).batch([bad], CPU, rng=None)


def test_an_image_without_labels_can_be_predicted(samples: list[dict[str, Any]]) -> None:
    task = ParsingTask(CLASSES, warp=0.8, crop=32)
    bare = {key: value for key, value in samples[0].items() if key != "mask"}
    batch = task.batch([bare], CPU, rng=None)
    assert "labels" not in batch
    (prediction,) = task.predict(torch.zeros(1, 11, 8, 8), batch)
    assert prediction.shape == (64, 64) and not prediction.any()


def test_the_parser_is_differentiable_down_to_pixels(samples: list[dict[str, Any]]) -> None:
    task = ParsingTask(CLASSES, warp=0.8, crop=32, small=True)
    batch = task.batch(samples[:1], CPU, rng=None)
    backbone = load_backbone("scratch:farl-micro", resolution=32)
    network = Network(backbone, task.make_head(backbone)).eval()
    images = batch["images"].requires_grad_()
    original_logits(network(images), batch, 0)[6, 30:34, 30:34].sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0


def test_protocols(tmp_path: Path) -> None:
    write_faces(tmp_path, FaceSet(train=2, val=1, size=48), workers=0)
    drawn = make_task(open_set(str(tmp_path / "train-*.tar"), split="train"))
    assert (drawn.crop, drawn.warp, drawn.protocol.resolution) == (48, 0.8, 48)

    class Told:
        def __init__(self, **about: Any) -> None:
            self._about = {"path": "here", "classes": ["background", "face"], **about}

        def about(self) -> dict[str, Any]:
            return self._about

    lapa = make_task(Told(layout="lapa", crop_from="points"))  # type: ignore[arg-type]
    assert (lapa.warp, lapa.crop, lapa.antialias) == (0.8, 512, False)
    protocol = lapa.protocol
    assert (protocol.epochs, protocol.batch, protocol.resolution, protocol.crop) == (300, 40, 448, 512)
    assert (protocol.lr_backbone, protocol.lr_head, protocol.ema, protocol.milestones) == (1e-4, 1e-3, 0.999, (200,))
    celeba = make_task(Told(layout="celebamask-hq", crop_from="whole"))  # type: ignore[arg-type]
    assert (celeba.warp, celeba.crop) == (0.0, 512)
    folder = make_task(Told(layout="folder", crop_from="whole"), crop=64, warp=0.3)  # type: ignore[arg-type]
    assert (folder.warp, folder.crop, folder.protocol.crop, folder.antialias) == (0.3, 64, 64, True)
    assert restore_task(folder.about()) == folder
    with pytest.raises(ValueError, match=r"--warp is 1.5"):
        make_task(Told(layout="folder", crop_from="whole"), warp=1.5)  # type: ignore[arg-type]


def test_a_few_steps_learn_to_tell_face_from_background() -> None:
    """On eight faces, from nothing: the loss falls and skin and hair are found."""
    torch.manual_seed(0)
    samples = face_samples(8, size=48)
    task = ParsingTask(CLASSES, warp=0.8, crop=48, small=True)
    backbone = load_backbone("scratch:farl-micro", resolution=48)
    network = Network(backbone, task.make_head(backbone)).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    losses = []
    for step in range(40):
        batch = task.batch(samples, CPU, rng=Draws((step, i) for i in range(8)))
        loss = task.loss(network(batch["images"]), batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]
    metric = task.metric()
    batch = task.batch(samples, CPU, rng=None)
    with torch.no_grad():
        metric.update(network.eval()(batch["images"]), batch)
    assert metric.compute()["f1/skin"] > 0.6
