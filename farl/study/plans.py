"""Plans of a study: everything that decides its outcome, as frozen data that is committed before the run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from farl.faces.shards import FORMAT, FaceSet

SCRATCH = "scratch"
PRETRAIN_SHARDS = "pretrain/train-*.tar"


@dataclass(frozen=True)
class Arm:
    """Where fine-tuning starts.

    Attributes:
        pretrain: what this arm's pre-training changes in the plan's; None is no pre-training: random weights of the
            same sizes, others for each seed.
    """

    name: str
    pretrain: dict[str, Any] | None


@dataclass(frozen=True)
class TaskPlan:
    """How one face task is fine-tuned and judged.

    Attributes:
        train, test: sets as `farl.finetune` takes them, from the study's data folder.
        updates: at every fraction of the labels.
        crop: side of the crops, and what the backbone sees, in pixels.
        settings: fields of `TuneSettings` that replace the protocol's.
        task: fields of the task that are replaced, such as the layout that decides its protocol.
        test_images: at most so many, at equal distances in the test set.
        metric: one of the task's figures, shown in percent. label: for people.
    """

    name: Literal["parsing", "alignment", "attributes"]
    train: str
    test: str
    updates: int
    crop: int
    metric: str
    label: str
    higher_is_better: bool = True
    settings: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    test_images: int = 250


@dataclass(frozen=True)
class Plan:
    """One study.

    Attributes:
        about: what it is and what is known of its length.
        faces: drawn faces to pre-train on, and others for the tasks; None takes real photographs.
        pretrain: fields of `TrainConfig`, the same for every arm.
        arms: the pre-trained ones, and `scratch`, to which the others are compared.
        fractions: shares of the labels. seeds: each decides subset, order, augmentation, head and random weights.
        confidence: of the intervals.
    """

    name: str
    about: str
    faces: tuple[FaceSet, FaceSet] | None
    pretrain: dict[str, Any]
    arms: tuple[Arm, ...]
    tasks: tuple[TaskPlan, ...]
    fractions: tuple[float, ...]
    seeds: tuple[int, ...]
    confidence: float = 0.95

    def fingerprint(self) -> str:
        """16 hex digits that change with anything that decides a figure (not with `about` and labels)."""
        values = asdict(replace(self, about="", tasks=tuple(replace(task, label="") for task in self.tasks)))
        text = json.dumps({"faces_format": FORMAT, **values}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def task(self, name: str) -> TaskPlan:
        return next(task for task in self.tasks if task.name == name)

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def test(self) -> str:
        """The test in words."""
        return (
            f"For each task, fraction and arm: the difference to {SCRATCH} of the same seed, positive where the arm is "
            f"better, its mean over {len(self.seeds)} seeds and Student's {self.confidence:.0%} interval. The arm "
            "separates where the whole interval lies above 0."
        )


BOTH = Arm("contrast+mim", {})
CONTRAST = Arm("contrast", {"mim_weight": 0.0})
MIM = Arm("mim", {"contrastive_weight": 0.0})
RANDOM = Arm(SCRATCH, None)


# Shares of yes are small, so that accuracy hardly moves while the ranking improves.
ATTRIBUTES_METRIC = {"metric": "average_precision", "label": "average precision"}
PARSING_METRIC = {"metric": "mean_f1", "label": "mean F1"}
ALIGNMENT_METRIC = {"metric": "nme_diagonal", "label": "NME (diagonal)", "higher_is_better": False}
# An UPerNet head on frozen random features does as well as on trained ones at this size: it would measure the head.
LINEAR = {"head": "linear"}


def _drawn_tasks(
    crop: int, updates: dict[str, int], test_images: int, settings: dict[str, dict[str, Any]]
) -> tuple[TaskPlan, ...]:
    def task(name: Literal["parsing", "alignment", "attributes"], **fields: Any) -> TaskPlan:
        return TaskPlan(
            name,
            train="tasks/train-*.tar",
            test="tasks/val-*.tar",
            updates=updates[name],
            crop=crop,
            test_images=test_images,
            settings=settings[name],
            **fields,
        )

    return (
        task("parsing", task=LINEAR, **PARSING_METRIC),
        task("alignment", task=LINEAR, **ALIGNMENT_METRIC),
        task("attributes", **ATTRIBUTES_METRIC),
    )


SHORT_UPDATES = {"parsing": 120, "alignment": 200, "attributes": 80}
SHORT_SETTINGS: dict[str, dict[str, Any]] = {
    "parsing": {"batch": 16, "lr_backbone": 5e-4, "warmup": 20},
    "alignment": {"batch": 16, "lr_backbone": 5e-4, "warmup": 20},
    "attributes": {"batch": 32, "lr_backbone": 5e-4, "warmup": 15},
}

SHORT = Plan(
    name="short",
    about="drawn faces on a CPU; estimated at an hour and a quarter on two cores",
    faces=(
        FaceSet(train=8000, val=0, size=64, seed=1),
        FaceSet(train=4000, val=500, size=96, seed=2),
    ),
    pretrain={"model": "farl-tiny", "steps": 1200, "global_batch": 64, "lr": 1e-3, "warmup": 60, "seed": 0},
    arms=(BOTH, CONTRAST, MIM, RANDOM),
    tasks=_drawn_tasks(crop=64, updates=SHORT_UPDATES, test_images=250, settings=SHORT_SETTINGS),
    fractions=(0.01, 0.1, 1.0),
    seeds=(0, 1, 2, 3, 4),
)

# After `short`: was one of its cells not to be told from 0 for want of an effect, or of seeds?
SHORT_PARSING = replace(
    SHORT,
    name="short-parsing",
    about="parsing with 10 % of the labels as in `short`, ten new seeds; ten minutes after its pre-training",
    arms=(BOTH, MIM, RANDOM),
    tasks=SHORT.tasks[:1],
    fractions=(0.1,),
    seeds=tuple(range(5, 15)),
)

LONG = Plan(
    name="long",
    about="drawn faces on a GPU; not measured",
    faces=(
        FaceSet(train=100_000, val=0, size=224, seed=1),
        FaceSet(train=10_000, val=1000, size=224, seed=2),
    ),
    pretrain={"model": "farl-s16", "steps": 8000, "global_batch": 512, "lr": 5e-4, "warmup": 400, "seed": 0},
    arms=(BOTH, CONTRAST, MIM, RANDOM),
    tasks=_drawn_tasks(
        crop=224,
        updates=dict.fromkeys(("parsing", "alignment", "attributes"), 2000),
        test_images=1000,
        settings={
            "parsing": {"batch": 32, "lr_backbone": 2e-4, "lr_head": 2e-3},
            "alignment": {"batch": 32, "lr_backbone": 2e-4, "lr_head": 2e-3},
            "attributes": {
                "batch": 64,
                "lr_backbone": 2e-4,
                "lr_head": 1e-3,
                "layer_decay": 1.0,
                "warmup": 100,
                "ema": 0.99,
            },
        },
    ),
    fractions=(0.01, 0.1, 1.0),
    seeds=tuple(range(10)),
)

# Crops of photographs are small too, so the tasks take the short protocols of drawn faces.
PHOTOGRAPHS = Plan(
    name="photographs",
    about="real photographs on a CPU; estimated at half an hour on two cores",
    faces=None,
    pretrain={"model": "farl-tiny", "steps": 400, "global_batch": 128, "lr": 1e-3, "warmup": 40, "seed": 0},
    arms=(BOTH, RANDOM),
    tasks=(
        TaskPlan(
            "parsing",
            "parsing/train",
            "parsing/test",
            updates=SHORT_UPDATES["parsing"],
            crop=64,
            settings=SHORT_SETTINGS["parsing"],
            task={"small": True, **LINEAR},
            **PARSING_METRIC,
        ),
        TaskPlan(
            "alignment",
            "alignment/train",
            "alignment/test",
            updates=SHORT_UPDATES["alignment"],
            crop=64,
            settings=SHORT_SETTINGS["alignment"],
            task={"layout": "faces", **LINEAR},
            **ALIGNMENT_METRIC,
        ),
        TaskPlan(
            "attributes",
            "attributes",
            "attributes",
            updates=SHORT_UPDATES["attributes"],
            crop=64,
            settings=SHORT_SETTINGS["attributes"],
            test_images=750,
            **ATTRIBUTES_METRIC,
        ),
    ),
    fractions=(0.1, 1.0),
    seeds=(0, 1, 2),
)

# After `photographs`: does alignment with few labels separate with twice the updates and new seeds?
PHOTOGRAPHS_ALIGNMENT = replace(
    PHOTOGRAPHS,
    name="photographs-alignment",
    about="alignment of photographs with 10 % of the labels, twice the updates of `photographs`, five new seeds",
    tasks=(replace(PHOTOGRAPHS.tasks[1], updates=400),),
    fractions=(0.1,),
    seeds=(3, 4, 5, 6, 7),
)

PLANS = {plan.name: plan for plan in (SHORT, SHORT_PARSING, LONG, PHOTOGRAPHS, PHOTOGRAPHS_ALIGNMENT)}
