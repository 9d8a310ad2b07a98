"""The Python blocks of kernels/README.md run, and what is said to be printed is printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[3] / "kernels" / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_block_runs(index) -> None:
    exec(compile(BLOCKS[index], f"README.md, block {index}", "exec"), {"__name__": "readme"})


def test_report_is_as_printed(capsys) -> None:
    exec(BLOCKS[0], {"__name__": "readme"})
    assert f"```\n{capsys.readouterr().out}```" in README.read_text()


def test_ops_in_the_table_exist() -> None:
    import inspect

    import farl_kernels

    rows = [line.split("|")[1] for line in README.read_text().splitlines() if line.startswith("| `")]
    signatures = re.findall(r"`(\w+)\(([^)]*)\)`", " ".join(rows))
    assert len(signatures) == 12
    for name, arguments in signatures:
        want = re.findall(r"\w+", arguments)
        have = list(inspect.signature(getattr(farl_kernels, name)).parameters)
        assert [x for x in have if x in want] == want, name
        assert "..." in arguments or set(have) == {*want, "backend"}, name
