"""What `python -m bench.gpu` runs: sections, each of one or more commands in processes of their own."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
TESTS = (*PYTEST, "-p", "bench.deadline")
# Compilation is most of the time of the kernel tests, and it is done on the CPU.
TEST_PROCESSES = 8
# Each of the processes starts threads of its own.
FEW_THREADS = (("OMP_NUM_THREADS", "2"), ("TORCHINDUCTOR_COMPILE_THREADS", "2"))
# A test that hangs takes its process along, which is started again, and not the section.
TEST_SECONDS = 180
STEP_TESTS = ("tests/engine/test_graphs.py", "tests/farl/test_graph_engine.py", "tests/farl/test_step_precision.py")
SANITIZER = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")


@dataclass(frozen=True)
class Step:
    """One command.

    Args:
        title: what it is called in the summary.
        command: None where it cannot be run; then `reason` says why.
        kind: "benchmarks" (pytest with --benchmark-json), "tests" (pytest), "json" (prints a JSON object), or "files"
            (writes its own into --out).
        minutes: at most this long, whatever the section may take.
        left_out: what of it cannot be run here, and why.
        environment: variables for this command.
    """

    title: str
    command: tuple[str, ...] | None
    kind: str
    reason: str = ""
    minutes: float = 60.0
    left_out: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


def installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def suite(*names: str) -> tuple[Step, ...]:
    """Benchmark suites, in one process."""
    title = "benchmarks of " + ", ".join(names)
    if not installed("pytest_benchmark"):
        return (Step(title, None, "benchmarks", "pytest-benchmark is not installed"),)
    files = tuple(f"bench/test_{name}.py" for name in names)
    return (Step(title, (*PYTEST, *files, "--benchmark-only", "--benchmark-columns=median,iqr"), "benchmarks"),)


def kernel_tests(cuda: bool, chosen: tuple[str, ...]) -> Step:
    """The tests of the kernels, natively on a GPU; on a CPU a few that are quick."""
    quick = ("tests/kernels/test_dispatch.py", "tests/kernels/test_no_host_sync.py")
    paths = chosen or (("tests/kernels",) if cuda else quick)
    command = [*TESTS, *paths, "-m", "not slow" if cuda else "not slow and not gpu"]
    left_out = []
    if not chosen:
        command.append("--ignore=tests/kernels/test_on_gpu.py")
    if not installed("hypothesis"):
        for file in sorted((ROOT / "tests/kernels").rglob("*.py")):
            if re.search(r"^(from|import) hypothesis", file.read_text(), re.MULTILINE):
                path = file.relative_to(ROOT).as_posix()
                command.append(f"--ignore={path}")
                left_out.append(f"{path}: hypothesis is not installed")
    command += in_parallel(TEST_PROCESSES) if cuda else []
    return Step("kernel tests", tuple(command), "tests", left_out=tuple(left_out), environment=FEW_THREADS)


def in_parallel(processes: int) -> list[str]:
    """Arguments of pytest for several processes, if it has the plugin."""
    if not installed("xdist"):
        return []
    limit = [f"--timeout={TEST_SECONDS}", "--timeout-method=thread"] if installed("pytest_timeout") else []
    return ["-n", str(processes), "--dist", "worksteal", *limit]


def gpu_tests(cuda: bool, slow: bool = True) -> Step:
    """Capture, bit equality, no host sync, bfloat16, peak memory."""
    title = "capture, bit equality, no host sync, bfloat16"
    if not cuda:
        return Step(title, None, "tests", "no GPU")
    command = [*TESTS, "tests/kernels/test_on_gpu.py", "-m", "gpu" if slow else "gpu and not slow"]
    return Step(title, (*command, *in_parallel(TEST_PROCESSES // 2)), "tests", environment=FEW_THREADS)


def step_tests(cuda: bool) -> Step:
    """Recorded updates and bfloat16 gradients of the whole step."""
    title = "recorded updates, no host sync and bfloat16 gradients of the step"
    if not cuda:
        return Step(title, None, "tests", "no GPU")
    return Step(title, (*TESTS, *STEP_TESTS, "-m", "gpu"), "tests", environment=FEW_THREADS)


def sanitizer(cuda: bool, tool: str, minutes: float) -> Step:
    """compute-sanitizer over all ops on ragged shapes."""
    title = f"compute-sanitizer {tool}, ragged shapes"
    found = next(filter(None, map(shutil.which, SANITIZER)), None)
    if not cuda or found is None:
        return Step(title, None, "tests", "compute-sanitizer is not installed" if cuda else "no GPU")
    command = (found, "--tool", tool, "--error-exitcode", "86", "--print-limit", "20", *TESTS)
    chosen = ("tests/kernels/test_on_gpu.py", "-m", "gpu", "-k", "test_error_against_float64 and torch.float16")
    # Every tensor in an allocation of its own, so that reading past its end is seen.
    environment = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    return Step(title, (*command, *chosen), "tests", minutes=minutes, environment=environment)


def ceilings() -> Step:
    return Step("ceilings", (sys.executable, "-m", "bench.ceilings"), "json", minutes=3)


def training() -> Step:
    """Real runs of `farl.train`, which take whatever time they are given."""
    return Step("real training runs", (sys.executable, "-m", "bench.training"), "files")


POINTWISE = ("layer_norm", "activation", "patch_mask", "token_loss")
# One file each and the summary: eight files. Training takes a call of its own (two files and the summary).
DEFAULT = ("ceilings", "correctness", "attention", "pointwise", "contrastive", "step", "loader")
NAMES = (*DEFAULT, "training", *POINTWISE, "kernel_tests", "gpu_tests", "sanitizer")


def steps_of(name: str, cuda: bool, tests: tuple[str, ...] = ()) -> tuple[Step, ...]:
    """The commands of section `name`; ValueError for an unknown one."""
    if name not in NAMES:
        raise ValueError(f"there is no section {name!r}; there are {', '.join(NAMES)}")
    if name == "ceilings":
        return (ceilings(),)
    if name == "training":
        return (training(),)
    if name == "pointwise":
        return suite(*POINTWISE)
    if name == "step":
        return suite("step", "image_tower")
    if name == "loader":
        return suite("decoding", "loader", "end_to_end")
    checks = {
        "kernel_tests": (kernel_tests(cuda, tests),),
        "gpu_tests": (gpu_tests(cuda), step_tests(cuda)),
        "sanitizer": (sanitizer(cuda, "memcheck", 5), sanitizer(cuda, "racecheck", 5)),
        "correctness": (gpu_tests(cuda), step_tests(cuda), kernel_tests(cuda, tests), sanitizer(cuda, "memcheck", 3)),
    }
    return checks.get(name) or suite(name)
