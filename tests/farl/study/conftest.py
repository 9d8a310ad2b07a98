"""A study of one model that is too small for anything, on a handful of faces."""

from __future__ import annotations

from dataclasses import replace

import pytest

from farl.faces.shards import FaceSet
from farl.study.plans import SHORT, Plan


@pytest.fixture
def tiny() -> Plan:
    """All arms and tasks of the short plan, in a few updates."""
    return replace(
        SHORT,
        name="tiny",
        faces=(FaceSet(train=48, val=0, size=32, seed=1), FaceSet(train=40, val=10, size=32, seed=0)),
        pretrain={"model": "farl-micro", "steps": 3, "global_batch": 16, "lr": 1e-3, "warmup": 1, "seed": 0},
        tasks=tuple(
            replace(task, updates=2, crop=32, test_images=6, settings={"batch": 4, "warmup": 1}) for task in SHORT.tasks
        ),
        fractions=(0.1, 1.0),
        seeds=(0, 1),
    )


@pytest.fixture
def one_task(tiny: Plan) -> Plan:
    """Random weights on attributes alone: nothing to pre-train."""
    return replace(
        tiny,
        faces=(FaceSet(train=1, val=0, size=32, seed=1), FaceSet(train=12, val=6, size=32, seed=0)),
        arms=(tiny.arm("scratch"),),
        tasks=(tiny.task("attributes"),),
        fractions=(1.0,),
        seeds=(0, 1, 2),
    )
