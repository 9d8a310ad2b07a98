from __future__ import annotations

import dataclasses

import pytest

from farl import cli
from farl.config import PRESETS, TrainConfig
from farl.train import read_config

OPTIONS = [
    "run_dir",
    "data",
    "eval_data",
    "shard_cache",
    "model",
    "init",
    "visual_tokens",
    "mim_weight",
    "contrastive_weight",
    "mask_ratio",
    "crop_scale",
    "face_boxes",
    "steps",
    "stop_at",
    "global_batch",
    "micro_batch",
    "seed",
    "lr",
    "lr_final",
    "warmup",
    "weight_decay",
    "beta2",
    "clip_grad",
    "precision",
    "engine",
    "save_memory",
    "device",
    "decoder",
    "threads",
    "max_bad_fraction",
    "timeout",
    "log_every",
    "eval_every",
    "save_every",
    "save_minutes",
    "keep_last",
    "allow_mismatch",
    "profile",
    "trackers",
]


def test_the_list_of_options_is_pinned_and_short() -> None:
    """A new option is a decision: add it here as well, and keep the list under 40."""
    assert [field.name for field in dataclasses.fields(TrainConfig)] == OPTIONS
    assert len(OPTIONS) < 40


def test_help_shows_every_option_with_a_text(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as leaving:
        read_config(["quickstart", "--help"])
    assert leaving.value.code == 0
    shown = capsys.readouterr().out
    for name in OPTIONS:
        assert "--" + name.replace("_", "-") in shown
    assert "0 runs to the end" in shown and "farl-b16" in shown


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_are_valid_and_options_override_them(name: str) -> None:
    assert read_config([name]) == PRESETS[name]()
    assert read_config([name, "--steps", "9999999", "--seed", "3"]).seed == 3


def test_quickstart_is_the_default() -> None:
    assert read_config([]) == PRESETS["quickstart"]()


def test_held_out_shards_of_a_preset_stay_with_its_data() -> None:
    assert read_config(["--seed", "1"]).eval_data == "data/quickstart/val-*.tar"
    for words in (["--data", "mine.tar"], ["--data=mine.tar"]):
        assert read_config(words).eval_data == ""
    assert read_config(["--data", "mine.tar", "--eval-data", "rest.tar"]).eval_data == "rest.tar"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--global-batch", "0"], "--global-batch is 0; it must be more than 0"),
        (["--steps", "10", "--warmup", "1", "--stop-at", "11"], "--stop-at 11 lies past --steps 10"),
        (["--steps", "10", "--warmup", "10"], "--warmup 10 leaves nothing of --steps 10"),
        (["--crop-scale", "1.5"], "--crop-scale is 1.5"),
        (["--precision", "fp8"], "--precision is 'fp8'; use auto, fp32 or bf16"),
        (["--device", "tpu"], "--device is 'tpu'"),
        (["--engine", "fast"], "--engine is 'fast'; use fused, graph, compile or eager"),
        (["--save-memory", "offload"], "--save-memory holds 'offload'; use recompute, shard, or both with a comma"),
        (["--save-memory", "shard", "--engine", "compile"], "--save-memory shard does not go with --engine compile"),
        (["--decoder", "nvjpeg"], "--decoder is 'nvjpeg'; use auto, dali or cpu"),
        (["--visual-tokens", "vqgan"], "use codebook, dalle:FILE.safetensors or cache:DIR"),
        (["--trackers", "comet"], "use tensorboard or wandb:PROJECT"),
        (["--visual-tokens", "dalle:"], "use codebook, dalle:FILE.safetensors or cache:DIR"),
        (["--visual-tokens", "cache:"], "use codebook, dalle:FILE.safetensors or cache:DIR"),
        (["--contrastive-weight", "-1"], "--contrastive-weight is -1.0; it must be 0 or more"),
        (["--mim-weight", "0", "--contrastive-weight", "0"], "both 0, so nothing is trained: raise one"),
        (["--lr", "-1"], "--lr is -1.0"),
        (["--lr", "nan"], "--lr is nan; it must be more than 0"),
        (["--beta2", "1"], "--beta2 is 1.0; it must be 0 or more and less than 1"),
    ],
)
def test_wrong_values_get_one_line_with_the_fix(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        cli.run(lambda: read_config(["quickstart", *options]), "farl.train")
    assert leaving.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_unknown_preset_names_those_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        read_config(["quickstat"])
    assert leaving.value.code == 2
    assert "no preset 'quickstat'; use one of quickstart, farl-b16" in capsys.readouterr().err
