"""`python -m bench.gpu`: sections run apart, failures and time-outs are told and do not stop the rest."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import gpu, sections
from bench.sections import DEFAULT, NAMES, ROOT, Step, steps_of

MACHINE = {"device": "a test", "commit": {"id": "abc", "dirty": None}, "versions": {"torch": "0"}}
TESTS = """
import pytest
def test_good(): pass
def test_left(): pytest.skip("no such thing here")
"""


def python(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", code


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the command with other sections: name -> steps. Returns (exit status, results folder)."""

    def run(given: dict[str, tuple[Step, ...]], *arguments: str) -> tuple[int, Path]:
        out = tmp_path / "out"
        monkeypatch.setattr(gpu, "ask_machine", lambda environment: MACHINE)
        monkeypatch.setattr(gpu, "steps_of", lambda name, cuda, tests: given[name])
        monkeypatch.setattr(gpu, "RESERVE_SECONDS", 0.2)
        monkeypatch.setattr(gpu, "NAMES", tuple(given))
        return gpu.main(["--out", str(out), "--sections", ",".join(given), *arguments]), out

    return run


def step_of(tmp_path: Path, text: str, name: str = "test_it.py") -> Step:
    path = tmp_path / name
    path.write_text(text)
    return Step(name, (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)), "tests")


def test_a_failing_section_does_not_stop_the_next(command: Any, tmp_path: Path) -> None:
    status, out = command(
        {
            "bad": (step_of(tmp_path, TESTS + "def test_bad(): assert 1 == 2\n"),),
            "crash": (Step("crash", python("import os; print('last words'); os.abort()"), "tests"),),
            "good": (step_of(tmp_path, TESTS, "test_good.py"),),
            "figures": (Step("figures", python('print(\'{"ceilings": {"flop_per_second": 1}}\')'), "json"),),
        }
    )
    assert status == 1
    text = (out / "summary.txt").read_text()
    assert "[bad] test_it.py: failed, 1 passed, 1 failed, 1 skipped" in text and "assert 1 == 2" in text
    assert "[crash] crash: failed, exit status -6" in text and "last words" in text
    assert "[good] test_good.py: ok, 1 passed, 1 skipped" in text
    bad, good = (json.loads((out / f"{name}.json").read_text()) for name in ("bad", "good"))
    assert bad["steps"][0]["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert good["steps"][0]["status"] == "ok" and good["machine_info"]["farl"] == MACHINE
    assert json.loads((out / "figures.json").read_text())["ceilings"] == {"flop_per_second": 1}


def test_a_section_that_hangs_is_ended(command: Any, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    shell = ("sh", "-c", f"sleep 60 & echo $! > {pid}; wait")
    status, out = command(
        {"hangs": (Step("hangs", shell, "tests", minutes=0.03),), "good": (step_of(tmp_path, TESTS),)}
    )
    assert status == 1
    text = (out / "summary.txt").read_text()
    assert "[hangs] hangs: timed out" in text and "[good] test_it.py: ok" in text
    stat = Path("/proc", pid.read_text(), "stat")
    assert not stat.exists() or stat.read_text().split()[2] in "ZX"


def test_what_was_done_before_the_end_is_kept(command: Any, tmp_path: Path) -> None:
    slow = step_of(tmp_path, TESTS + "def test_slow():\n    import time; time.sleep(60)\n", "test_slow.py")
    status, out = command({"slow": (dataclasses.replace(slow, minutes=0.1),)})
    text = (out / "summary.txt").read_text()
    assert status == 1 and "[slow] test_slow.py: timed out, 1 passed" in text
    assert "skipped: 1 x no such thing here" in text


def test_no_test_starts_after_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_it.py").write_text("def test_late(): raise AssertionError\n")
    monkeypatch.setenv(gpu.VARIABLE, "1000")
    environment = gpu.environment_of(gpu.parse(["--out", "x"]))
    pytest_ = (*sections.TESTS, "-rs", str(tmp_path / "test_it.py"))
    done = subprocess.run(pytest_, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "1 skipped" in done.stdout and "out of time" in done.stdout


def test_on_a_gpu_every_test_of_the_kernels_is_in_a_step() -> None:
    (kernels,), (gpu_only, of_steps) = steps_of("kernel_tests", True), steps_of("gpu_tests", True)
    assert kernels.command is not None and gpu_only.command is not None and of_steps.command is not None
    for file in sections.STEP_TESTS:
        assert file in of_steps.command and "pytest.mark.gpu" in (ROOT / file).read_text()
    path = "tests/kernels/test_on_gpu.py"
    assert path in gpu_only.command and f"--ignore={path}" in kernels.command
    assert "not slow" in kernels.command and "tests/kernels" in kernels.command


def test_what_cannot_be_measured_is_told_and_no_failure(command: Any, tmp_path: Path) -> None:
    left = step_of(tmp_path, "import pytest\npytest.skip('no simplejpeg', allow_module_level=True)\n")
    status, out = command({"absent": (Step("sanitizer", None, "tests", "no GPU"),), "left": (left,)})
    assert status == 0
    text = (out / "summary.txt").read_text()
    assert "[absent] sanitizer: not measured: no GPU" in text
    assert "not measured" in text.split("[left] test_it.py: ")[1].splitlines()[0]


def test_a_suite_whose_package_is_absent_is_not_measured(command: Any, tmp_path: Path) -> None:
    absent, broken = tmp_path / "test_absent.py", tmp_path / "test_broken.py"
    absent.write_text("import a_peer_of_nobody.part\n")
    broken.write_text("import farl_kernels.no_such_file\n")
    pytest_ = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    status, out = command(
        {
            "absent": (Step("absent", (*pytest_, str(absent)), "benchmarks"),),
            "broken": (Step("broken", (*pytest_, str(broken)), "benchmarks"),),
        }
    )
    text = (out / "summary.txt").read_text()
    assert status == 1 and "[broken] broken: failed" in text
    assert "[absent] absent: not measured: a_peer_of_nobody is not installed" in text


def test_no_section_starts_when_the_time_is_over(command: Any, tmp_path: Path) -> None:
    status, out = command({"late": (step_of(tmp_path, TESTS),)}, "--minutes", "0.001")
    assert status == 0
    assert "[late] test_it.py: not measured: out of time" in (out / "summary.txt").read_text()


def test_processes_get_the_paths_the_commit_and_no_gpu() -> None:
    options = gpu.parse(["--out", "x", "--commit", "c0ffee", "--device", "cpu"])
    environment = gpu.environment_of(options)
    assert environment["FARL_COMMIT"] == "c0ffee" and environment["CUDA_VISIBLE_DEVICES"] == ""
    code = "import farl_kernels.dispatch, farl_engine, farl, bench.machine as m; print(m.commit()['id'])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd="/", capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "c0ffee"


def test_photographs_to_compare_decoders_on_are_handed_on(tmp_path: Path) -> None:
    assert "FARL_PHOTOGRAPHS" not in gpu.environment_of(gpu.parse(["--out", "x"]))
    environment = gpu.environment_of(gpu.parse(["--out", "x", "--photographs", str(tmp_path / "real.tar")]))
    assert environment["FARL_PHOTOGRAPHS"] == str(tmp_path / "real.tar")


def test_all_sections_together_write_no_more_than_eight_files() -> None:
    assert len(DEFAULT) + 1 <= 8 and set(DEFAULT) <= set(NAMES)
    for cuda in (True, False):
        for name in NAMES:
            for step in steps_of(name, cuda):
                assert step.command is not None or step.reason
                files = [part for part in step.command or () if part.endswith(".py")]
                assert all((ROOT / file.partition("=")[2] if "=" in file else ROOT / file).exists() for file in files)


def test_every_suite_is_in_a_section() -> None:
    named = {part for name in DEFAULT for step in steps_of(name, True) for part in step.command or ()}
    suites = {path.relative_to(ROOT).as_posix() for path in (ROOT / "bench").glob("test_*.py")}
    assert suites and suites <= named


def test_tests_without_their_packages_are_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sections, "installed", lambda name: name not in ("hypothesis", "xdist", "pytest_benchmark"))
    (step,) = steps_of("kernel_tests", True)
    assert step.command is not None and "-n" not in step.command
    path = "tests/kernels/layer_norm/test_add_layer_norm.py"
    assert f"--ignore={path}" in step.command and f"{path}: hypothesis is not installed" in step.left_out
    (suite,) = steps_of("attention", True)
    assert suite.command is None and suite.reason == "pytest-benchmark is not installed"


def test_an_unknown_section_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.parse(["--out", "x", "--sections", "attention,atention"])
    assert "there is no section 'atention'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_way_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.gpu", "--out", str(tmp_path), "--device", "cpu"]
    command += ["--sections", "ceilings,patch_mask", "--match", "patchify"]
    # In a worker of pytest-xdist, pytest-benchmark would refuse to measure.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=500)
    content = json.loads((tmp_path / "patch_mask.json").read_text())
    assert {item["extra_info"]["op"] for item in content["benchmarks"]} == {"patchify"}
    assert all(item["extra_info"]["seconds"] > 0 for item in content["benchmarks"])
    assert {item["contender"] for item in content["not_measured"]} == {"torch.compile"}
    assert content["ceilings"]["flop_per_second"] > 0 and content["machine_info"]["farl"]["commit"]["id"]
    assert "patchify" in (tmp_path / "summary.txt").read_text()
