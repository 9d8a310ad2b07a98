"""Made-up shards: images by Pillow, tars by the standard library, faults by hand."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Members = Iterable[tuple[str, bytes]]


def encode(image: Image.Image, format: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colour, different for each seed, with no symmetry."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def write_tar(path: Path, members: Members, format: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., list[Path]]:
    """make_shards([3, 5, 2]) writes that many ordinary samples into three shards."""

    def make(sizes: list[int], side: int = 40, name: str = "train") -> list[Path]:
        paths, number = [], 0
        for shard, size in enumerate(sizes):
            members = []
            for _ in range(size):
                members.append((f"{number:06d}.jpg", encode(picture(side, side + 8, number))))
                members.append((f"{number:06d}.txt", f"caption {number}".encode()))
                number += 1
            paths.append(write_tar(tmp_path / f"{name}-{shard:04d}.tar", members))
        return paths

    return make


@pytest.fixture
def tools() -> tuple[Callable[..., bytes], Callable[..., Image.Image], Callable[..., Path]]:
    """The helpers above for tests to use: encode, picture, write_tar."""
    return encode, picture, write_tar
