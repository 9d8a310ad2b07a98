from __future__ import annotations

import errno
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from farl_engine.checkpoint import CheckpointError, CheckpointStore


def state_of(step: int, size: int = 1000) -> dict[str, object]:
    return {"step": step, "weights": torch.full((size,), float(step)), "nested": {"list": [1, 2.5, "three", None]}}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    assert store.latest() is None
    store.save(7, state_of(7))
    assert store.latest() == 7
    loaded = store.load()
    assert loaded["step"] == 7 and loaded["nested"] == {"list": [1, 2.5, "three", None]}
    assert torch.equal(loaded["weights"], torch.full((1000,), 7.0))


def test_old_ones_go(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    for step in range(1, 10):
        store.save(step, state_of(step))
    assert store.steps() == [8, 9]


def test_nothing_goes_when_all_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=0)
    for step in range(1, 6):
        store.save(step, state_of(step))
    assert store.steps() == [1, 2, 3, 4, 5]


def test_a_failed_removal_does_not_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    store.save(1, state_of(1))
    real = Path.unlink

    def refuse(self: Path, missing_ok: bool = False) -> None:
        if self.name.startswith("step-"):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        real(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    store.save(2, state_of(2))
    assert store.latest() == 2
    assert "could not be removed" in capsys.readouterr().out


def test_background_save_holds_the_values_of_the_call(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    state = state_of(3, size=2_000_000)
    store.save(3, state, background=True)
    state["weights"].fill_(-1.0)  # type: ignore[attr-defined]
    store.wait()
    assert torch.equal(store.load(3)["weights"], torch.full((2_000_000,), 3.0))


def test_full_disk_is_one_line_and_keeps_the_last_good_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, state_of(1))
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    real_open = Path.open

    def open_full(self: Path, *args, **kwargs):
        return real_open(full if self.name.startswith(".writing-00000002") else self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", open_full)
        with pytest.raises(
            CheckpointError, match=r"step 2 could not be written.*No space left.*step 1 is intact"
        ) as caught:
            store.save(2, state_of(2, size=1_000_000))
    assert "\n" not in str(caught.value)
    assert store.latest() == 1 and store.load()["step"] == 1


def test_error_of_a_background_write_is_raised_later(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    store = CheckpointStore(blocked / "checkpoints")
    store.save(1, state_of(1), background=True)
    with pytest.raises(CheckpointError, match="step 1 could not be written"):
        store.wait()


def test_a_background_write_never_fails_in_silence(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, {"step": lambda: None}, background=True)
    with pytest.raises(Exception, match="lambda"):
        store.wait()
    assert store.steps() == []


def test_no_code_is_run_from_a_file(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path}/exploded",)

    torch.save({"step": Bomb()}, tmp_path / "step-00000001.pt")
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        CheckpointStore(tmp_path).load()
    assert not (tmp_path / "exploded").exists()


def test_missing_step_names_those_there(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(5, state_of(5))
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 9.*there are: 5"):
        store.load(9)
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        CheckpointStore(tmp_path / "empty").load()


@pytest.mark.parametrize("content", ["", "12", "garbage"])
def test_a_wrong_latest_falls_back_to_the_files(tmp_path: Path, content: str) -> None:
    store = CheckpointStore(tmp_path)
    store.save(4, state_of(4))
    (tmp_path / "latest").write_text(content)
    assert store.latest() == 4


def _save_for_ever(directory: Path, first: int) -> None:
    torch.set_num_threads(1)
    store = CheckpointStore(directory, keep_last=2)
    for step in range(first, first + 100_000):
        store.save(step, state_of(step, size=200_000), background=step % 2 == 0)


def test_kill_at_fifty_moments_of_saving_leaves_a_latest_that_loads(tmp_path: Path) -> None:
    rng = random.Random(0)
    context = multiprocessing.get_context("fork")
    store = CheckpointStore(tmp_path)
    reached = 0
    for _ in range(50):
        child = context.Process(target=_save_for_ever, args=(tmp_path, reached + 1))
        child.start()
        time.sleep(rng.uniform(0.005, 0.08))
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        latest = store.latest()
        if latest is None:
            assert reached == 0
            continue
        assert latest >= reached
        loaded = store.load()
        assert loaded["step"] == latest
        assert torch.equal(loaded["weights"], torch.full((200_000,), float(latest)))
        reached = latest
    assert reached >= 5, "the children were killed before they saved anything"
    # What a kill left half-written is cleared by the next save.
    store.save(reached + 1, state_of(reached + 1))
    assert not list(tmp_path.glob(".writing-*"))
