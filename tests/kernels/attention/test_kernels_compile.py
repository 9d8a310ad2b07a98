"""The attention kernels compile whatever optional arguments are given, which the interpreter does not tell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("amount", ["some", pytest.param("everything", marks=pytest.mark.slow)])
def test_optional_arguments(amount: str) -> None:
    # In a process of its own: under TRITON_INTERPRET nothing can be compiled.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run([sys.executable, str(script), amount], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
