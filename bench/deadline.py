"""A moment after which no further benchmark starts, so that what was measured is still written."""

from __future__ import annotations

import os
import time

VARIABLE = "FARL_BENCH_DEADLINE"


def out_of_time() -> bool:
    """Whether the moment (seconds since 1970) in the environment variable has passed; never without one."""
    return time.time() > float(os.environ.get(VARIABLE, "inf"))
