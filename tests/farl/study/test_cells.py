from __future__ import annotations

from pathlib import Path

import pytest

from farl.study.cells import Queue, cells_of, identity_of, read_cells, write_json
from farl.study.plans import Plan


def test_every_cell_once_and_needs_before_it(tiny: Plan) -> None:
    cells = cells_of(tiny)
    keys = [cell.key for cell in cells]
    assert len(set(keys)) == len(keys) == 3 + 3 + 3 * 2 * 4 * 2
    for place, cell in enumerate(cells):
        assert set(cell.needs) <= set(keys[:place])
    by_key = {cell.key: cell for cell in cells}
    assert by_key["parsing-0.1-mim-seed1"].needs == ("check-parsing", "pretrain-mim")
    assert by_key["parsing-0.1-scratch-seed1"].needs == ("check-parsing",)


def test_queue_passes_over_cells_that_must_wait(one_task: Plan, tiny: Plan) -> None:
    queue = Queue(cells_of(tiny), set())
    first = [queue.take() for _ in range(6)]
    assert [cell.key for cell in first if cell] == [cell.key for cell in cells_of(tiny)[:6]]
    assert queue.take() is None
    check = next(cell for cell in first if cell and cell.key == "check-alignment")
    queue.finish(check)
    ready = queue.take()
    assert ready is not None
    assert ready.key == "alignment-0.1-scratch-seed0"
    trained = next(cell for cell in first if cell and cell.key == "pretrain-contrast")
    queue.finish(trained)
    ready = queue.take()
    assert ready is not None
    assert ready.key == "alignment-0.1-contrast-seed0"


def test_a_failure_fails_what_needs_it_and_nothing_else(tiny: Plan) -> None:
    cells = cells_of(tiny)
    queue = Queue(cells, set())
    while (cell := queue.take()) is not None:
        queue.finish(cell, failed=cell.key == "pretrain-mim")
    assert queue.waiting == []
    assert queue.failed == {cell.key for cell in cells if cell.arm == "mim"}
    assert queue.done == {cell.key for cell in cells if cell.arm != "mim"}


def test_done_cells_are_not_taken_again(tiny: Plan) -> None:
    cells = cells_of(tiny)
    queue = Queue(cells, {cell.key for cell in cells[:-1]})
    assert queue.take() == cells[-1]
    assert queue.take() is None


def test_foreign_and_broken_cells_are_refused(one_task: Plan, tmp_path: Path) -> None:
    cells = cells_of(one_task)
    write_json(tmp_path / "cells" / f"{cells[0].key}.json", {"identity": "mine", "kind": "check"})
    assert list(read_cells(tmp_path / "cells", cells, "mine")) == [cells[0].key]
    with pytest.raises(ValueError, match="belongs to another plan or other data: use another --run-dir"):
        read_cells(tmp_path / "cells", cells, "other")
    (tmp_path / "cells" / f"{cells[1].key}.json").write_text("{}")
    with pytest.raises(ValueError, match="is not the result of a cell"):
        read_cells(tmp_path / "cells", cells, "mine")


def test_identity_is_of_plan_and_data_but_not_of_indices(one_task: Plan, tiny: Plan, tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "a.tar").write_bytes(b"1234")
    first = identity_of(one_task, tmp_path)
    (tmp_path / "tasks" / "a.farl-index").write_bytes(b"made when it was opened")
    assert identity_of(one_task, tmp_path) == first
    assert identity_of(tiny, tmp_path) != first
    (tmp_path / "tasks" / "a.tar").write_bytes(b"12345")
    assert identity_of(one_task, tmp_path) != first
