"""A moment after which no further benchmark or test starts, so that what came before is still written.

As a plugin of pytest (``-p bench.deadline``) it skips the tests that are left.
"""

from __future__ import annotations

import os
import time

import pytest

VARIABLE = "FARL_BENCH_DEADLINE"


def out_of_time() -> bool:
    """Whether the moment (seconds since 1970) in the environment variable has passed; never without one."""
    return time.time() > float(os.environ.get(VARIABLE, "inf"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if out_of_time():
        pytest.skip("out of time")
