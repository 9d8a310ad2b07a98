"""What real runs send over gloo in each step is, call by call and byte by byte, what `farl.scaling` says."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from farl.model import MODELS
from farl.scaling import step_collectives

# Runs the command and writes down every collective call of a step. torch's process groups hand their calls to the
# dispatcher, those that DDP makes in C++ as well, so a mode there sees all that goes to gloo; an op that it does not
# know fails.
COUNTED = """
import json, os, sys
from torch.utils._python_dispatch import TorchDispatchMode
import farl.step, farl.train
from farl import cli

def handed_over(name, args):
    if name in ("allreduce_", "broadcast_", "allgather_", "gather_", "barrier"):
        tensors = args[1] if name in ("allgather_", "gather_") else args[0]
        return sum(tensor.nbytes for tensor in tensors) if isinstance(tensors, list) else tensors.nbytes
    if name in ("_allgather_base_", "alltoall_base_", "_reduce_scatter_base_"):
        return args[1].nbytes
    raise NotImplementedError(name)

class Calls(TorchDispatchMode):
    steps = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "c10d":
            name = op.name().removeprefix("c10d::")
            if self.steps:
                self.steps[-1].append([name, handed_over(name, args)])
        return op(*args, **(kwargs or {}))

inner = farl.step.TrainStep.__call__

def counted(self, batch):
    Calls.steps.append([])
    return inner(self, batch)

farl.step.TrainStep.__call__ = counted
try:
    with Calls():
        cli.run(farl.train.main, "farl.train")
finally:
    folder = sys.argv[sys.argv.index("--run-dir") + 1]
    with open(f"{folder}/calls-{os.environ.get('RANK', '0')}.json", "w") as file:
        json.dump(Calls.steps, file)
"""

# On gloo a reduce-scatter is an all_to_all with the sum in rank order: the same bytes.
ON_GLOO = {
    "all_reduce": "allreduce_",
    "all_gather": "_allgather_base_",
    "all_to_all": "alltoall_base_",
    "reduce_scatter": "alltoall_base_",
}
GLOBAL_BATCH = 24


@pytest.fixture
def calls_of(
    tmp_path: Path, train_command: Callable[..., list[str]], environment: dict[str, str]
) -> Callable[..., list[list[list[tuple[str, int]]]]]:
    """For each rank the (op, bytes) of the first five steps of six, each until the next one starts."""

    def run(processes: int, *options: str) -> list[list[list[tuple[str, int]]]]:
        script, run_dir = tmp_path / "counted.py", tmp_path / "run"
        script.write_text(COUNTED)
        # Left before the end, it draws no report.
        command = train_command(run_dir, "--stop-at", "6", "--log-every", "2", *options, script=script)
        # What torchrun would tell them, without the time that it takes to start.
        place = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        started = [
            subprocess.Popen(
                command,
                env={**environment, **place, "RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(processes)
        ]
        said = [process.communicate()[0] for process in started]
        assert [process.returncode for process in started] == [0] * processes, said
        ranks = [json.loads((run_dir / f"calls-{rank}.json").read_text()) for rank in range(processes)]
        assert all(len(steps) == 6 for steps in ranks)
        return [[[(name, size) for name, size in step] for step in steps[:5]] for steps in ranks]

    return run


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def expected(processes: int, model: str = "farl-micro", *, mim: bool = True, **options: Any) -> list[tuple[str, int]]:
    sizes = MODELS[model] if mim else replace(MODELS[model], mim=None)
    options.setdefault("feature_bytes", 4)
    calls = step_collectives(sizes, world=processes, pairs=GLOBAL_BATCH // processes, **options)
    # FSDP asks gloo for its reduce-scatter.
    own = {("gradients", "reduce_scatter"): "_reduce_scatter_base_"}
    return [(own.get((call.what, call.kind), ON_GLOO[call.kind]), call.bytes) for call in calls]


@pytest.mark.parametrize("processes", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4, 8))])
def test_each_call_of_a_step_is_the_models(processes: int, calls_of: Callable[..., Any]) -> None:
    want = expected(processes)
    for first, second, *steady in calls_of(processes):
        # The third and the fifth step write no line of the log, the fourth does.
        assert steady == [want] * 3
        # DDP's first step has one bucket; it agrees on the others before the second.
        assert sum(size for _, size in first) == sum(size for _, size in want)
        assert [call for call in second if call[0] != "broadcast_"] == want
    assert (want == []) == (processes == 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        pytest.param(["--model", "farl-tiny"], {"model": "farl-tiny"}, id="several full buckets"),
        pytest.param(["--precision", "bf16"], {"feature_bytes": 2}, id="bf16"),
        pytest.param(["--micro-batch", "5"], {}, id="micro-batches"),
        pytest.param(["--mim-weight", "0"], {"mim": False}, id="contrast alone"),
        pytest.param(["--contrastive-weight", "0"], {"contrast": False}, id="masked branch alone"),
    ],
)
def test_so_is_that_of_other_settings(options: list[str], sizes: dict[str, Any], calls_of: Callable[..., Any]) -> None:
    for _, _, *steady in calls_of(2, *options):
        assert steady == [expected(2, **sizes)] * 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "options", "sizes"),
    [
        pytest.param(2, ["--model", "farl-tiny"], {"model": "farl-tiny"}, id="2"),
        pytest.param(3, [], {}, id="3"),
        pytest.param(2, ["--save-memory", "shard,recompute"], {}, id="computed again"),
        pytest.param(2, ["--mim-weight", "0"], {"mim": False}, id="contrast alone"),
        pytest.param(2, ["--contrastive-weight", "0"], {"contrast": False}, id="masked branch alone"),
    ],
)
def test_so_is_each_call_of_a_sharded_step(
    processes: int, options: list[str], sizes: dict[str, Any], calls_of: Callable[..., Any]
) -> None:
    """From the first step on, in an order of FSDP's own."""
    want = sorted(expected(processes, sharded=True, **sizes))
    for steps in calls_of(processes, "--save-memory", "shard", *options):
        assert [sorted(step) for step in steps] == [want] * 5
