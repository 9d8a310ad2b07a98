"""The command end to end, on images whose one attribute is their brightness."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from farl.evaluate import main
from farl.evaluation.table import percent, report_table
from farl.model import MODELS, FaRL
from farl_engine.checkpoint import CheckpointStore
from farl_engine.data import ShardWriter

PEOPLE = 30


def is_bright(i: int) -> bool:
    return i % 3 == 0


def write_shards(folder: Path, name: str, numbers: range) -> str:
    with ShardWriter(folder / f"{name}-%02d.tar", samples_per_shard=25) as writer:
        for i in numbers:
            rng = np.random.default_rng(i)
            pixels = rng.integers(170 if is_bright(i) else 0, 256 if is_bright(i) else 90, (32, 32, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            caption = f"a {'bright' if is_bright(i) else 'dark'} face of person {i % PEOPLE}"
            writer.write(f"images/{i:04d}", {"png": buffer.getvalue(), "txt": caption})
    return str(folder / f"{name}-*.tar")


def write_attributes(folder: Path, numbers: range, *, people: bool = True) -> Path:
    path = folder / "attributes.csv"
    rows = ["image,person,Bright,Bald,note" if people else "image,Bright,Bald,note"]
    for i in numbers:
        person = f"{i % PEOPLE}," if people else ""
        rows.append(f"images/{i:04d}.png,{person}{int(is_bright(i))},0,n{i}")
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder, of which the later checkpoint counts."""
    run_dir = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = FaRL(MODELS["farl-micro"])
    store = CheckpointStore(run_dir / "checkpoints")
    store.save(3, {"model": {"not": torch.ones(1)}, "config": model.config.to_dict()})
    store.save(7, {"model": model.state_dict(), "config": model.config.to_dict(), "step": 7})
    return run_dir


def read(path: Path) -> dict[str, Any]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_report_says_all_and_the_probe_learns(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write_shards(tmp_path, "faces", range(120))
    attributes = write_attributes(tmp_path, range(5, 120))
    out = tmp_path / "report.json"
    assert main([str(checkpoint), "--data", shards, "--json", str(out), "--attributes", str(attributes)]) == 0
    report = read(out)
    assert report["checkpoint"]["step"] == 7
    assert report["checkpoint"]["model"]["embed_dim"] == 16
    data = report["data"]
    assert (data["number_of_shards"], data["samples"], data["evaluated"], data["bad"]) == (5, 120, 120, {})
    assert len(data["fingerprint"]) == 32
    assert set(report["versions"]) == {"farl", "torch", "numpy", "python", "device"}

    retrieval = report["retrieval"]
    assert (retrieval["pairs"], retrieval["distinct_captions"], retrieval["largest_caption_group"]) == (120, 30, 4)
    assert retrieval["chance_r1"] == pytest.approx(4 / 120)
    for way in ("image_to_text", "text_to_image"):
        recalls = [retrieval[f"{way}_r{k}"] for k in (1, 5, 10)]
        assert recalls == sorted(recalls) and recalls[0] >= 0 and recalls[-1] <= 1
        assert retrieval["distinct"][f"{way}_median_rank"] >= 1

    assert report["attributes"]["samples_with_labels"] == 115
    assert report["attributes"]["ignored_columns"] == ["note"]
    assert report["zero_shot"]["skipped"] == ["Bald"]
    bright = report["zero_shot"]["attributes"]["Bright"]
    assert bright["prompts"]["for"] == ["a person with bright"] and bright["positives"] == 38
    probe = report["linear_probe"]
    assert probe["groups"] == "person" and probe["groups_on_both_sides"] == 0
    assert probe["train_images"] + probe["test_images"] == 115 and probe["test_images"] > 20
    assert probe["attributes"]["Bright"]["balanced_accuracy"] > 0.95
    assert probe["attributes"]["Bald"]["average_precision"] is None
    assert set(probe["mean"]) >= {"accuracy", "majority_accuracy", "balanced_accuracy", "average_precision"}

    printed = capsys.readouterr().out
    assert printed.strip() == report_table(report).strip()
    assert "120 pairs, 30 different captions" in printed and "Bright" in printed


def test_probe_on_other_shards_counts_people_on_both_sides(checkpoint: Path, tmp_path: Path) -> None:
    """Everybody is in the training shards; the eight test images, every fifth, show six people."""
    test, train = write_shards(tmp_path, "test", range(60, 100)), write_shards(tmp_path, "train", range(60))
    out = tmp_path / "report.json"
    attributes = str(write_attributes(tmp_path, range(100)))
    words = ["--data", test, "--attributes", attributes, "--probe-train", train, "--json", str(out), "--max-pairs", "8"]
    assert main([str(checkpoint), *words]) == 0
    report = read(out)
    probe = report["linear_probe"]
    assert (probe["train_images"], probe["test_images"], probe["groups_on_both_sides"]) == (60, 8, 6)
    assert probe["train_data"]["samples"] == 60
    assert report["data"]["evaluated"] == 8


def test_without_a_person_column_keys_are_split(checkpoint: Path, tmp_path: Path) -> None:
    shards = write_shards(tmp_path, "faces", range(40))
    out = tmp_path / "report.json"
    attributes = str(write_attributes(tmp_path, range(40), people=False))
    main([str(checkpoint), "--data", shards, "--attributes", attributes, "--json", str(out)])
    assert read(out)["linear_probe"]["groups"] == "key"


def test_retrieval_alone(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = write_shards(tmp_path, "faces", range(10))
    weights = checkpoint / "checkpoints" / "step-00000007.pt"
    assert main([str(weights), "--data", shards]) == 0
    printed = capsys.readouterr().out
    assert "image to text" in printed and "linear probe" not in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--json", "/nowhere/at/all/x.json"], "is not there; make it first"),
        (["--attributes", "{folder}/other.csv"], "no sample matches the attribute table"),
    ],
)
def test_mistakes_are_said_in_one_line(checkpoint: Path, tmp_path: Path, words: list[str], message: str) -> None:
    shards = write_shards(tmp_path, "faces", range(4))
    (tmp_path / "other.csv").write_text("image,Hat\nsomebody.jpg,1\n")
    with pytest.raises(ValueError, match=message) as caught:
        main([str(checkpoint), "--data", shards, *(word.format(folder=tmp_path) for word in words)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--probe-train", "x"], "--probe-train needs --attributes"),
        (["--probe-test-share", "1"], "--probe-test-share is 1.0"),
        (["--device", "tpu"], "--device is 'tpu'"),
    ],
)
def test_wrong_options_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["checkpoint", "--data", "shards", *words])
    assert leaving.value.code == 2
    assert message in capsys.readouterr().err


def test_percent() -> None:
    assert [percent(value) for value in (None, 0.0, 0.00123, 0.5, 1.0)] == ["–", "0.0 %", "0.12 %", "50.0 %", "100.0 %"]


def test_untrained_weights_are_others_of_the_same_sizes(checkpoint: Path, tmp_path: Path) -> None:
    shards = write_shards(tmp_path, "faces", range(20))
    reports = []
    for name, words in (
        ("own", []),
        ("drawn", ["--untrained"]),
        ("again", ["--untrained"]),
        ("other", ["--untrained", "--seed", "1"]),
    ):
        assert main([str(checkpoint), "--data", shards, "--json", str(tmp_path / name), *words]) == 0
        reports.append(read(tmp_path / name))
    assert [report["checkpoint"]["untrained"] for report in reports] == [False, True, True, True]
    assert len({report["checkpoint"]["parameters"] for report in reports}) == 1
    ranks = [report["retrieval"]["distinct"] for report in reports]
    assert ranks[1] == ranks[2]
    assert ranks[0] == ranks[1]  # the checkpoint of this test was itself drawn from seed 0
    assert ranks[3] != ranks[1]
