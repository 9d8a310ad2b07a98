"""`python -m farl.finetune {parsing,alignment,attributes} --init CHECKPOINT --train P --test P`: face tasks."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from farl import cli
from farl_engine import stop

PROG = "farl.finetune"
TASKS = {
    "parsing": "label every pixel: LaPa, CelebAMask-HQ, a folder with images/ and masks/, our shards",
    "alignment": "find landmarks: AFLW-19, 300W, WFLW, a folder of images and .pts files, our shards",
    "attributes": "yes-or-no attributes: CelebA, LFWA, a folder with attributes.csv, our shards",
}
# Options that replace a value of the protocol.
PROTOCOL = (
    "batch",
    "lr_backbone",
    "lr_head",
    "layer_decay",
    "schedule",
    "warmup",
    "ema",
    "resolution",
)
# Options that `make_task` of some or all tasks takes.
TASK_OPTIONS = ("crop", "warp", "head")
# What must be the same in both sets, where a set says it.
LABELS = ("classes", "points", "attributes")
# Reading all of a test set on one process, at worst.
TIMEOUT = 1800.0


@dataclass(frozen=True)
class FinetuneOptions:
    """Fine-tune a backbone with a head for one task, and judge it.

    What is None is taken from the protocol of the data's layout. The same --run-dir resumes by itself. Start with
    torchrun for several processes.
    """

    init: str
    """Run folder or checkpoint of farl.train, FaRL's or CLIP's weights, timm:NAME[:FILE], or scratch[:NAME]."""
    train: str
    """Training set: a benchmark's folder, a plain folder, or a glob of shards in quotes."""
    test: str
    """Test set, likewise; may be the same folder, of which the test part is taken."""
    run_dir: str = ""
    """Folder of the run; runs/finetune-TASK if empty."""
    json: str = ""
    """Also write the result to this file (it is always in the run folder as result.json)."""

    train_fraction: float = 1.0
    """Share of the training set to use; the number of steps stays."""
    fraction_seed: int = 123
    """Which share: a smaller one lies inside a larger one of the same seed."""
    steps: int | None = None
    """Length of the run in updates, instead of the protocol's epochs."""
    stop_at: int | None = None
    """Save and leave after this many updates."""
    eval_every: int | None = None
    """Updates between two evaluations; None is once an epoch. There is always one at the end."""
    batch: int | None = None
    """Images an update, over all processes."""
    seed: int = 0
    """Seed of new weights, order, augmentation and dropout."""

    lr_backbone: float | None = None
    """Learning rate of the backbone's last block."""
    lr_head: float | None = None
    """Learning rate of the head."""
    layer_decay: float | None = None
    """Each earlier block has this times the rate of the next one."""
    schedule: Literal["multistep", "cosine"] | None = None
    """Times 0.1 at the protocol's epochs, or a cosine down to 0."""
    warmup: int | None = None
    """Updates of linear warm-up."""
    ema: float | None = None
    """Decay of the averaged weights that are judged; 0 judges the weights themselves."""
    frozen: bool = False
    """Train the head alone."""
    checkpoint_activations: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""

    resolution: int | None = None
    """Side that the backbone sees, in pixels: a multiple of the patch size."""
    crop: int | None = None
    """Side of the face crop, in pixels."""
    blocks: tuple[int, ...] | None = None
    """Blocks whose outputs the head reads, from 0; None: 3 5 7 11 of 12, 7 11 15 23 of 24."""
    warp: float | None = None
    """Parsing: factor of the RoI tanh-warp, 0 to 1."""
    head: str | None = None
    """Attributes: probe (a linear layer on the last class token), frozen (a head over all blocks), or full (that head,
    and the backbone trained). Parsing, alignment: upernet (FaRL's), or linear (a linear layer on each patch)."""

    device: str = "auto"
    """cpu, cuda, or auto."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto is bf16 on a GPU, fp32 on a CPU. Weights stay fp32."""
    threads: int = 2
    """Threads a process that read ahead; 0 reads between the updates."""
    pictures: int = 64
    """Test images among which the worst are looked for and drawn; 0 draws none."""

    def __post_init__(self) -> None:
        least = {
            **dict.fromkeys(("steps", "stop_at", "eval_every", "batch", "resolution", "crop"), 1),
            **dict.fromkeys(("lr_backbone", "lr_head", "warmup", "threads", "pictures", "seed"), 0),
            "fraction_seed": 0,
        }
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ValueError(f"{_flag(name)} is {value}; it must be {smallest} or more")
        if self.seed >= 2**32:
            raise ValueError(f"--seed is {self.seed}; it must be less than 2^32")
        if not 0 < self.train_fraction <= 1:
            raise ValueError(f"--train-fraction is {self.train_fraction}; it must be more than 0 and at most 1")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"--ema is {self.ema}; it must be 0 or more and less than 1")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"--layer-decay is {self.layer_decay}; it must be more than 0 and at most 1")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"--device is {self.device!r}; use auto, cpu or cuda")


def main(argv: list[str] | None = None) -> int | None:
    # Before torch is imported, which takes seconds in which a signal would kill.
    stop.install()
    commands: dict[str, tuple[Callable[[list[str]], int | None], str]] = {
        name: (partial(_main, name), text) for name, text in TASKS.items()
    }
    return cli.subcommand(commands, argv, prog=PROG, description=str(inspect.getdoc(FinetuneOptions)))


def _main(name: str, argv: list[str]) -> int:
    description = f"{TASKS[name][0].upper()}{TASKS[name][1:]}.\n\n{inspect.getdoc(FinetuneOptions)}"
    options = cli.parse(FinetuneOptions, argv, prog=f"{PROG} {name}", description=description)
    if options.json and not Path(options.json).resolve().parent.is_dir():
        raise ValueError(f"--json {options.json}: the folder {Path(options.json).parent} is not there; make it first")
    finetune(name, options)
    return 0


def finetune(name: str, options: FinetuneOptions) -> dict[str, Any] | None:
    """Run the command; the result as it is written to --json, None where the run was stopped early.

    Raises:
        ValueError: data, options or checkpoint that do not fit; broken files.
        OSError: a file cannot be read or written.
    """
    from farl.downstream.job import Job
    from farl.downstream.network import task_module
    from farl.downstream.overlap import samples_in_both
    from farl.downstream.tune_report import result_table
    from farl.downstream.tuner import tune
    from farl_engine import distributed

    module = task_module(name)
    train = module.open_set(options.train, split="train")
    test = module.open_set(options.test, split="test")
    check_same_labels(train.about(), test.about())
    task = module.make_task(train, **task_options(name, module.make_task, options))
    given = {field: value for field in PROTOCOL if (value := getattr(options, field)) is not None}
    settings = dataclasses.replace(task.protocol, **given)
    if options.frozen:
        settings = dataclasses.replace(settings, frozen=True)
    run_dir = Path(options.run_dir or f"runs/finetune-{name}")
    if run_dir.is_file():
        raise ValueError(f"--run-dir {run_dir} is a file: name a folder, which is made if absent")
    job = Job(
        task=task,
        train=train,
        test=test,
        init=options.init,
        run_dir=run_dir,
        settings=settings,
        blocks=options.blocks,
        steps=options.steps,
        stop_at=options.stop_at,
        eval_every=options.eval_every,
        fraction=options.train_fraction,
        fraction_seed=options.fraction_seed,
        seed=options.seed,
        threads=options.threads,
        bf16={"auto": None, "fp32": False, "bf16": True}[options.precision],
        recompute=options.checkpoint_activations,
        pictures=options.pictures,
    )
    world = distributed.start(options.device, TIMEOUT)
    used = len(job.used().chosen)
    distributed.say(
        world,
        f"{name} from {options.init}: {used:,} of {len(train):,} images of {train.about()['layout']}, "
        f"{job.total_steps:,} steps of {job.settings.batch} on {world.size} x {world.device}, run folder {run_dir}",
    )
    in_both = samples_in_both(train, test)
    if in_both and world.is_main:
        warning = f"{in_both:,} of {len(test):,} test samples are in --train too: figures say little about new faces"
        print(f"{PROG} {name}: warning: {warning}; give another --test", file=sys.stderr, flush=True)
    result = tune(job, world)
    if result is not None:
        result |= {"train_is_test": in_both == len(test), "test_samples_in_train": in_both}
    if result is not None and world.is_main:
        text = json.dumps(result, indent=2, allow_nan=False) + "\n"
        for path in filter(None, (str(run_dir / "result.json"), options.json)):
            Path(path).write_text(text)
        if name == "attributes":
            from farl.downstream.draw_attributes import draw_accuracies

            draw_accuracies(result["last"]["metrics"], run_dir / "attributes.png")
        print(result_table(result))
    distributed.finish(world)
    return result


def task_options(name: str, make_task: Callable[..., Any], options: FinetuneOptions) -> dict[str, Any]:
    """Those of `TASK_OPTIONS` that were given. ValueError where the task has no such option."""
    given = {option: value for option in TASK_OPTIONS if (value := getattr(options, option)) is not None}
    known = inspect.signature(make_task).parameters
    for option in given:
        if option not in known:
            raise ValueError(f"{_flag(option)} is no option of {name}: leave it out")
    return given


def check_same_labels(train: dict[str, Any], test: dict[str, Any]) -> None:
    """ValueError where two sets do not have the same labels."""
    for label in LABELS:
        if label in train and label in test and train[label] != test[label]:
            counts = [len(about[label]) if isinstance(about[label], list) else about[label] for about in (train, test)]
            what = f"{counts[0]} against {counts[1]}" if counts[0] != counts[1] else "the same number, other names"
            raise ValueError(f"--train and --test have other {label}: {what}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


if __name__ == "__main__":
    cli.run(main, PROG)
