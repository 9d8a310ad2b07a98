"""`python -m bench.training` with processes that are only pretended: what is asked, cut, told and drawn."""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import re
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import gpu, training, training_report
from bench.results import load
from bench.sections import DEFAULT, steps_of
from bench.training_plan import Plan, long_run, plan_of, updates_in
from bench.training_run import Finished
from farl.config import quickstart
from farl.train import read_config

MACHINE = {"device": "a test", "commit": {"id": "abc", "dirty": None}, "versions": {"torch": "0"}}
RETRIEVAL = {
    **{f"{way}_r{k}": 0.1 * k for way in ("image_to_text", "text_to_image") for k in (1, 5)},
    **{"chance_r1": 0.01, "chance_r5": 0.05, "pairs": 100, "distinct": {"x": 1}},
}


def option(command: list[str], name: str) -> str:
    """The value that counts: later ones win."""
    return next((b for a, b in reversed(list(itertools.pairwise(command))) if a == name), "")


class Pretended:
    """Stands in for `watch`: every run does all its updates at 2 s each and starts in 30 s."""

    def __init__(self, **changes: Any) -> None:
        self.commands: list[list[str]] = []
        self.ends: list[float] = []
        self.changes = changes

    def __call__(self, command: list[str], *, end: float, **_: Any) -> Finished:
        self.commands.append(command)
        self.ends.append(end)
        name = option(command, "--run-dir").rpartition("/")[2]
        if name == "engine":
            name = f"engine {option(command, '--engine')} {option(command, '--precision')}"
        if "farl.train" not in command:
            return Finished(command, code=0, seconds=1.0)
        return self.changes.get(name, self.training)(command)

    @staticmethod
    def training(command: list[str], factor: float = 1.0, off: float = 0.0) -> Finished:
        batch, every = int(option(command, "--global-batch")), int(option(command, "--log-every"))
        last = int(option(command, "--stop-at") or option(command, "--steps"))
        steps = sorted({1, *range(every, last + 1, every), last})
        rates = {"pairs_per_second": batch / 2.0 * factor, "data_wait_fraction": 0.004, "memory_bytes": 2**30, "mfu": 0}
        parts = {"loss_contrastive": 1.0, "loss_mim": 2.0, "lr": 1e-3, "grad_norm": 1.0, "logit_scale": 14.0}
        records = [{"step": step, "loss": (3 + off) / step**0.1, **parts, **rates} for step in steps]
        evaluations = [{"step": step, **RETRIEVAL} for step in (last // 2, last)]
        if int(option(command, "--eval-every")) == 0:
            evaluations = []
        seconds, said = 30 + 2.0 * last + 5, [(1.5, f"run folder {option(command, '--run-dir')}")]
        return Finished(command, 0, seconds, 30.0, said=said, records=records, evaluations=evaluations)


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a plan with pretended processes: (content, words, what was run). Pictures are drawn if `drawn`."""

    def measure(
        plan: Plan | None = None, seconds: float = 500.0, drawn: bool = False, **changes: Any
    ) -> tuple[dict, str, Pretended]:
        processes = Pretended(**changes)
        monkeypatch.setattr(training, "draw", training_report.draw if drawn else lambda *_: None)
        monkeypatch.setattr(training, "watch", processes)
        plan = plan or plan_of(cuda=False)
        content = training.measure(plan, tmp_path, None, {}, time.time() + seconds, MACHINE)
        return content["training"], "\n".join(training_report.words(content)), processes

    return measure


def test_a_whole_measurement_in_numbers_words_and_a_picture(measured: Any, tmp_path: Path) -> None:
    found, words, processes = measured(drawn=True)
    # 40 % of 500 s, less 30 s of start and five times the 5 s beyond the updates, at 2 s each, in tens.
    assert found["run"]["updates"] == found["run"]["updates_planned"] == 70
    assert found["run"]["steady"]["pairs_per_second"] == pytest.approx(32)
    assert found["starts"]["warm"]["seconds"] == 30 and found["failed"] == []
    assert list(found["engines"]) == ["eager", "fused", "compile"]
    assert [each["passed"] for each in found["comparisons"]] == [True, True]
    assert re.search(r"start to first update, warm +30.0 s +target <= 60 s: pass", words)
    assert re.search(r"waiting for data +0.40% +target <= 1%: pass", words)
    assert re.search(r"engine compile and eager, 100 updates +largest .* 0.0e\+00 +target <= 1e-04: pass", words)
    assert "image to text, recall at 1 and 5 of 100 held-out pairs" in words and "guessing: 1.0%, 5.0%" in words
    assert sorted(path.name for path in tmp_path.iterdir()) == ["training.json", "training.png"]
    text = (tmp_path / "training.json").read_text()
    assert json.loads(text)["training"] == json.loads(json.dumps(found)) and "/tmp" not in text
    assert (tmp_path / "training.png").stat().st_size > 20_000
    # The same seed, data and schedule; only the engine differs.
    same = [[word for word in command if word not in found["engines"]] for command in processes.commands[-3:]]
    assert same[0] == same[1] == same[2]


def test_every_command_is_one_that_training_takes(measured: Any) -> None:
    for plan in (plan_of(cuda=False), replace(plan_of(cuda=True), processes=2)):
        *_, processes = measured(plan)
        commands = [command for command in processes.commands if "farl.train" in command]
        assert len(commands) == 2 + len(plan.engines) + (plan.precision == "bf16")
        configs = [read_config(command[command.index("farl.train") + 1 :]) for command in commands]
        cold, long, *engines = configs
        assert (cold.stop_at, cold.log_every, cold.eval_every) == (plan.probe, 1, plan.probe) and long.stop_at == 0
        assert (cold.model, cold.global_batch, cold.engine) == (long.model, long.global_batch, long.engine)
        assert {each.precision for each in engines} == {plan.precision, "fp32"}
        assert {each.engine for each in engines} == set(plan.engines)
        for command, config in zip(commands, configs, strict=True):
            assert ("torch.distributed.run" in command) == (plan.processes > 1)
            assert config.eval_every % config.log_every == 0 and config.warmup < config.steps


def test_a_run_that_fails_is_told_with_its_last_lines_and_the_others_go_on(measured: Any) -> None:
    def fails(command: list[str]) -> Finished:
        return Finished(command, code=1, tail=["CUDA error: no luck"])

    found, words, _ = measured(**{"engine fused fp32": fails})
    assert found["failed"] == [{"what": "engine fused", "status": "exit status 1", "tail": ["CUDA error: no luck"]}]
    assert "engine fused: exit status 1\n    | CUDA error: no luck" in words
    assert [each["engine"] for each in found["comparisons"]] == ["compile"] and found["run"]["updates"] == 70
    found, words, _ = measured(cold=lambda command: replace(Pretended.training(command), records=[]))
    assert "run: not measured: the cold start came to 0 updates" in words and len(found["engines"]) == 3
    found, words, processes = measured(cold=fails)
    assert "run" not in found and len(processes.commands) == 3
    assert re.search(r"start to first update, warm +not measured", words) and re.search(r"run +not measured", words)


def test_an_engine_that_learns_something_else_misses(measured: Any, tmp_path: Path) -> None:
    _, words, _ = measured(**{"engine compile fp32": lambda command: Pretended.training(command, off=1e-3)})
    assert re.search(r"engine compile and eager.*3\.3e-04 .*target <= 1e-04: MISS", words)
    assert re.search(r"engine fused and eager.*pass", words)


def test_bfloat16_is_measured_by_fp32(measured: Any) -> None:
    def rounded(off: float) -> Any:
        return lambda command: Pretended.training(command, off=off)

    plan = replace(plan_of(cuda=False), precision="bf16", engines=("eager", "fused"))
    runs = {"engine eager fp32": rounded(0), "engine eager bf16": rounded(3e-3)}
    found, words, _ = measured(plan, **runs, **{"engine fused bf16": rounded(4.5e-3)})
    assert list(found["engines"]) == ["eager", "eager fp32", "fused"]
    assert found["comparisons"][0]["ratio"] == pytest.approx(1.5)
    assert re.search(r"engine fused, .* distance from fp32 over eager's +1.50 .*target <= 2: pass", words)
    found, words, _ = measured(plan, **runs, **{"engine fused bf16": rounded(7.5e-3)})
    assert found["comparisons"][0]["ratio"] == pytest.approx(2.5) and "<= 2: MISS" in words


def test_no_time_is_told_and_every_run_has_its_share(measured: Any) -> None:
    began = time.time()
    *_, processes = measured(seconds=400)
    assert all(end <= began + 401 for end in processes.ends)
    first, second, third = processes.ends[-3:]
    assert (first - began, second - began, third - began) == pytest.approx((400 / 3, 200, 400), abs=2)
    found, words, _ = measured(seconds=15)
    assert [each["status"] for each in found["failed"]] == ["not measured: out of time"] * 3
    assert "engine eager: not measured: out of time" in words


def test_a_slow_loader_and_a_slow_start_miss(measured: Any) -> None:
    def slow(command: list[str]) -> Finished:
        found = Pretended.training(command)
        found.first_update = 75.0
        for record in found.records:
            record["data_wait_fraction"] = 0.03
        return found

    _, words, _ = measured(long=slow)
    assert "75.0 s   target <= 60 s: MISS" in words and "3.00%   target <= 1%: MISS" in words


def test_the_first_update_of_a_log_that_is_written_late() -> None:
    records = [{"step": 1, "pairs_per_second": 1.0}, {"step": 11, "pairs_per_second": 80.0}]
    found = Finished([], first_update=20.0, records=records)
    assert training.first_update(found, 16, late=False) == 20
    # Ten updates of 16 pairs took 2 s; nine of them are not the first one's.
    assert training.first_update(found, 16, late=True) == pytest.approx(20 - 1.8)
    assert training.first_update(Finished([], first_update=20.0, records=records[:1]), 16, late=True) == 20
    assert training.first_update(Finished([]), 16, late=True) is None


def test_updates_are_cut_to_the_time() -> None:
    assert updates_in(200, start=30, finish=20, per_update=1.0) == 150
    assert updates_in(200, start=30, finish=20, per_update=1.02) == 140
    assert updates_in(10, start=30, finish=20, per_update=1.0) == 10


def test_log_lines_and_evaluations_of_a_long_run_are_few(tmp_path: Path) -> None:
    for updates in (10, 70, 137, 1000):
        command = long_run(plan_of(cuda=True), tmp_path, tmp_path / "run", updates)
        every, evaluated = int(option(command, "--log-every")), int(option(command, "--eval-every"))
        assert updates / every < 120 and 1 <= updates // evaluated <= 10


def test_the_table_of_persons_in_a_tar_splits_by_person(tmp_path: Path) -> None:
    for name, extra in (("plain", False), ("people", True)):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for member in ("a.jpg", "a.txt", *(["people.csv"] if extra else [])):
                info = tarfile.TarInfo(member)
                info.size = 4
                tar.addfile(info, io.BytesIO(b"x\ny\n"))
    assert training.groups(tmp_path / "plain.tar", tmp_path) == []
    options = training.groups(tmp_path / "people.tar", tmp_path)
    assert options[2:] == ["--group-column", "person"] and Path(options[1]).read_bytes() == b"x\ny\n"


def test_the_exit_status_tells_failures_and_wrong_engines_but_no_missed_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "ask_machine", lambda environment: MACHINE)
    monkeypatch.setattr(training, "draw", lambda *_: None)
    wrong = {"engine fused fp32": lambda command: Pretended.training(command, off=1.0)}
    failing = {"engine fused fp32": lambda command: Finished(command, code=1)}
    slow = {"long": lambda command: replace(Pretended.training(command), first_update=99.0)}
    for changes, expected in ((slow, 0), (wrong, 1), (failing, 1)):
        monkeypatch.setattr(training, "watch", Pretended(**changes))
        assert training.main(["--out", str(tmp_path), "--engines", "eager,fused", "--updates", "20"]) == expected


def test_options_change_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--out", "x", "--model", "farl-micro", "--engines", "eager", "--batch", "8", "--precision", "bf16"]
    plan = training.adapted(plan_of(cuda=False), training.parse(words))
    assert (plan.model, plan.engine_model, plan.batch) == ("farl-micro", "farl-micro", 8)
    assert plan.engines == ("eager",) and plan.precision == "bf16" and plan.engine_updates == 100
    with pytest.raises(SystemExit):
        training.parse(["--out", "x", "--photographs", str(tmp_path / "none.tar")])
    assert "which is no file" in capsys.readouterr().err


def test_engines_are_those_that_training_has() -> None:
    for engine in plan_of(cuda=True).engines:
        assert replace(quickstart(), engine=engine).engine == engine
    assert set(plan_of(cuda=True).engines) >= {"eager", "fused", "graph", "compile"}
    assert "graph" not in plan_of(cuda=True, processes=2).engines


def test_the_page_of_benchmarks_has_the_table_and_the_curve(measured: Any, tmp_path: Path) -> None:
    measured()
    lines = training_report.section(tmp_path, tmp_path / "images", tmp_path)
    text = "\n".join(lines)
    assert "### Real training runs" in text and "![Training runs](images/bench-" in text
    assert "| waiting for data | 0.40% | <= 1% | pass |" in text and "--model farl-tiny" in text
    assert len(list((tmp_path / "images").iterdir())) == 1
    # It is no benchmark of pytest's, and adds only its machine to those of the folder.
    results = load(tmp_path)
    assert results.machines == {"training.json": MACHINE} and not results.times and not results.checks
    assert training_report.section(tmp_path / "images", tmp_path, tmp_path) == []


def test_a_broken_loss_is_drawn_and_told(measured: Any) -> None:
    def broken(command: list[str]) -> Finished:
        found = Pretended.training(command)
        found.records[3]["loss"] = math.nan
        return found

    found, words, _ = measured(drawn=True, **{"engine fused fp32": broken})
    assert not found["comparisons"][0]["passed"] and re.search(r"engine fused and eager.*MISS", words)


def test_the_section_of_the_gpu_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "training" not in DEFAULT
    (step,) = steps_of("training", True)
    code = "import sys, json, pathlib; out = pathlib.Path(sys.argv[1].partition('=')[2]);"
    code += "(out / 'training.json').write_text((out / 'given.txt').read_text())"
    content = {"training": {"plan": vars(plan_of(cuda=False)), "starts": {}, "failed": [], "engines": {}}}
    (tmp_path / "given.txt").write_text(json.dumps(content | {"machine_info": {"farl": MACHINE}}))
    monkeypatch.setattr(gpu, "ask_machine", lambda environment: MACHINE)
    pretended = replace(step, command=(str(step.command[0]), "-c", code)) if step.command else step
    monkeypatch.setattr(gpu, "steps_of", lambda name, cuda, tests: (pretended,))
    assert gpu.main(["--out", str(tmp_path), "--sections", "training"]) == 0
    written = json.loads((tmp_path / "training.json").read_text())
    assert written["section"] == "training" and written["steps"][0]["status"] == "ok" and "plan" in written["training"]
    summary = (tmp_path / "summary.txt").read_text()
    assert "[training] real training runs: ok" in summary and "farl-tiny, 64 pairs an update, fp32" in summary


@pytest.mark.slow
def test_the_whole_way_with_a_micro_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = replace(plan_of(cuda=False), drawn=(60, 20, 32), probe=3)
    monkeypatch.setattr(training, "plan_of", lambda *_: drawn)
    words = ["--model", "farl-micro", "--batch", "8", "--updates", "20", "--engines", "eager,fused"]
    words += ["--engine-updates", "20", "--device", "cpu", "--out", str(tmp_path), "--minutes", "5"]
    assert training.main(words) == 0
    found = json.loads((tmp_path / "training.json").read_text())["training"]
    assert found["run"]["updates"] == 20 and found["run"]["evaluation"][-1]["pairs"] == 20
    assert found["comparisons"][0]["passed"] and found["comparisons"][0]["updates"] == 20
    assert all(found["starts"][caches]["seconds"] > 0 for caches in ("cold", "warm"))


def test_the_namespace_has_what_the_environment_needs() -> None:
    options = training.parse(["--out", "x", "--device", "cpu", "--commit", "c0ffee"])
    assert isinstance(options, argparse.Namespace)
    environment = gpu.environment_of(options)
    assert environment["FARL_COMMIT"] == "c0ffee" and environment["CUDA_VISIBLE_DEVICES"] == ""
