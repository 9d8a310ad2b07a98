"""`python -m farl.report RUN_DIR`: redraw curves and page of a run from its log, without its model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from farl import cli


@dataclass(frozen=True)
class ReportOptions:
    run_dir: Annotated[Positional[str], arg(metavar="RUN_DIR")]
    """Folder of the run, with its metrics.jsonl."""


def main(argv: list[str] | None = None) -> int:
    options = cli.parse(
        ReportOptions, argv, prog="farl.report", description="Redraws the curves and the page of a run from its log."
    )
    run_dir = Path(options.run_dir)
    if not (run_dir / "metrics.jsonl").is_file():
        raise ValueError(f"{run_dir} has no metrics.jsonl: give the --run-dir of a training run")
    from farl.report.run import write_report

    print(write_report(run_dir))
    return 0


if __name__ == "__main__":
    cli.run(main, "farl.report")
