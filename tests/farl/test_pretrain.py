"""Whole runs in this process, where a setting changes what a run is made of."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from farl.config import TrainConfig
from farl.faces import draw
from farl.pretrain import pretrain
from farl_engine.data import write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")

    def sample(number: int) -> dict[str, object]:
        face, jpeg = draw(number, size=40), io.BytesIO()
        Image.fromarray(face.image).save(jpeg, "JPEG")
        return {"key": f"{number:04d}", "image": jpeg.getvalue(), "caption": face.caption}

    write_shards((sample(number) for number in range(24)), folder / "faces-%06d.tar", samples_per_shard=100)
    return str(folder / "faces-*.tar")


def micro(shards: str, run_dir: Path) -> TrainConfig:
    """Four updates of farl-micro, each in two micro-batches."""
    return TrainConfig(
        run_dir=str(run_dir),
        data=shards,
        eval_data=shards,
        model="farl-micro",
        steps=4,
        warmup=1,
        global_batch=8,
        micro_batch=4,
        log_every=1,
        eval_every=2,
        device="cpu",
        threads=0,
    )


def test_the_masked_branch_alone_is_logged_evaluated_and_resumed_as_such(
    shards: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = replace(micro(shards, tmp_path), contrastive_weight=0.0)
    pretrain(replace(config, stop_at=2))
    pretrain(config)
    shown = capfd.readouterr().out
    assert shown.count("no retrieval on --eval-data: --contrastive-weight 0 trains no text tower") == 2
    assert "going on after step 2" in shown
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["loss"] == line["loss_mim"] > 0 and line["loss_contrastive"] == 0 for line in lines)
    assert not any({"logit_scale", "accuracy_image_to_text", "eval"} & line.keys() for line in lines)
    assert (tmp_path / "report" / "index.html").is_file()
    with pytest.raises(ValueError, match="contrastive loss was off"):
        pretrain(micro(shards, tmp_path))
