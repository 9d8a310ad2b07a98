"""A plan in its run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from farl.study.plans import Plan


@dataclass(frozen=True)
class Study:
    """A plan in its run folder. `identity`: see `identity_of`; results of another one are refused."""

    plan: Plan
    run_dir: Path
    identity: str

    @property
    def data(self) -> Path:
        return self.run_dir / "data"

    @property
    def results(self) -> Path:
        return self.run_dir / "cells"

    @property
    def logs(self) -> Path:
        return self.run_dir / "logs"

    def pretrained(self, arm: str) -> Path:
        return self.run_dir / "pretrain" / arm
