"""The command `farl.predict` and the Python interface, with random weights."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from farl import finetune, predict
from farl.downstream.alignment import AlignmentTask
from farl.downstream.alignment_data import read_pts
from farl.downstream.attributes import AttributesTask
from farl.downstream.backbone import load_backbone
from farl.downstream.given_faces import FaceList, landmarks_box, make_face
from farl.downstream.image_files import read_mask
from farl.downstream.network import Network, describe_network, save_network
from farl.downstream.onnx_export import OUTPUTS, CropReader, export_onnx, trace
from farl.downstream.parsing import ParsingTask
from farl.downstream.prediction_files import output_names
from farl.downstream.predictor import Predictor
from farl.downstream.warp import STANDARD_POINTS
from farl.faces.face import draw
from farl.faces.shards import FaceSet, write_faces
from farl_engine import stop

CROP = 32
TASKS: dict[str, Any] = {
    "parsing": ParsingTask(("background", "skin", "hair"), 0.0, CROP, small=True),
    "alignment": AlignmentTask(7, "faces", CROP),
    "attributes": AttributesTask(("hat", "smile"), "full", CROP),
}
Made = Callable[..., Path]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network(name: str, **changes: Any) -> tuple[Any, Network]:
    """Random weights, of which the last are large enough for outputs to depend on the image."""
    torch.manual_seed(0)
    task = dataclasses.replace(TASKS[name], **changes)
    backbone = load_backbone("scratch:farl-micro", resolution=CROP)
    made = Network(backbone, task.make_head(backbone))
    with torch.no_grad():
        for parameter_name, parameter in made.head.named_parameters():
            if parameter_name.endswith("classifier.weight"):
                parameter.mul_(20)
    return task, made.eval()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Made:
    def make(name: str, **changes: Any) -> Path:
        folder = tmp_path / f"run-{name}"
        folder.mkdir()
        task, made = network(name, **changes)
        save_network(folder / "last.pt", describe_network(task, made), made.state_dict())
        return folder

    return make


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def save(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def turned(path: Path, pixels: np.ndarray) -> Path:
    """A file that looks like `pixels` when it is turned by a quarter, as its EXIF asks for."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return save(path, np.ascontiguousarray(np.rot90(pixels)), exif=exif)


def test_masks_of_the_images_own_size_beside_broken_files(checkpoint: Made, tmp_path: Path, capsys: Any) -> None:
    photos, out, run = tmp_path / "photos", tmp_path / "out", checkpoint("parsing")
    save(photos / "a.png", photo(41, 60))
    turned(photos / "b.png", photo(30, 50, 1))
    (photos / "c.jpg").write_bytes(b"no picture")
    words = ["parsing", str(run), str(photos), str(photos / "gone.jpg"), "--out", str(out), "--device", "cpu"]
    assert predict.main([*words, "--batch", "3"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and errors[2] == "farl.predict parsing: 2 of 4 images could not be used"
    assert f"{photos}/c.jpg cannot be decoded" in errors[0] and f"no such file or directory: {photos}/gone" in errors[1]

    predictor = Predictor.load(run / "last.pt", device="cpu")
    expected = predictor([photos / "a.png", photo(30, 50, 1)])
    assert predictor.names == ("background", "skin", "hair") and len(np.unique(expected[0])) > 1
    for name, mask, size in (("a", expected[0], (41, 60)), ("b", expected[1], (30, 50))):
        found = read_mask(out / "masks" / f"{name}.png")
        assert found.shape == size and np.array_equal(found, mask)
        with Image.open(out / "masks" / f"{name}.png") as picture, Image.open(out / "drawn" / f"{name}.jpg") as drawn:
            assert picture.mode == "P" and drawn.size == picture.size
    summary = json.loads((out / "predictions.json").read_text())
    assert list(summary["images"]) == [str(photos / "a.png"), str(photos / "b.png")]
    assert list(summary["failed"]) == [str(photos / "c.jpg"), str(photos / "gone.jpg")]
    assert summary["classes"] == list(predictor.names) and summary["faces_from"] == "whole images"
    assert summary["images"][str(photos / "a.png")] == [{"mask": "masks/a.png"}]


def test_points_of_a_box_lie_where_the_box_lies(checkpoint: Made, tmp_path: Path) -> None:
    run = checkpoint("alignment")
    predictor = Predictor.load(run, device="cpu", batch=2)
    face = photo(CROP, CROP)
    canvas = photo(70, 90, 1)
    canvas[20 : 20 + CROP, 37 : 37 + CROP] = face
    # The crop is 1 / 0.8 of the box, so exactly the face.
    middle, half = np.array([37, 20]) + (CROP - 1) / 2, 0.4 * CROP
    box = np.concatenate([middle - half, middle + half])
    alone, inside, whole = predictor([face, canvas, canvas], [None, box, None])
    assert np.abs(inside - alone - [37, 20]).max() < 1e-3
    assert np.abs(whole - inside).max() > 1 and alone.std(0).min() > 0.1

    # Of both, points count: the box is made from them.
    five = (np.array(STANDARD_POINTS) + 1) * 30 + [20, 5]
    by_points, by_both, by_box = predictor([canvas] * 3, [None, box, landmarks_box(five)], [five, five, None])
    assert np.array_equal(by_points, by_both) and np.abs(by_points - by_box).max() < 1e-4
    assert np.abs(by_points - inside).max() > 0.1

    file = tmp_path / "boxes.csv"
    turned(tmp_path / "in" / "x.png", canvas)
    file.write_text("image,x0,y0,x1,y1\n" + f"x.png,{','.join(map(str, box))}\nx.png,1,2,30.5,40\n")
    words = [str(run), str(tmp_path / "in" / "*.png"), "--out", str(tmp_path / "out"), "--faces", str(file)]
    assert predict.main(["alignment", *words, "--device", "cpu"]) == 0
    assert np.abs(read_pts(tmp_path / "out" / "points" / "x-1.pts") - inside).max() < 2e-3
    summary = json.loads((tmp_path / "out" / "predictions.json").read_text())
    first, second = summary["images"][str(tmp_path / "in" / "x.png")]
    assert np.abs(np.array(first["points"]) - inside).max() < 2e-3 and second["box"] == [1, 2, 30.5, 40]
    assert np.abs(np.array(second["points"]) - predictor(canvas, [[1, 2, 30.5, 40]])[0]).max() < 2e-3
    with Image.open(tmp_path / "out" / "drawn" / "x.jpg") as drawn:
        assert drawn.size == (90, 70)


def test_probabilities(checkpoint: Made, tmp_path: Path) -> None:
    run = checkpoint("attributes")
    for folder in ("p", "q"):
        save(tmp_path / "in" / folder / "x.png", photo(CROP, CROP, ord(folder)))
    out = tmp_path / "out"
    words = ["attributes", str(run), str(tmp_path / "in" / "**" / "*.png"), "--out", str(out), "--device", "cpu"]
    assert predict.main(words) == 0
    task, made = network("attributes")
    crops = [torch.from_numpy(photo(CROP, CROP, ord(name))).movedim(-1, 0) / 255 for name in "pq"]
    with torch.no_grad():
        expected = made(torch.stack(crops)).sigmoid().numpy()
    assert np.abs(expected[0] - expected[1]).max() > 1e-3
    with (out / "probabilities.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header == ["image", "face", "hat", "smile"] and [row[0] for row in rows] == [
        str(tmp_path / "in" / name / "x.png") for name in "pq"
    ]
    assert np.abs(np.array([row[2:] for row in rows], float) - expected).max() < 1e-4
    assert (out / "drawn" / "p" / "x.jpg").is_file() and (out / "drawn" / "q" / "x.jpg").is_file()
    record = json.loads((out / "predictions.json").read_text())["images"][rows[0][0]][0]
    assert list(record["probabilities"]) == list(task.attributes)


def test_attributes_that_need_a_face(checkpoint: Made, tmp_path: Path) -> None:
    run = checkpoint("attributes", crop_from="points")
    image = save(tmp_path / "x.png", photo(40, 40))
    with pytest.raises(ValueError, match="made from five points: give --faces FILE or --detector"):
        predict.main(["attributes", str(run), str(image), "--device", "cpu"])
    predictor = Predictor.load(run, device="cpu")
    with pytest.raises(ValueError, match="image 0: the crops of this model are made from five points"):
        predictor(image)
    points = np.array([[12, 14], [26, 15], [19, 21], [14, 27], [25, 28]], float)
    by_points, by_box = predictor([image, image], [None, [5, 5, 33, 33]], [points, None])
    assert not np.allclose(by_points, by_box, atol=1e-4)


def test_faces_of_a_detector_and_of_other_predictions(
    checkpoint: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "my_detector.py").write_text(
        "def find(image):\n"
        "    assert image.dtype == 'uint8' and image.shape[2] == 3\n"
        "    if image.shape[0] == 21: return [{'box': [3, 3, 3, 9]}]\n"
        "    return [{'box': [2, 3, 20, 22]}, {'box': [20, 8, 44, 36]}][: image.shape[0] // 20]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name, height in (("a", 40), ("b", 21), ("none", 10)):
        save(tmp_path / "in" / f"{name}.png", photo(height, 50))
    run, out = checkpoint("parsing"), tmp_path / "out"
    words = ["parsing", str(run), str(tmp_path / "in"), "--out", str(out), "--device", "cpu"]
    assert predict.main([*words, "--detector", "my_detector:find", "--batch", "1"]) == 1
    assert "b.png: a box has no area" in capsys.readouterr().err
    predictor = Predictor.load(run, device="cpu")
    expected = predictor([photo(40, 50)] * 2, [[2, 3, 20, 22], [20, 8, 44, 36]])
    for number, mask in enumerate(expected, 1):
        assert np.array_equal(read_mask(out / "masks" / f"a-{number}.png"), mask)
    assert not np.array_equal(expected[0], expected[1])
    assert not list((out / "masks").glob("none*")) and (out / "drawn" / "none.jpg").is_file()

    first = (out / "masks" / "a-2.png").read_bytes()
    (out / "masks" / "a-2.png").unlink()
    assert predict.main([*words[:3], *words[3:], "--faces", str(out / "predictions.json")]) == 0
    assert (out / "masks" / "a-2.png").read_bytes() == first
    assert "names 2 of 3 images; the others are taken whole" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--detector my_detector:lost: .* wanted MODULE:FUNCTION"):
        predict.main([*words, "--detector", "my_detector:lost"])


@pytest.mark.parametrize("given", ["whole", "boxes", "points"])
@pytest.mark.parametrize("warp", [0.0, 0.8])
def test_logits_agree_with_the_masks_and_have_the_right_gradient(given: str, warp: float) -> None:
    task, made = network("parsing", warp=warp)
    predictor = Predictor(task, made.requires_grad_(False), device="cpu")
    pixels = [photo(44, 52, seed) for seed in range(2)]
    faces: dict[str, Any] = {
        "whole": {},
        "boxes": {"boxes": torch.tensor([[20.0, 18, 38, 34], [4, 4, 30, 40]])},
        "points": {"points": torch.tensor([[[20.0, 16], [34, 17], [27, 24], [22, 30], [33, 31]]] * 2)},
    }[given]
    images = torch.from_numpy(np.stack(pixels)).movedim(-1, 1).float() / 255
    images.requires_grad_()
    logits = predictor.logits(images, **faces)
    assert logits.shape == (2, 3, 44, 52) and logits.dtype == torch.float32
    expected = predictor(pixels, **{name: value.numpy() for name, value in faces.items()})
    assert np.array_equal(logits.argmax(1).numpy(), np.stack(expected))

    generator = torch.Generator().manual_seed(1)
    (logits * torch.randn(logits.shape, generator=generator)).sum().backward()
    assert images.grad is not None
    # Along the gradient the sum of squares is what central differences of the loss must give.
    direction = images.grad / images.grad.norm()
    with torch.no_grad():
        weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
        high, low = (
            (predictor.logits(images + step * direction, **faces) * weight).double().sum() for step in (0.02, -0.02)
        )
    assert ((high - low) / 0.04).item() == pytest.approx(images.grad.norm().item(), rel=0.02)
    if given == "boxes" and not warp:
        # The second image has nothing to do with the first one's logits, nor have pixels far from its box.
        images.grad = None
        predictor.logits(images, **faces)[0].sum().backward()
        first, second = torch.as_tensor(images.grad)
        assert second.abs().max() == 0 and first[:, :, :5].abs().max() == 0 and first.abs().max() > 0


def test_wrong_calls(checkpoint: Made) -> None:
    predictor = Predictor.load(checkpoint("parsing"), device="cpu")
    image = photo(20, 20)
    with pytest.raises(ValueError, match="1 boxes for 2 images; give one, or None, for each"):
        predictor([image, image], [[1, 2, 3, 4]])
    with pytest.raises(ValueError, match=r"an image must be uint8 \[H, W, 3\], not float64 \[20, 20, 3\]"):
        predictor(np.zeros((20, 20, 3)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="boxes or points, not both"):
        predictor.logits(torch.rand(1, 3, 8, 8), boxes=torch.rand(1, 4), points=torch.rand(1, 5, 2))
    with pytest.raises(ValueError, match=r"images must be float \[B, 3, H, W\]"):
        predictor.logits(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    aligner = Predictor(*network("alignment"), device="cpu")
    with pytest.raises(ValueError, match="for parsing; this is a network for alignment"):
        aligner.logits(torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("f.csv", "a.jpg,1,2,3\n", "line 1: 3 numbers after the image; wanted 4"),
        ("f.csv", "image,a,b,c,d\na.jpg,1,2,3,x\n", "line 2: could not convert"),
        ("f.csv", "a.jpg,5,2,3,4\n", "line 1: a box has no area"),
        ("f.csv", "a.jpg,1,2,nan,4\n", "not a finite number"),
        ("f.csv", "a.jpg" + ",3" * 10 + "\n", "lie at one place"),
        ("f.json", "{", "is not JSON"),
        ("f.json", "[]", "holds no faces: wanted"),
        ("f.json", '{"a.jpg": [{}]}', "f.json, a.jpg: a face needs a box or points"),
        ("f.json", '{"a.jpg": [[1, 2, 3, 4]]}', "a face is a mapping"),
        ("f.json", '{"a.jpg": [{"points": [[1, 2], [3, 4]]}]}', r"shape \[2, 2\]; a crop can be made from 5, 68"),
    ],
)
def test_files_of_faces_that_cannot_be_meant(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        FaceList(tmp_path / name)


def test_files_of_faces(tmp_path: Path) -> None:
    points = np.arange(10.0).reshape(5, 2) ** 1.5
    numbers = ",".join(map(str, points.ravel().tolist()))
    file = tmp_path / "faces.csv"
    file.write_text(f"\ufeffone/a.jpg,1,2,3,4,,\n../two/a.jpg,{numbers}\n\nb.jpg,1,2,3,4,{numbers}\nb.jpg,0,0,9,9\n")
    faces = FaceList(file)
    (first,), (second,), both = (faces.of(Path(path)) or [] for path in ("/x/one/a.jpg", "two/a.jpg", "deep/in/b.jpg"))
    assert first["box"].tolist() == [1, 2, 3, 4] and "points" not in first
    assert np.allclose(second["points"], points) and "box" not in second
    assert set(both[0]) == {"box", "points"} and both[1]["box"].tolist() == [0, 0, 9, 9]
    assert faces.of(Path("a.jpg")) is None and faces.of(Path("three/a.jpg")) is None
    (tmp_path / "faces.json").write_text('{"images": {"a.jpg": [], "b.jpg": [{"box": [1, 2, 3, 4], "mask": "m"}]}}')
    faces = FaceList(tmp_path / "faces.json")
    assert faces.of(Path("a.jpg")) == [] and list((faces.of(Path("b.jpg")) or [])[0]) == ["box"]


def test_the_box_of_a_face_of_which_five_points_are_known() -> None:
    # The face that FaRL's crop of 512 pixels holds, in its standard place.
    standard = (np.array(STANDARD_POINTS) + 1) * 511 / 2
    middle, half = np.array([0.0, 0.2]) * 256 + 255.5, 0.52 * 256
    assert np.allclose(landmarks_box(standard), [*(middle - half), *(middle + half)], atol=1e-6)
    # Half as large, on its side, and elsewhere: the box moves and shrinks with it but stays upright.
    turn = np.array([[0.0, -0.5], [0.5, 0.0]])
    moved, middle = standard @ turn.T + [300, 70], turn @ middle + [300, 70]
    assert np.allclose(landmarks_box(moved), [*(middle - half / 2), *(middle + half / 2)], atol=1e-6)
    # 68 landmarks of an upright face lie about there.
    points = draw(1, size=48).landmarks
    left, top, right, bottom = landmarks_box(make_face(points=points)["points"])
    inside = (points > [left, top]).all(1) & (points < [right, bottom]).all(1)
    assert inside.mean() > 0.8 and right - left < 1.2 * np.ptp(points, 0).max()


def test_which_images_and_what_their_outputs_are_called(tmp_path: Path) -> None:
    for name in ("a/x.png", "a/x.jpg", "a/b/y.png", "a/notes.txt", "z.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    root = str(tmp_path)
    images = predict.find_images([f"{root}/a", f"{root}/a/**/*", f"{root}/missing.png"])
    assert [str(path.relative_to(tmp_path)) for path in images] == ["a/x.jpg", "a/x.png", "a/b/y.png", "missing.png"]
    assert list(output_names(images).values()) == ["a/x.jpg", "a/x.png", "a/b/y", "missing"]
    assert list(output_names([tmp_path / "z.png"]).values()) == ["z"]
    with pytest.raises(ValueError, match=r"a/\*\.bmp holds no images"):
        predict.find_images([f"{root}/a/*.bmp"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--faces", "faces.csv"], "--faces faces.csv names none of the images, such as x.png"),
        (["--faces", "lost.csv"], "lost.csv"),
        (["--detector", "no_such_module:find"], "No module named 'no_such_module'"),
    ],
)
def test_errors_that_a_user_can_mend(
    checkpoint: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run = checkpoint("parsing")
    save(tmp_path / "x.png", photo(8, 8))
    (tmp_path / "faces.csv").write_text("y.png,1,2,3,4\n")
    with pytest.raises((ValueError, OSError), match=message):
        predict.main(["parsing", str(run), "x.png", "--device", "cpu", *options])
    with pytest.raises(ValueError, match=r"is a network for parsing: use farl\.predict parsing"):
        predict.main(["alignment", str(run), "x.png", "--device", "cpu"])
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt holds no network of farl\.finetune"):
        predict.main(["parsing", "other.pt", "x.png"])
    assert not (tmp_path / "predictions").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["parsing"], "farl.predict parsing: missing CHECKPOINT, IMAGES; see --help"),
        (["parsing", "a"], "farl.predict parsing: missing IMAGES; see --help"),
        (["parsing", "a", "b", "--batch", "0"], "farl.predict parsing: --batch is 0; it must be 1 or more"),
        (
            ["parsing", "a", "b", "--faces", "f", "--detector", "d"],
            "farl.predict parsing: give --faces or --detector, not both",
        ),
        (["alignmnet"], "farl.predict: unrecognized command alignmnet; did you mean alignment?"),
        (["export"], "farl.predict export: missing CHECKPOINT, OUT; see --help"),
    ],
)
def test_wrong_command_lines(words: list[str], line: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as leaving:
        predict.main(words)
    assert leaving.value.code == 2 and capsys.readouterr().err == line + "\n"


def check_trace(name: str) -> CropReader:
    task, made = network(name)
    reader = CropReader(task, made, CROP)
    program = trace(reader)
    assert not [node for node in program.graph.nodes if "farl" in str(node.target)]
    images = torch.rand(5, 3, CROP, CROP)
    with torch.no_grad():
        for count in (1, 5):
            assert torch.allclose(program.module()(images[:count]), reader(images[:count]), atol=1e-4)
    return reader


def test_the_exported_graph_takes_any_batch_and_has_plain_operators() -> None:
    check_trace("attributes")


@pytest.mark.slow
def test_the_exported_graph_reads_maps_as_the_task_does() -> None:
    images = torch.rand(2, 3, CROP, CROP)
    with torch.no_grad():
        points = check_trace("alignment")(images)
        assert check_trace("parsing")(images).shape == (2, 3, CROP, CROP)
    predictor = Predictor(*network("alignment"), device="cpu")
    samples = [{"image": (image * 255).byte().movedim(0, -1).numpy(), "name": "x"} for image in images]
    # Pixels were rounded to bytes on the way.
    assert np.abs(points.numpy() - np.stack(predictor.predict(samples)[0])).max() < 0.05


def test_onnx_without_its_packages_is_one_clear_line(
    checkpoint: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs onnx and onnxscript: install farl-engine with its \[onnx\] extra"):
        predict.main(["export", str(checkpoint("attributes")), str(tmp_path / "x.onnx")])
    assert not (tmp_path / "x.onnx").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(TASKS))
def test_onnx_gives_the_same_numbers(name: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="the [onnx] extra is not installed")
    task, made = network(name)
    session = runtime.InferenceSession(str(export_onnx(task, made, tmp_path / "x.onnx")))
    images = torch.rand(3, 3, CROP, CROP)
    (found,) = session.run([OUTPUTS[name]], {"images": images.numpy()})
    with torch.no_grad():
        assert np.abs(found - CropReader(task, made, CROP)(images).numpy()).max() < 1e-4
    about = session.get_modelmeta().custom_metadata_map
    assert about["task"] == name and json.loads(about["task_about"])["crop"] == CROP
    assert list(tmp_path.iterdir()) == [tmp_path / "x.onnx"]


def released_layout(width: int = 64, text_width: int = 64) -> dict[str, torch.Tensor]:
    """Random weights by the names of FaRL's released files: those of CLIP's ViT-B/16, and a masked branch of one block.
    Narrower, and with fewer words."""
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (77, text_width),
        "text_projection": (text_width, 32),
        "logit_scale": (),
        "token_embedding.weight": (99, text_width),
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (1 + 14 * 14, width),
        "visual.proj": (width, 32),
        "visual.conv1.weight": (width, 3, 16, 16),
        "visual.mask_token": (width,),
        "visual.lm_head.weight": (8192, width),
        "visual.lm_head.bias": (8192,),
    }
    norms = {"ln_final": text_width, **dict.fromkeys(("visual.ln_pre", "visual.ln_post", "visual.ln_lm"), width)}
    towers = {"transformer": (12, text_width), "visual.transformer": (12, width), "visual.lm_transformer": (1, width)}
    for tower, (layers, size) in towers.items():
        for block in (f"{tower}.resblocks.{index}." for index in range(layers)):
            norms |= {f"{block}ln_1": size, f"{block}ln_2": size}
            linear = {"attn.in_proj_": (3 * size, size), "attn.out_proj.": (size, size)}
            linear |= {"mlp.c_fc.": (4 * size, size), "mlp.c_proj.": (size, 4 * size)}
            for name, shape in linear.items():
                shapes |= {f"{block}{name}weight": shape, f"{block}{name}bias": shape[:1]}
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) * width**-0.5 for name, shape in shapes.items()}
    for name, size in norms.items():
        weights[f"{name}.weight"] = 1 + 0.1 * torch.randn(size, generator=generator)
        weights[f"{name}.bias"] = 0.1 * torch.randn(size, generator=generator)
    return weights


@pytest.mark.slow
@pytest.mark.parametrize("name", list(TASKS))
def test_the_released_layout_goes_from_weights_to_predictions(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the commands alone. The backbone has a learning rate of 0, so its weights must be those of the file."""
    monkeypatch.setattr(stop, "install", lambda: None)
    weights, file, run, out = released_layout(), tmp_path / "FaRL-Base.pth", tmp_path / "run", tmp_path / "out"
    torch.save({"state_dict": weights}, file)
    write_faces(tmp_path / "faces", FaceSet(train=4, val=2, size=64), workers=0)
    photos = [save(tmp_path / "photos" / f"{index}.png", draw(index, size=80).image) for index in range(2)]
    files = f"--init {file} --train {tmp_path}/faces --test {tmp_path}/faces --run-dir {run}"
    words = "--device cpu --resolution 64 --lr-backbone 0 --steps 2 --batch 2 --threads 1 --pictures 0"
    assert finetune.main([name, *files.split(), *words.split()]) == 0

    about = json.loads((run / "result.json").read_text())["backbone"]
    assert about["blocks"] == [3, 5, 7, 11] and about["model"]["vision"]["heads"] == 1
    assert (about["model"]["activation"], about["model"]["layer_norm_cast"]) == ("quick_gelu", "before")
    trained = torch.load(run / "last.pt")["ema"]
    trunk = {key.split("trunk.tower.")[1]: value for key, value in trained.items() if "trunk.tower." in key}
    position = trunk.pop("positional_embedding")
    assert position.shape == (1 + 4 * 4, 64) and torch.equal(position[0], weights["visual.positional_embedding"][0])
    unread = ("positional_embedding", "ln_post", "proj", "mask_token", "lm_", "ln_lm")
    read = {key.removeprefix("visual.") for key in weights if key.startswith("visual.")}
    assert trunk.keys() == {key for key in read if not key.startswith(unread)}
    assert all(torch.equal(value, weights[f"visual.{key}"]) for key, value in trunk.items())

    for checkpoint in (run, run / "best.pt"):
        assert predict.main([name, str(checkpoint), *map(str, photos), "--out", str(out), "--device", "cpu"]) == 0
    images = json.loads((out / "predictions.json").read_text())["images"]
    assert list(images) == list(map(str, photos)) and len(list((out / "drawn").iterdir())) == 2
    if name == "parsing":
        assert read_mask(out / "masks" / "1.png").shape == (80, 80)
    elif name == "alignment":
        assert read_pts(out / "points" / "0.pts").shape == (68, 2)
    else:
        (record,) = images[str(photos[0])]
        assert len(record["probabilities"]) > 10 and all(0 < value < 1 for value in record["probabilities"].values())
