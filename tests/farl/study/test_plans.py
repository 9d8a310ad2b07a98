from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from farl.downstream.network import task_module
from farl.downstream.task import TuneSettings
from farl.model import MODELS
from farl.study.bench import pretrain_config
from farl.study.plans import LONG, PHOTOGRAPHS, PLANS, SCRATCH, SHORT, Plan
from farl.study.report import describe_plan
from farl.study.study import Study

EVERY = pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))


def test_fingerprint_changes_with_what_decides_a_figure_alone() -> None:
    task = SHORT.tasks[0]
    assert SHORT.fingerprint() == replace(SHORT, about="other words").fingerprint()
    assert SHORT.fingerprint() == replace(SHORT, tasks=(replace(task, label="F1"), *SHORT.tasks[1:])).fingerprint()
    others = [
        replace(SHORT, seeds=(0, 1, 2, 3)),
        replace(SHORT, confidence=0.9),
        replace(SHORT, pretrain={**SHORT.pretrain, "lr": 2e-3}),
        replace(SHORT, arms=SHORT.arms[1:]),
        replace(SHORT, tasks=(replace(task, settings={"batch": 17}), *SHORT.tasks[1:])),
    ]
    assert len({SHORT.fingerprint(), *(plan.fingerprint() for plan in others)}) == 6


@EVERY
def test_arms_are_one_budget_and_scratch(plan: Plan) -> None:
    assert [arm.name for arm in plan.arms if arm.pretrain is None] == [SCRATCH]
    configs = [pretrain_config(Study(plan, Path("run"), "x"), arm) for arm in plan.arms if arm.pretrain is not None]
    losses = {"mim_weight": 1.0, "contrastive_weight": 1.0, "run_dir": ""}
    assert len({str(replace(config, **losses)) for config in configs}) == 1
    assert len({(config.mim_weight, config.contrastive_weight) for config in configs}) == len(configs)


@EVERY
def test_tasks_fit_the_model_and_the_protocols(plan: Plan) -> None:
    vision = MODELS[plan.pretrain["model"]].vision
    known = {field.name for field in fields(TuneSettings)}
    for task in plan.tasks:
        task_module(task.name)
        assert task.crop % vision.patch_size == 0
        assert set(task.settings) <= known
    # Reading photographs costs as much as training on them, so their first plan has three.
    assert len(plan.seeds) >= (5 if plan.faces is not None else 3)
    assert sorted(plan.fractions) == list(plan.fractions)


@pytest.mark.parametrize("plan", [SHORT, LONG], ids=["short", "long"])
def test_pretraining_never_saw_the_faces_of_the_tasks(plan: Plan) -> None:
    assert plan.faces is not None
    seen, used = plan.faces
    assert seen.seed != used.seed
    assert used.val >= max(task.test_images for task in plan.tasks)


@EVERY
def test_description_names_budgets_cells_and_test(plan: Plan) -> None:
    text = describe_plan(plan)
    tuned = len(plan.tasks) * len(plan.fractions) * len(plan.arms) * len(plan.seeds)
    assert f"{tuned} fine-tunings" in text
    assert plan.test in text
    assert plan.fingerprint() in text


def test_photographs_are_no_drawn_faces() -> None:
    assert PHOTOGRAPHS.faces is None
