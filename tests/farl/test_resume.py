"""Which command may go on from which checkpoint."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from farl.config import TrainConfig
from farl.initialize import build_optimizer
from farl.model import MODELS, FaRL
from farl.resume import check_resumable, snapshot

CONFIG = TrainConfig(run_dir="run", data="data", model="farl-micro", steps=20, warmup=2, global_batch=24)


class Index:
    """Stands for a `ShardIndex`."""

    def __init__(self, fingerprint: str = "0123456789abcdef") -> None:
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return 150


def saved(config: TrainConfig = CONFIG, step: int = 7) -> dict[str, Any]:
    return {"step": step, "train_config": asdict(config), "data": {"fingerprint": "0123456789abcdef", "samples": 150}}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": 3e-4, "threads": 0, "run_dir": "elsewhere", "data": "copy", "micro_batch": 3, "mask_ratio": 0.2},
        {"steps": 7},
        {"mim_weight": 0.5, "contrastive_weight": 2.0},
    ],
)
def test_settings_that_may_change(options: dict[str, Any]) -> None:
    check_resumable(saved(), replace(CONFIG, **options), Index())


def test_checkpoints_from_before_the_contrastive_weight_had_the_loss() -> None:
    old = saved()
    del old["train_config"]["contrastive_weight"]
    check_resumable(old, CONFIG, Index())
    with pytest.raises(ValueError, match="contrastive loss was on, is off"):
        check_resumable(old, replace(CONFIG, contrastive_weight=0.0), Index())


def test_a_file_of_visual_tokens_may_move() -> None:
    before = replace(CONFIG, visual_tokens="dalle:/old/encoder.safetensors")
    check_resumable(saved(before), replace(CONFIG, visual_tokens="dalle:/new/encoder.safetensors"), Index())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"global_batch": 12}, "global batch was 24, is 12"),
        ({}, "data fingerprint was 0123456789ab, is fedcba987654"),
    ],
)
def test_other_samples_need_allow_mismatch(options: dict[str, Any], message: str) -> None:
    config, index = replace(CONFIG, **options), Index() if options else Index("fedcba9876543210")
    with pytest.raises(ValueError, match=message) as caught:
        check_resumable(saved(), config, index)
    assert str(caught.value).endswith("Use another --run-dir, or the old settings, or --allow-mismatch")
    check_resumable(saved(), replace(config, allow_mismatch=True), index)


def test_another_mix_of_the_same_sources_is_refused() -> None:
    mixed = replace(CONFIG, data="3=a/*.tar 1=b/*.tar")
    check_resumable(saved(mixed), replace(CONFIG, data="0.75=a/*.tar 0.25=b/*.tar"), Index())
    with pytest.raises(ValueError, match=r"mix of sources was 3:1, is 1:3\. Use another --run-dir") as caught:
        check_resumable(saved(mixed), replace(CONFIG, data="1=a/*.tar 3=b/*.tar"), Index())
    assert str(caught.value).endswith("or --allow-mismatch") and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="mix of sources was none, is 3:1"):
        check_resumable(saved(), mixed, Index())
    check_resumable(saved(), replace(mixed, allow_mismatch=True), Index())


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "farl-tiny"}, "model was farl-micro, is farl-tiny"),
        ({"mim_weight": 0.0}, r"visual tokens was codebook, is none \(--mim-weight 0\)"),
        ({"contrastive_weight": 0.0}, r"contrastive loss was on, is off \(--contrastive-weight 0\)"),
        ({"visual_tokens": "dalle:x.safetensors"}, "visual tokens was codebook, is dalle"),
    ],
)
def test_other_weights_are_always_refused(options: dict[str, Any], message: str, allow: bool) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        check_resumable(saved(), replace(CONFIG, allow_mismatch=allow, **options), Index())
    assert str(caught.value).endswith("Use another --run-dir, or the old settings")


def test_a_checkpoint_past_the_end_is_refused() -> None:
    with pytest.raises(ValueError, match=r"after step 7, past --steps 6: raise it, or use another --run-dir"):
        check_resumable(saved(), replace(CONFIG, steps=6), Index())


def test_a_snapshot_is_what_a_resume_reads(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = FaRL(MODELS["farl-micro"])
    optimizer = build_optimizer(CONFIG, model, None)
    model(torch.zeros(1, 3, 32, 32), _caption()).image_features.sum().backward()
    optimizer.step()
    state = snapshot(7, CONFIG, model, optimizer, None, Index())  # type: ignore[arg-type]
    torch.save(state, tmp_path / "state.pt")
    read = torch.load(tmp_path / "state.pt", weights_only=True)
    assert (read["step"], read["samples"], read["data"]["samples"]) == (7, 168, 150)
    check_resumable(read, CONFIG, Index())
    moments = build_optimizer(CONFIG, model, read).state_dict()["state"]
    assert moments.keys() == optimizer.state_dict()["state"].keys() and moments
    assert all(torch.equal(moments[k]["exp_avg"], v["exp_avg"]) for k, v in optimizer.state_dict()["state"].items())


def test_tables_and_single_vectors_do_not_decay() -> None:
    model = FaRL(MODELS["farl-micro"])
    optimizer = build_optimizer(CONFIG, model, None)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, kept = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert {"visual.proj", "visual.conv1.weight", "visual.lm_head.weight", "token_embedding.weight"} <= decayed
    assert {"positional_embedding", "visual.positional_embedding", "visual.class_embedding"} <= kept
    assert {"visual.mask_token", "logit_scale", "ln_final.weight", "visual.lm_head.bias"} <= kept
    assert decayed | kept == set(names.values())


def _caption() -> Any:
    from farl.tokenizer import pack

    return pack(["a face"])
