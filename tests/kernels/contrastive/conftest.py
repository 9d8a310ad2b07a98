from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def dense() -> ModuleType:
    """``dense.py``, which the processes of ``ranks.py`` import too."""
    spec = importlib.util.spec_from_file_location("contrastive_dense", Path(__file__).with_name("dense.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
