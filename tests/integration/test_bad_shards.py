"""Broken shards: the run goes on and counts, or stops and names the worst."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    header = tarfile.TarInfo(name)
    header.size = len(content)
    tar.addfile(header, io.BytesIO(content))


@pytest.fixture
def broken_shards(shards: str, tmp_path: Path) -> str:
    """The good shards, one of them cut short, and one shard of faults."""
    folder = tmp_path / "broken"
    folder.mkdir()
    good = sorted(Path(shards).parent.glob("*.tar"))
    for shard in good[:2]:
        (folder / shard.name).write_bytes(shard.read_bytes())
    cut = good[2].read_bytes()
    (folder / good[2].name).write_bytes(cut[: len(cut) * 2 // 3])
    with tarfile.open(good[0]) as source:
        member = next(member for member in source if member.name.endswith(".jpg"))
        extracted = source.extractfile(member)
        assert extracted is not None
        image = extracted.read()
    with tarfile.open(folder / "faults.tar", "w") as tar:
        add(tar, "html.jpg", b"<!DOCTYPE html><html><body>404 Not Found</body></html>")
        add(tar, "html.txt", b"a page instead of a photograph")
        add(tar, "half.jpg", image[: len(image) // 2])
        add(tar, "half.txt", b"half a photograph")
        add(tar, "empty.jpg", b"")
        add(tar, "empty.txt", b"no byte at all")
        add(tar, "nocaption.jpg", image)
        add(tar, "blank.jpg", image)
        add(tar, "blank.txt", b"  \n")
        add(tar, "latin.jpg", image)
        add(tar, "latin.txt", "a café at noon".encode("latin-1"))
        add(tar, "twice.jpg", image)
        add(tar, "twice.txt", b"the first of two")
        add(tar, "twice.jpg", image)
        add(tar, "twice.txt", b"the second of two")
    (folder / "zero.tar").write_bytes(b"")
    return str(folder / "*.tar")


def test_the_run_goes_on_and_counts_by_cause(
    broken_shards: str,
    tmp_path: Path,
    run_train: Callable[..., Any],
    read_log: Callable[[Path], list[dict[str, Any]]],
) -> None:
    run_dir = tmp_path / "run"
    done = run_train(run_dir, "--data", broken_shards, "--max-bad-fraction", "0.3")
    lines = read_log(run_dir)
    assert [line["step"] for line in lines] == list(range(1, 21))
    # html, half, empty and blank come by three times in 20 x 24 samples of an epoch of about 145.
    assert 6 <= lines[-1]["bad_samples"] <= 16
    for cause in ("missing_caption", "duplicate_key", "truncated_shard"):
        assert cause in done.stdout, done.stdout
    assert "not_an_image" in done.stdout + done.stderr


def test_too_many_bad_samples_stop_the_run_and_name_the_worst_shard(
    broken_shards: str, tmp_path: Path, run_train: Callable[..., Any]
) -> None:
    run_dir = tmp_path / "run"
    done = run_train(run_dir, "--data", broken_shards, "--max-bad-fraction", "0", check=False)
    assert done.returncode == 1
    error = [line for line in done.stderr.splitlines() if line.startswith("farl.train:")]
    assert len(error) == 1 and "worst shard" in error[0] and "max_bad_fraction" in error[0], done.stderr


def test_broken_images_alone_stop_the_run_with_its_state_saved(
    shards: str, tmp_path: Path, run_train: Callable[..., Any]
) -> None:
    """The index cannot see these: every second image of a shard is a web page."""
    folder = tmp_path / "pages"
    folder.mkdir()
    good = sorted(Path(shards).parent.glob("*.tar"))[0]
    with tarfile.open(good) as source, tarfile.open(folder / "pages.tar", "w") as tar:
        for number, member in enumerate(source):
            extracted = source.extractfile(member)
            assert extracted is not None
            page = number % 4 == 0 and member.name.endswith(".jpg")
            add(tar, member.name, b"<html>gone</html>" if page else extracted.read())
    run_dir = tmp_path / "run"
    done = run_train(run_dir, "--data", str(folder / "pages.tar"), check=False)
    assert done.returncode == 1
    error = [line for line in done.stderr.splitlines() if line.startswith("farl.train:")]
    assert len(error) == 1 and "pages.tar" in error[0] and "not_an_image" in error[0], done.stderr
    assert list((run_dir / "checkpoints").glob("step-*.pt"))
