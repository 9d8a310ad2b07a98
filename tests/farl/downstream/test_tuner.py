"""The fine-tuning loop on a tiny made task: resumption, averages, evaluation, what it writes and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from farl.downstream import tune_report
from farl.downstream.draws import Draws
from farl.downstream.evaluating import Evaluator
from farl.downstream.job import Job
from farl.downstream.network import Network, load_network
from farl.downstream.optimize import WeightAverage, learning_rate_factor, make_optimizer
from farl.downstream.reading import check_files, read_batches
from farl.downstream.task import TuneSettings
from farl.downstream.tune_report import best_of
from farl.downstream.tuner import tune
from farl_engine import stop
from farl_engine.distributed import World

HERE = World(rank=0, size=1, device=torch.device("cpu"), control=None)
PROGRAM = Path(__file__).parent / "made_task.py"


def load_made_task() -> ModuleType:
    spec = importlib.util.spec_from_file_location("made_task", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


made = load_made_task()


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than the runs; `test_finetune.py` has it."""
    monkeypatch.setattr(tune_report, "draw_tuning", lambda *_: None)


@pytest.fixture
def make_job(tmp_path: Path) -> Callable[..., Job]:
    """Twelve steps on 13 images, judged on 7 after every third."""

    def make(
        run: str = "run", *, train: str = "made:13", test: str = "made:7", head: str = "plain", **changes: Any
    ) -> Job:
        train_set, test_set = made.open_set(train, split="train"), made.open_set(test, split="test")
        task = made.make_task(train_set, head=head)
        settings = {key: changes.pop(key) for key in list(changes) if hasattr(task.protocol, key)}
        values = {"steps": 12, "eval_every": 3, "log_every": 1, "threads": 0, "pictures": 0} | changes
        return Job(
            task=task,
            train=train_set,
            test=test_set,
            init="scratch:farl-micro",
            run_dir=tmp_path / run,
            settings=replace(task.protocol, **settings),
            **values,
        )

    return make


def checkpoint(job: Job, step: int = 12) -> dict[str, Any]:
    return torch.load(job.run_dir / "checkpoints" / f"step-{step:08d}.pt", weights_only=True)


def lines(job: Job) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job.run_dir / "metrics.jsonl").read_text().splitlines()]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one if key != "seconds")
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


class TestResume:
    @pytest.mark.parametrize("stop_at", [1, 6, 7])
    def test_an_interrupted_run_ends_in_the_same_bits(self, make_job: Callable[..., Job], stop_at: int) -> None:
        whole = make_job("whole", head="dropout")
        result = tune(whole, HERE)
        parts = make_job("parts", head="dropout")
        assert tune(replace(parts, stop_at=stop_at), HERE) is None
        resumed = tune(replace(parts, threads=2), HERE)
        assert same(checkpoint(whole), checkpoint(parts))
        assert lines(whole) == lines(parts)
        assert result is not None and resumed is not None
        for key in ("last", "best", "history", "settings", "data"):
            assert result[key] == resumed[key]
        assert same(torch.load(whole.run_dir / "best.pt"), torch.load(parts.run_dir / "best.pt"))

    def test_other_seeds_and_dropout_matter(self, make_job: Callable[..., Job]) -> None:
        losses = [
            [line["loss"] for line in lines(job) if "loss" in line]
            for job in (make_job("a"), make_job("b", seed=1), make_job("c", head="dropout"))
            if tune(job, HERE)
        ]
        assert losses[0] != losses[1] and losses[0] != losses[2]

    @pytest.mark.parametrize("signal_at", [4, 6])
    def test_a_signal_saves_and_the_run_goes_on(
        self,
        make_job: Callable[..., Job],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture,
        signal_at: int,
    ) -> None:
        """After step 4, and within the evaluation after step 6."""
        whole, parts = make_job("whole"), make_job("parts")
        tune(whole, HERE)
        trained = []
        update = WeightAverage.update

        def counted(self: WeightAverage, network: Network, step: int) -> None:
            update(self, network, step)
            trained.append(step)

        with monkeypatch.context() as patch:
            patch.setattr(WeightAverage, "update", counted)
            patch.setattr(stop, "requested", lambda: "SIGTERM" if len(trained) >= signal_at else None)
            assert tune(parts, HERE) is None
        assert trained == list(range(1, signal_at + 1))
        assert f"stopped after step {signal_at} of 12" in capsys.readouterr().out
        assert tune(parts, HERE) is not None
        assert same(checkpoint(whole), checkpoint(parts))
        assert [line for line in lines(parts) if "eval" in line] == [line for line in lines(whole) if "eval" in line]

    def test_a_killed_run_keeps_the_checkpoint_of_its_best_weights(
        self, make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole, parts = make_job("whole", lr_head=0.05), make_job("parts", lr_head=0.05)
        tune(whole, HERE)
        update = WeightAverage.update

        def killed(self: WeightAverage, network: Network, step: int) -> None:
            update(self, network, step)
            if step == 8:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(WeightAverage, "update", killed)
            with pytest.raises(KeyboardInterrupt):
                tune(parts, HERE)
        best = torch.load(parts.run_dir / "best.pt")
        assert best["step"] in (3, 6) and checkpoint(parts, best["step"])["history"][-1]["metrics"] == best["metrics"]
        assert tune(parts, HERE) is not None
        assert same(checkpoint(whole), checkpoint(parts)) and lines(whole) == lines(parts)

    def test_a_finished_run_gives_its_result_again(self, make_job: Callable[..., Job]) -> None:
        job = make_job()
        first, again = tune(job, HERE), tune(job, HERE)
        assert first is not None and again is not None
        assert first["history"] == again["history"] and len(lines(job)) == 16

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"lr_head": 0.5}, r"settings lr_head was 0.01, is 0.5"),
            ({"seed": 4}, r"settings seed was 0, is 4"),
            ({"fraction": 0.5}, r"train fraction was 1.0, is 0.5; train samples_used was 13, is 7"),
            ({"test": "made:8"}, r"test samples was 7, is 8; test fingerprint was \w+, is \w+"),
            ({"head": "dropout"}, r"task head was plain, is dropout"),
        ],
    )
    def test_another_run_is_refused(self, make_job: Callable[..., Job], change: dict[str, Any], message: str) -> None:
        tune(make_job(stop_at=2), HERE)
        with pytest.raises(ValueError, match=message + ". Use another --run-dir, or the old settings$"):
            tune(make_job(**change), HERE)


class TestLearning:
    def test_learns_and_reports_last_and_best(self, make_job: Callable[..., Job]) -> None:
        job = make_job(steps=60, eval_every=7, train="made:24", pictures=5)
        result = tune(job, HERE)
        assert result is not None
        assert [record["step"] for record in result["history"]] == [*range(7, 60, 7), 60]
        assert result["last"] == result["history"][-1]
        errors = [record["metrics"]["error"] for record in result["history"]]
        assert result["best"]["metrics"]["error"] == min(errors) < 0.5 * errors[0]
        assert result["last"]["metrics"]["images"] == 7 and result["last"]["metrics"]["sum_of_indices"] == 21
        assert result["last"]["epoch"] == 10 and result["settings"]["steps_per_epoch"] == 6
        assert (result["parameters"]["trained"], result["main_metric"]) == (
            sum(result["parameters"].values()) // 2,
            "error",
        )
        assert result["data"]["train"]["fingerprint"] and result["data"]["test"]["path"] == "made:7"
        assert result["backbone"]["init"] == "scratch:farl-micro" and result["versions"]["torch"] == torch.__version__
        assert result["pictures"]["looked_at"] == 5 and result["pictures"]["worst_first"][0]["name"].endswith(".jpg")
        json.dumps(result, allow_nan=False)
        assert {path.name for path in job.run_dir.iterdir()} == {
            *("metrics.jsonl", "checkpoints", "last.pt", "best.pt", "worst.png")
        }

    def test_files_hold_the_network_that_was_judged(
        self, make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "farl.downstream.parsing", made)
        job = make_job(lr_head=0.05)
        result = tune(job, HERE)
        assert result is not None
        for path, which in (
            (job.run_dir, "last"),
            (job.run_dir / "best.pt", "best"),
            (job.run_dir / "last.pt", "last"),
        ):
            task, network = load_network(path)
            found = Evaluator(task, job.test, HERE, 3, False, 0).figures(network)
            assert found is not None
            assert found["error"] == pytest.approx(result[which]["metrics"]["error"], rel=1e-6)
        raw = checkpoint(job)["network"]
        network.load_state_dict(raw)
        found = Evaluator(task, job.test, HERE, 3, False, 0).figures(network)
        assert found is not None and abs(found["error"] - result["last"]["metrics"]["error"]) > 1e-4

        saved = torch.load(job.run_dir / "last.pt", weights_only=True)
        saved["ema"].popitem()
        torch.save(saved, job.run_dir / "other.pt")
        with pytest.raises(ValueError, match=r"other\.pt do not fit the head"):
            load_network(job.run_dir / "other.pt")

    def test_a_frozen_backbone_stays(self, make_job: Callable[..., Job]) -> None:
        tune(make_job("start", stop_at=1, lr_backbone=0.0, lr_head=0.0), HERE)
        job = make_job(frozen=True)
        result = tune(job, HERE)
        assert result is not None
        start, end = checkpoint(make_job("start"), 1)["network"], checkpoint(job)["network"]
        assert all(torch.equal(start[name], end[name]) == name.startswith("backbone") for name in start)
        assert result["parameters"]["trained"] == result["parameters"]["head"]

    def test_a_fraction_has_as_many_steps(self, make_job: Callable[..., Job]) -> None:
        whole, part = make_job(steps=None), make_job(steps=None, fraction=0.1, check=False)
        assert whole.total_steps == part.total_steps == 8 == 2 * math.ceil(13 / 4)
        result = tune(part, HERE)
        assert result is not None and result["last"]["step"] == 8
        assert set(part.train.read) == set(part.used().chosen) and len(part.train.read) == 8 * 4
        assert result["data"]["train"]["samples_used"] == 2

    def test_a_loss_that_is_not_finite(self, make_job: Callable[..., Job]) -> None:
        job = make_job(lr_head=1e30, lr_backbone=1e30)
        with pytest.raises(FloatingPointError, match=r"not finite at or before step \d+;.*Lower --lr-backbone"):
            tune(job, HERE)
        assert not (job.run_dir / "checkpoints").exists()

    def test_bf16(self, make_job: Callable[..., Job]) -> None:
        tune(make_job(bf16=True, steps=2), HERE)
        tune(make_job("full", steps=2), HERE)
        loss, full = (lines(make_job(run))[0]["loss"] for run in ("run", "full"))
        assert loss != full and loss == pytest.approx(full, rel=0.05)


class TestFiles:
    @pytest.mark.parametrize(("part", "option"), [("train", "--train"), ("test", "--test")])
    def test_a_broken_one_stops_before_training(self, make_job: Callable[..., Job], part: str, option: str) -> None:
        job = make_job(**{part: "made:9:4"})
        with pytest.raises(ValueError, match=f"^1 of 9 samples of {option} cannot be used: 0004.jpg is cut short"):
            tune(job, HERE)
        assert not job.run_dir.exists()

    def test_one_outside_the_fraction_does_not_matter(self, make_job: Callable[..., Job]) -> None:
        unused = make_job(fraction=0.5).used()
        broken = next(index for index in range(13) if index not in unused.chosen)
        assert tune(make_job(fraction=0.5, train=f"made:13:{broken}"), HERE)

    @pytest.mark.parametrize("threads", [0, 2])
    def test_one_that_breaks_later_stops_with_its_name(self, make_job: Callable[..., Job], threads: int) -> None:
        with pytest.raises(ValueError, match=r"^0004\.jpg is cut short$"):
            tune(make_job(train="made:9:4", check=False, threads=threads), HERE)

    def test_each_is_looked_at_once(self) -> None:
        data = made.open_set("made:9", split="train")
        check_files(data, range(2, 9), "--train", HERE, 2)
        assert sorted(data.read) == list(range(2, 9))

    @pytest.mark.parametrize("threads", [0, 3])
    def test_samples_come_in_order(self, threads: int) -> None:
        data = made.open_set("made:9", split="train")
        batches = [[4, 1], [8, 8], [0], [3, 2], [5]]
        found = [[sample["index"] for sample in batch] for batch in read_batches(data, batches, threads)]
        assert found == batches

    @pytest.mark.parametrize(("options", "what"), [({"train": "made:0"}, "training"), ({"test": "made:0"}, "test")])
    def test_an_empty_set(self, make_job: Callable[..., Job], options: dict[str, str], what: str) -> None:
        with pytest.raises(ValueError, match=f"the {what} set is empty"):
            tune(make_job(steps=1, **options), HERE)


class TestParts:
    def test_average_against_the_formula(self) -> None:
        values = [torch.randn(5, dtype=torch.float64) for _ in range(30)]
        network = made.Head(5, 0.0).double()
        network.register_buffer("statistic", torch.zeros(5, dtype=torch.float64))
        network.register_buffer("count", torch.zeros((), dtype=torch.int64))
        with torch.no_grad():
            network.norm.weight.copy_(values[0])
        average = WeightAverage(network, 0.7)
        expected = values[0].clone()
        for step, value in enumerate(values[1:], 1):
            with torch.no_grad():
                network.norm.weight.copy_(value)
            network.statistic.copy_(2 * value)
            network.count += 1
            average.update(network, step)
            decay = min(0.7, (1 + step) / (10 + step))
            expected = decay * expected + (1 - decay) * value
        torch.testing.assert_close(average.network.norm.weight.data, expected)
        assert int(average.network.count) == 29
        assert not torch.equal(average.network.statistic, network.statistic)

    def test_no_average_at_decay_0(self) -> None:
        network = made.Head(5, 0.0)
        average = WeightAverage(network, 0.0)
        with torch.no_grad():
            network.norm.weight.normal_()
        average.update(network, 1)
        assert torch.equal(average.network.norm.weight, network.norm.weight)

    @pytest.mark.parametrize(
        ("settings", "factors"),
        [
            (TuneSettings(9, milestones=(1, 3)), {0: 1, 9: 1, 10: 0.1, 29: 0.1, 30: 0.01, 99: 0.01}),
            (TuneSettings(9, milestones=(200,), warmup=4), {0: 0.25, 3: 1, 4: 1, 99: 1}),
            (TuneSettings(9, schedule="cosine", warmup=20), {9: 0.5, 20: 1, 60: 0.5, 100: 0}),
        ],
    )
    def test_schedules(self, settings: TuneSettings, factors: dict[int, float]) -> None:
        for step, factor in factors.items():
            found = learning_rate_factor(step, settings, steps=100, steps_per_epoch=10)
            assert found == pytest.approx(factor, abs=1e-12)

    def test_optimizer_groups(self, make_job: Callable[..., Job]) -> None:
        from farl.downstream.backbone import load_backbone

        job = make_job(layer_decay=0.5)
        backbone = load_backbone("scratch:farl-micro", resolution=32)
        network = Network(backbone, job.task.make_head(backbone))
        optimizer = make_optimizer(network, job.settings)
        rates = {group["name"]: group["base_lr"] for group in optimizer.param_groups}
        assert rates == {"embeddings": 2.5e-4, "block 0": 5e-4, "block 1": 1e-3, "head": 1e-2}
        counted = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
        assert counted == sum(parameter.numel() for parameter in network.parameters())
        assert {group["weight_decay"] for group in optimizer.param_groups} == {1e-5}

    def test_batches_do_not_depend_on_the_number_of_processes(self, make_job: Callable[..., Job]) -> None:
        job = make_job()
        worlds = [[World(rank, size, HERE.device, None) for rank in range(size)] for size in (1, 2, 4)]
        one, two, four = (
            [list(chain(*parts)) for parts in zip(*(job.own_batches(world, 2, 9) for world in group), strict=True)]
            for group in worlds
        )
        assert one == two == four and len(one) == 7
        assert sorted(chain(*job.own_batches(HERE, 0, 13))) == sorted(4 * list(range(13)))

    def test_draws_belong_to_the_sample(self) -> None:
        keys = [(3, 7, slot) for slot in range(6)]
        together = Draws(keys)
        halves = Draws(keys[:3]), Draws(keys[3:])
        for name, arguments in (
            ("uniform", (2.0, 5.0, (2,))),
            ("normal", (1.0, 0.1)),
            ("integers", (0, 9)),
            ("chance", (0.5,)),
        ):
            whole = getattr(together, name)(*arguments)
            assert torch.equal(whole, torch.cat([getattr(half, name)(*arguments) for half in halves]))
            assert len(whole) == 6 and len(whole.unique()) > 1
        assert Draws(keys).uniform(2.0, 5.0, (1000, 3)).shape == (6, 1000, 3)
        numbers = Draws(keys).uniform(2.0, 5.0, (1000,))
        assert numbers.min() >= 2 and numbers.max() < 5 and abs(float(numbers.mean()) - 3.5) < 0.05

    def test_best_is_the_first_of_equals_and_skips_nothing_counted(self) -> None:
        def history(*values: float | None) -> list[dict[str, Any]]:
            return [{"step": step, "metrics": {"error": value}} for step, value in enumerate(values)]

        task = made.make_task(made.open_set("made:1", split="train"))
        assert best_of(history(0.3, None, 0.2, 0.2, 0.4), task)["step"] == 2
        assert best_of(history(None, None), task)["step"] == 1
        task.higher_is_better = True
        assert best_of(history(0.3, None, 0.2), task)["step"] == 0

    @pytest.mark.parametrize("higher_is_better", [False, True])
    def test_worst_cases_come_first(self, make_job: Callable[..., Job], tmp_path: Path, higher_is_better: bool) -> None:
        from farl.downstream.backbone import load_backbone

        job = make_job(test="made:40")
        job.task.higher_is_better = higher_is_better
        backbone = load_backbone("scratch:farl-micro", resolution=32)
        network = Network(backbone, job.task.make_head(backbone)).eval()
        found = Evaluator(job.task, job.test, HERE, 4, False, 1).worst_cases(network, tmp_path / "worst.png", 20)
        scores = [case["score"] for case in found["worst_first"]]
        assert len(scores) == 12 and scores == sorted(scores, reverse=not higher_is_better) and found["looked_at"] == 20
        assert np.asarray(made.Image.open(tmp_path / "worst.png")).shape == (144, 10, 3)


@pytest.mark.slow
def test_two_processes_do_the_same(tmp_path: Path) -> None:
    """Equal losses and figures; the test set of 7 is not padded."""
    results, losses = [], []
    for processes in (1, 2):
        run_dir = tmp_path / str(processes)
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
        options = "--init scratch:farl-micro --train made:13 --test made:7 --device cpu --steps 12 --eval-every 5"
        command += [str(PROGRAM), "parsing", *options.split(), "--run-dir", str(run_dir)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        results.append(json.loads((run_dir / "result.json").read_text()))
        records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        losses.append([record["loss"] for record in records if "loss" in record])
    assert [result["processes"] for result in results] == [1, 2]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for one, two in zip(*(result["history"] for result in results), strict=True):
        assert one["metrics"] == pytest.approx(two["metrics"], rel=1e-5)
        assert two["metrics"]["sum_of_indices"] == 21


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])
