"""The task: crops, mirroring, loss, heads and protocols; and the whole command on drawn faces."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from farl.downstream import tune_report
from farl.downstream.attributes import (
    HEADS,
    AttributesTask,
    PooledHead,
    ProbeHead,
    is_mirrorable,
    make_task,
    open_set,
    restore_task,
)
from farl.downstream.backbone import Features, load_backbone
from farl.downstream.draws import Draws
from farl.downstream.job import Job
from farl.downstream.network import Network, load_network
from farl.downstream.tuner import tune
from farl.faces.face import draw
from farl.faces.shards import FaceSet, write_faces
from farl.finetune import FinetuneOptions, finetune
from farl_engine.distributed import World

CPU = torch.device("cpu")
NAMES = ("Bald", "Left_Eye_Closed", "Right_Eye_Closed")
NAN = float("nan")


def image(seed: int, height: int = 30, width: int = 20) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def samples(count: int, **more: Any) -> list[dict[str, Any]]:
    labels = np.random.default_rng(9).integers(0, 2, (count, 3)).astype(np.float32)
    return [{"image": image(i), "attributes": labels[i], "name": str(i), **more} for i in range(count)]


def task(**changes: Any) -> AttributesTask:
    fields: dict[str, Any] = {"attributes": NAMES, "head": "full", "crop": 32, **changes}
    return AttributesTask(**fields)


def test_a_whole_image_lies_in_the_middle_with_its_sides_kept() -> None:
    crops = task(crop=30).batch(samples(2), CPU, rng=None)["images"]
    assert crops.shape == (2, 3, 30, 30)
    for i in range(2):
        torch.testing.assert_close(crops[i, :, :, 5:25], torch.from_numpy(image(i)).movedim(-1, 0) / 255)
    assert crops[:, :, :, :5].max() < 1e-5 and crops[:, :, :, 25:].max() < 1e-5


def test_a_crop_from_points_puts_them_at_their_places() -> None:
    face = draw(4, size=96)
    p = face.landmarks
    five = np.stack([p[36:42].mean(0), p[42:48].mean(0), p[30], p[48], p[54]]).astype(np.float32)
    aligned = task(crop=64, crop_from="points")
    matrix = aligned._matrix({"image": face.image, "points": five, "name": "face"})[0]
    eyes = np.c_[five[:2], [1, 1]] @ matrix.numpy()[:2].T
    # At 0.8 of FaRL's size the eyes are 0.8 * 0.234375 * 63 pixels apart, the middle of the crop being 31.5.
    assert np.abs(eyes[1] - eyes[0] - [0.8 * 0.234375 * 63, 0]).max() < 3
    assert abs(eyes[:, 0].mean() - 31.5) < 2
    without = {"image": face.image, "name": "face 4"}
    with pytest.raises(ValueError, match="face 4 has no five points"):
        aligned.batch([without], CPU, rng=None)
    with pytest.raises(ValueError, match="face: the 5 points of a face lie at one place"):
        aligned.batch([{"image": face.image, "points": np.zeros((5, 2)), "name": "face"}], CPU, rng=None)
    # The image is 96 pixels: this box of 32 fills half of the crop of 64, so nothing is resized.
    boxed = {**without, "box": np.array([31.5, 31.5, 63.5, 63.5])}
    whole = torch.from_numpy(face.image[16:80, 16:80]).movedim(-1, 0) / 255
    torch.testing.assert_close(task(crop=64).batch([boxed], CPU, rng=None)["images"][0], whole, atol=1e-4, rtol=0)


def test_a_photograph_is_brought_to_the_frame_of_aligned_images() -> None:
    """The five points of an aligned image that lies somewhere in a photograph: the crop is that of the aligned one."""
    small = image(3, 22, 18)
    five = np.array([[5, 8], [12, 8], [9, 12], [6, 15], [12, 15]], np.float64)
    frame = tuple((x, y) for x, y in ((five + np.array([2.5, 0.5])) / 22).tolist())
    photograph = np.zeros((60, 50, 3), np.uint8)
    photograph[20:42, 10:28] = small
    framed = task(crop=22, frame=frame)
    wanted = framed.batch([{"image": small, "name": "aligned"}], CPU, rng=None)["images"]
    given = {"image": photograph, "name": "photograph", "points": five + np.array([10, 20])}
    torch.testing.assert_close(framed.batch([given], CPU, rng=None)["images"], wanted, atol=1e-4, rtol=0)
    # Without a frame the whole image is taken, points or not.
    assert not torch.allclose(task(crop=22).batch([given], CPU, rng=None)["images"], wanted, atol=0.1)


def mirrored_rows(count: int) -> Tensor:
    """Which of `count` samples are mirrored by the draws that `batch` takes them from."""
    draws = Draws((1, i) for i in range(count))
    draws.uniform(shape=(2,)), draws.uniform(), draws.uniform()
    return draws.chance(0.5)


def test_mirroring_swaps_left_and_right_labels_and_the_image() -> None:
    given = samples(12)
    labels = torch.from_numpy(np.stack([sample["attributes"] for sample in given]))
    which = mirrored_rows(12)
    assert 0 < which.sum() < 12
    batch = task().batch(given, CPU, rng=Draws((1, i) for i in range(12)))
    assert torch.equal(batch["labels"][~which], labels[~which])
    assert torch.equal(batch["labels"][which], labels[which][:, [0, 2, 1]])
    still = task(flip=False).batch(given, CPU, rng=Draws((1, i) for i in range(12)))
    assert torch.equal(still["labels"], labels)
    torch.testing.assert_close(batch["images"][~which], still["images"][~which])
    torch.testing.assert_close(batch["images"][which], still["images"][which].flip(-1), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("Bald", "Bright_Light"), True),
        (("Left_Eye_Closed", "Right_Eye_Closed"), True),
        (("Left_Eye_Closed", "Bald"), False),
        (("lookingLeft",), False),
        (("lookingLeft", "lookingRight"), True),
        (("eye left", "eye right"), True),
    ],
)
def test_which_attributes_can_be_mirrored(names: tuple[str, ...], expected: bool) -> None:
    assert is_mirrorable(names) == expected


def test_augmentation_depends_on_the_sample_alone_and_is_modest() -> None:
    given = samples(4)
    whole = task().batch(given, CPU, rng=Draws((5, i) for i in range(4)))
    part = task().batch(given[2:], CPU, rng=Draws((5, i) for i in (2, 3)))
    torch.testing.assert_close(whole["images"][2:], part["images"])
    assert torch.equal(whole["labels"][2:], part["labels"])
    assert whole["images"].min() >= 0 and whole["images"].max() <= 1
    # Uniform gray stays what it is in the middle, but for brightness within a tenth.
    gray = [{**sample, "image": np.full((40, 40, 3), 128, np.uint8)} for sample in given]
    middle = task().batch(gray, CPU, rng=Draws((6, i) for i in range(4)))["images"][:, :, 16, 16] / (128 / 255)
    assert middle.min() > 0.899 and middle.max() < 1.101 and middle.std() > 0.01


def test_unknown_labels_count_nowhere() -> None:
    given = samples(2)
    given[0]["attributes"] = np.array([1, NAN, 0], np.float32)
    batch = task().batch(given, CPU, rng=None)
    outputs = torch.randn(2, 3, requires_grad=True)
    loss = task().loss(outputs, batch)["loss"]
    loss.backward()
    assert outputs.grad is not None and torch.equal(outputs.grad == 0, batch["labels"].isnan())
    p = outputs.detach().double().sigmoid()
    known = ~batch["labels"].isnan()
    right = torch.where(batch["labels"] == 1, p, 1 - p)[known]
    assert loss.item() == pytest.approx(-right.log().sum().item() / 6)
    metric = task().metric()
    metric.update(outputs.detach(), batch)
    assert metric.state().sum() == 5
    assert task().loss(outputs.bfloat16(), batch)["loss"].dtype == torch.float32


def test_the_mean_of_the_parts_is_the_loss_of_the_whole() -> None:
    given = samples(4)
    given[0]["attributes"] = np.full(3, NAN, np.float32)
    outputs = torch.randn(4, 3)
    losses = [task().loss(outputs[part], task().batch(given[part], CPU, rng=None))["loss"] for part in
              (slice(0, 2), slice(2, 4), slice(0, 4))]  # fmt: skip
    torch.testing.assert_close((losses[0] + losses[1]) / 2, losses[2])


def test_predictions_are_probabilities_and_need_no_labels() -> None:
    bare = [{"image": image(0), "name": "bare"}]
    batch = task().batch(bare, CPU, rng=None)
    assert set(batch) == {"images"}
    (found,) = task().predict(torch.tensor([[0.0, 2.0, -2.0]]).bfloat16(), batch)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [0.5, 0.880797, 0.119203], rtol=1e-5)


def test_the_pooled_head_is_a_weighted_sum_of_normed_vectors() -> None:
    torch.manual_seed(0)
    head = PooledHead(8, 2, 3)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    features = Features([torch.randn(5, 8, 2, 3) for _ in range(2)], [torch.randn(5, 8) for _ in range(2)])
    vectors = []
    for grid, token in zip(*features, strict=True):
        vectors += [grid.mean((2, 3)), grid.amax((2, 3)), token]
    weights = head.weights.exp() / head.weights.exp().sum()
    total = torch.zeros(5, 8)
    for weight, norm, vector in zip(weights, head.norms, vectors, strict=True):
        centered = vector - vector.mean(1, keepdim=True)
        normed = centered / (centered.square().mean(1, keepdim=True) + 1e-5).sqrt()
        total = total + weight * (normed * norm.weight + norm.bias)
    torch.testing.assert_close(head(features), total @ head.classifier.weight.T + head.classifier.bias)


@pytest.mark.parametrize("kind", HEADS)
def test_heads_answer_in_float32_under_autocast(kind: str) -> None:
    backbone = load_backbone("scratch:farl-micro", resolution=32)
    network = Network(backbone, task(head=kind).make_head(backbone)).eval()
    assert isinstance(network.head, ProbeHead) == (kind == "probe")
    with torch.autocast("cpu", torch.bfloat16):
        outputs = network(torch.rand(4, 3, 32, 32))
    assert outputs.shape == (4, 3) and outputs.dtype == torch.float32


def test_the_probe_reads_the_last_class_token_alone() -> None:
    head = ProbeHead(8, 3).eval()
    maps, tokens = [torch.randn(4, 8, 2, 2) for _ in range(2)], [torch.randn(4, 8) for _ in range(2)]
    plain = head(Features(maps, tokens))
    assert torch.equal(plain, head(Features([torch.zeros(4, 8, 2, 2)] * 2, [tokens[1], tokens[1]])))
    # Linear: what holds between two inputs holds for their mean.
    means = [(token[:2] + token[2:]) / 2 for token in tokens]
    torch.testing.assert_close(head(Features(maps, means)), (plain[:2] + plain[2:]) / 2)


class Told:
    def __init__(self, **about: Any) -> None:
        defaults = {"path": "here", "attributes": list(NAMES), "crop_from": "whole"}
        self._about = defaults | about

    def about(self) -> dict[str, Any]:
        return self._about


def make(told: Told, **options: Any) -> AttributesTask:
    return make_task(told, **options)  # type: ignore[arg-type]


def test_protocols() -> None:
    celeba = make(Told(layout="celeba", frame=[[0.1, 0.2]] * 5))
    assert restore_task(json.loads(json.dumps(celeba.about()))) == celeba
    assert (celeba.crop, celeba.head, celeba.crop_from, celeba.flip) == (224, "full", "whole", True)
    protocol = celeba.protocol
    assert (protocol.crop, protocol.resolution, protocol.epochs, protocol.frozen) == (224, 224, 10, False)
    probe = make(Told(layout="celeba"), head="probe").protocol
    assert probe.frozen and probe.lr_head == 1e-3
    assert make(Told(layout="lfwa"), head="frozen").protocol.epochs == 30
    small = make(Told(layout="faces", image_size=96)).protocol
    assert (small.crop, small.resolution, small.batch) == (64, 64, 32)
    assert make(Told(layout="folder"), crop=64).protocol.batch == 32
    points = make(Told(layout="folder", crop_from="points", attributes=["Left_Handed"]), crop=448)
    assert (points.crop_from, points.flip, points.protocol.resolution) == ("points", False, 448)
    assert restore_task(json.loads(json.dumps(points.about()))) == points


def test_another_head_is_refused() -> None:
    with pytest.raises(ValueError, match="--head is 'linear'; use one of probe, frozen, full"):
        make(Told(layout="celeba"), head="linear")


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faces")
    write_faces(folder, FaceSet(train=16, val=6, size=32), workers=0)
    return folder


@pytest.mark.parametrize("head", ["probe", "full"])
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(
    faces: Path, tmp_path: Path, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune_report, "draw_tuning", lambda *_: None)

    def job(run: str, **changes: Any) -> Job:
        train, test = open_set(str(faces), split="train"), open_set(str(faces), split="test")
        made = make_task(train, head=head)
        return Job(
            task=cast(Any, made), train=train, test=test, init="scratch:farl-micro", run_dir=tmp_path / run,
            settings=replace(made.protocol, batch=4), steps=4, eval_every=4, threads=0, pictures=0,
            check=False, **changes,
        )  # fmt: skip

    here = World(rank=0, size=1, device=CPU, control=None)
    uncut = tune(job("uncut"), here)
    assert tune(job("cut", stop_at=2), here) is None
    cut = tune(job("cut"), here)
    assert uncut is not None and cut is not None
    assert cut["last"] == uncut["last"]
    states = [load_network(tmp_path / run)[1].state_dict() for run in ("uncut", "cut")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    torch.manual_seed(0)
    fresh = load_backbone("scratch:farl-micro", resolution=32).state_dict()
    same = [torch.equal(states[1][f"backbone.{name}"], value) for name, value in fresh.items()]
    assert all(same) if head == "probe" else not any(same)


def test_the_command(faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    options = FinetuneOptions(
        init="scratch:farl-micro",
        train=str(faces),
        test=str(faces),
        run_dir=str(run),
        head="frozen",
        steps=2,
        batch=4,
        pictures=4,
    )
    result = finetune("attributes", options)
    assert result is not None and result["main_metric"] == "mean_accuracy"
    assert json.loads((run / "result.json").read_text())["last"]["metrics"]["accuracy/Bald"] is not None
    assert "majority_accuracy" in capsys.readouterr().out
    for picture in ("worst.png", "attributes.png", "curves.png"):
        assert min(Image.open(run / picture).size) > 100
    assert result["pictures"]["looked_at"] == 4
    restored, network = load_network(run)
    probabilities = restored.predict(
        network(restored.batch([open_set(str(faces), split="test")[0]], CPU, rng=None)["images"]), {}
    )
    assert probabilities[0].shape == (25,)
