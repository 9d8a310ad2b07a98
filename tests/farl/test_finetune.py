"""The command `farl.finetune`, with a tiny made task in the place of parsing."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from farl import finetune
from farl.model import MODELS, FaRL
from farl_engine import stop

PROGRAM = Path(__file__).parent / "downstream" / "made_task.py"
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int | None]:
    """`farl.finetune parsing` with sensible options; later ones win."""
    spec = importlib.util.spec_from_file_location("made_task", PROGRAM)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    monkeypatch.setitem(sys.modules, "farl.downstream.parsing", made)
    monkeypatch.setattr(stop, "install", lambda: None)

    def run(*options: str, task: str = "parsing") -> int | None:
        usual = "--init scratch:farl-micro --train made:9 --test made:5 --device cpu --steps 4 --threads 1 --pictures 3"
        return finetune.main([task, *usual.split(), "--run-dir", str(tmp_path / "run"), *options])

    return run


def test_result_and_pictures(command: Callable[..., int | None], tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "result.json"
    options = ("--json", str(out), "--eval-every", "3", "--lr-head", "0.02", "--train-fraction", "0.5", "--warp", "0")
    with pytest.raises(ValueError, match="--warp is no option of parsing: leave it out"):
        command(*options)
    assert command(*options[:-2], "--head", "dropout", "--batch", "3", "--resolution", "48") == 0
    result = json.loads(out.read_text())
    assert result == json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["task"], result["last"]["step"], result["best"]["step"] in (3, 4)) == ("parsing", 4, True)
    assert result["best_is_chosen_on"].startswith("the test set")
    settings = {"lr_head": 0.02, "lr_backbone": 1e-3, "batch": 3, "resolution": 48, "steps": 4, "seed": 0, "crop": 32}
    assert settings.items() <= result["settings"].items()
    assert result["data"]["train"]["samples_used"] == 5 and result["data"]["train"]["fraction_seed"] == 123
    assert result["backbone"]["init"] == "scratch:farl-micro" and result["task_about"]["head"] == "dropout"
    printed = capsys.readouterr().out
    assert "5 of 9 images of made, 4 steps of 3" in printed and "last is the fair one" in printed
    with Image.open(tmp_path / "run" / "curves.png") as picture:
        assert picture.width > 500


@pytest.mark.parametrize("test", ["made:9", "made:5"])
def test_a_test_set_that_was_trained_on_is_told(
    command: Callable[..., int | None], tmp_path: Path, capsys: Any, test: str
) -> None:
    assert command("--test", test, "--steps", "1", "--pictures", "0") == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    printed = capsys.readouterr()
    warning = "9 of 9 test samples are in --train too: figures say little about new faces; give another --test"
    if test == "made:9":
        assert (result["train_is_test"], result["test_samples_in_train"]) == (True, 9)
        assert printed.err == f"farl.finetune parsing: warning: {warning}\n"
        assert printed.out.endswith("\n9 of 9 test samples are in --train too: neither is fair\n")
    else:
        assert (result["train_is_test"], result["test_samples_in_train"]) == (False, 0)
        assert not printed.err and printed.out.endswith("last is the fair one\n")


@pytest.mark.parametrize("blocks", [(), ("--blocks", "0", "1", "1", "--crop", "40")])
def test_the_released_layout_goes_through(
    command: Callable[..., int | None], tmp_path: Path, blocks: tuple[str, ...]
) -> None:
    torch.manual_seed(0)
    model = FaRL(MODELS["farl-micro"])
    torch.save({"state_dict": model.state_dict()}, tmp_path / "FaRL-Base.pth")
    assert command("--init", str(tmp_path / "FaRL-Base.pth"), *blocks, "--steps", "1", "--lr-backbone", "0") == 0
    weights = torch.load(tmp_path / "run" / "last.pt")["ema"]
    given = model.visual.state_dict()
    name = "transformer.resblocks.1.mlp.c_fc.weight"
    assert torch.equal(weights[f"backbone.trunk.tower.{name}"], given[name])
    about = json.loads((tmp_path / "run" / "result.json").read_text())["backbone"]
    assert about["blocks"] == ([0, 1, 1] if blocks else [0, 0, 1, 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--train", "other:3"), "other:3 is no made set"),
        (("--train", "made:9:2"), "1 of 9 samples of --train cannot be used: 0002.jpg is cut short"),
        (("--init", "nowhere.pt"), "nowhere.pt"),
        (("--init", "scratch:tiny"), "there is no model 'tiny'"),
        (("--resolution", "50"), "the resolution is 50: it must be a multiple of the patch size 8, such as 48"),
        (("--blocks", "4"), r"blocks \[4\] must lie in 0..1"),
        (("--run-dir", str(PROGRAM)), "is a file: name a folder"),
        (("--json", "/no/such/folder/r.json"), "the folder /no/such/folder is not there; make it first"),
        (("--head", "dropout", "--warp", "1"), "--warp is no option of parsing"),
    ],
)
def test_errors_that_a_user_can_mend(
    command: Callable[..., int | None], options: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        command(*options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--train-fraction", "2"), "--train-fraction is 2.0; it must be more than 0 and at most 1"),
        (("--steps", "0"), "--steps is 0; it must be 1 or more"),
        (("--seed", "4294967296"), "--seed is 4294967296; it must be less than 2^32"),
        (("--ema", "1"), "--ema is 1.0; it must be 0 or more and less than 1"),
        (("--layer-decay", "0"), "--layer-decay is 0.0; it must be more than 0 and at most 1"),
        (("--device", "tpu"), "--device is 'tpu'; use auto, cpu or cuda"),
        (("--train-fractoin", "2"), "unrecognized option --train-fractoin; did you mean --train-fraction?"),
    ],
)
def test_wrong_command_lines(
    command: Callable[..., int | None], options: tuple[str, ...], line: str, capsys: Any
) -> None:
    with pytest.raises(SystemExit) as leaving:
        command(*options)
    assert leaving.value.code == 2
    assert capsys.readouterr().err == f"farl.finetune parsing: {line}\n"


def test_unknown_task(command: Callable[..., int | None], capsys: Any) -> None:
    with pytest.raises(SystemExit):
        command(task="alignmnet")
    assert "unrecognized command alignmnet; did you mean alignment?" in capsys.readouterr().err


def test_sets_with_other_labels() -> None:
    with pytest.raises(ValueError, match="--train and --test have other points: 68 against 98"):
        finetune.check_same_labels({"points": 68}, {"points": 98})
    with pytest.raises(ValueError, match="other classes: the same number, other names"):
        finetune.check_same_labels({"classes": ["skin"]}, {"classes": ["hair"]})
    finetune.check_same_labels({"classes": ["skin"], "path": "a"}, {"classes": ["skin"], "path": "b"})


def test_few_options_and_every_one_is_explained(command: Callable[..., int | None], capsys: Any) -> None:
    fields = [field.name for field in dataclasses.fields(finetune.FinetuneOptions)]
    assert len(fields) < 30
    with pytest.raises(SystemExit) as leaving:
        command("--help")
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    assert all("--" + field.replace("_", "-") in text for field in fields)


@pytest.mark.slow
def test_a_signal_ends_the_run_cleanly(tmp_path: Path) -> None:
    options = "--init scratch:farl-micro --train made:40 --test made:8 --device cpu --steps 100000 --pictures 0"
    command = [sys.executable, str(PROGRAM), "parsing", *options.split(), "--run-dir", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (log.is_file() and log.stat().st_size):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "the same command goes on from there" in output
    assert list((tmp_path / "run" / "checkpoints").glob("step-*.pt"))
