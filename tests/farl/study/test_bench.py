from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from farl.downstream import tuner as tuner_module
from farl.downstream.attributes import AttributesTask
from farl.downstream.backbone import Backbone, load_backbone
from farl.downstream.job import Job
from farl.study.bench import Bench, Part, make_tuner, pretrain_config
from farl.study.data import make_data
from farl.study.plans import Plan
from farl.study.study import Study
from farl_engine import distributed


class Numbers:
    """A set whose samples are their positions."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"number": range(self.count)[index]}

    def about(self) -> dict[str, int]:
        return {"samples": self.count}


def test_a_part_is_spread_over_the_set() -> None:
    part = Part(Numbers(10), 4)
    assert [part[i]["number"] for i in range(len(part))] == [0, 2, 5, 7]
    assert part.about() == {"samples": 4, "of": 10}
    assert len(Part(Numbers(3), 4)) == 3


def test_a_seed_has_one_head_whatever_the_backbone_drew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = AttributesTask(attributes=("A", "B"), head="full", crop=32)
    settings = replace(task.protocol, resolution=32)
    job = Job(task, Numbers(4), Numbers(4), "scratch:farl-micro", tmp_path, settings, steps=1, check=False)
    world = distributed.start("cpu")
    first = make_tuner(job, world)

    def greedy(init: str, **options: object) -> Backbone:
        backbone = load_backbone(init, **options)  # type: ignore[arg-type]
        torch.rand(7)
        return backbone

    monkeypatch.setattr(tuner_module, "load_backbone", greedy)
    second, other = make_tuner(job, world), make_tuner(replace(job, seed=1), world)
    for network in (second.network, second.average.network):
        torch.testing.assert_close(network.head.state_dict(), first.network.head.state_dict(), rtol=0, atol=0)
    weight = "classifier.weight"
    assert not torch.equal(other.network.head.state_dict()[weight], first.network.head.state_dict()[weight])


def test_a_plan_that_shows_an_unknown_figure_is_refused(one_task: Plan, tmp_path: Path) -> None:
    plan = replace(one_task, tasks=(replace(one_task.tasks[0], metric="mean_f1"),))
    study = Study(plan, tmp_path, "x")
    make_data(plan, study.data, None, workers=0)
    with pytest.raises(ValueError, match="shows mean_f1 for attributes, which has no such figure"):
        Bench(study)._open("attributes")


def test_arms_keep_their_own_folders(tiny: Plan, tmp_path: Path) -> None:
    config = pretrain_config(Study(tiny, tmp_path, "x"), tiny.arm("mim"))
    assert config.run_dir == str(tmp_path / "pretrain" / "mim")
    assert (config.contrastive_weight, config.mim_weight, config.keep_last) == (0.0, 1.0, 1)
