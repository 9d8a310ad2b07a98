"""The three layers import in one direction: farl -> farl_engine, farl -> farl_kernels, and nothing back."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"farl", "farl_engine", "farl_kernels"}
FOLDERS = {
    "farl": ROOT / "farl",
    "farl_engine": ROOT / "engine" / "farl_engine",
    "farl_kernels": ROOT / "kernels" / "farl_kernels",
}
MAY_IMPORT = {
    "farl": {"farl", "farl_engine", "farl_kernels"},
    "farl_engine": {"farl_engine"},
    "farl_kernels": {"farl_kernels"},
}
# What a project that takes the ops alone has to have; anything else must be imported inside a function, on request.
KERNELS_NEED = {"torch", "triton", "numpy"}


def imported_packages(source: str, *, top_level_only: bool) -> set[str]:
    tree = ast.parse(source)
    nodes = tree.body if top_level_only else ast.walk(tree)
    packages: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            packages |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            packages.add(node.module.partition(".")[0])
    return packages


@pytest.mark.parametrize("package", sorted(OURS))
def test_imports_go_one_way(package: str) -> None:
    files = sorted(FOLDERS[package].rglob("*.py"))
    assert len(files) > 5
    for file in files:
        against = (imported_packages(file.read_text(), top_level_only=False) & OURS) - MAY_IMPORT[package]
        assert not against, f"{file.relative_to(ROOT)} imports {', '.join(against)}"


def test_the_ops_need_torch_triton_and_numpy_alone() -> None:
    for file in sorted(FOLDERS["farl_kernels"].rglob("*.py")):
        packages = imported_packages(file.read_text(), top_level_only=True)
        foreign = packages - KERNELS_NEED - {"farl_kernels"} - set(sys.stdlib_module_names)
        assert not foreign, f"{file.relative_to(ROOT)} needs {', '.join(foreign)}"


def test_an_arrow_against_the_layers_is_seen() -> None:
    assert imported_packages("def f():\n    from farl.model import FaRL", top_level_only=False) == {"farl"}
    assert imported_packages("import farl_engine.stop as stop", top_level_only=True) == {"farl_engine"}


def test_a_command_starts_without_torch() -> None:
    """Signal handlers are installed before torch is imported, so nothing on the way there may import it."""
    code = "import sys, farl.train; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
