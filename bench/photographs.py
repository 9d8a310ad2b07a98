"""Shards of photographs to load: made ones with the statistics of photographs, and real ones where there are some."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from farl_engine.data import write_shards

# Several, so that peers which split shards over their workers have some for each.
SHARDS = 4


@dataclass(frozen=True)
class PhotographSet:
    """Photographs of about one size.

    Args:
        name: for the results. count: how many. size: width, height of made ones; None for real ones.
        folder: of real ones, below FARL_DATA.
    """

    name: str
    count: int
    size: tuple[int, int] | None = None
    folder: str = ""

    def shards(self, folder: Path) -> list[Path]:
        """Writes it as shards; ValueError where real ones are wanted and absent."""
        images = self._made() if self.size is not None else self._real()
        samples = [
            {"key": f"{i:06d}", "image": image, "caption": f"photograph number {i}"} for i, image in enumerate(images)
        ]
        return write_shards(samples, folder / "photographs-%03d.tar", samples_per_shard=-(-len(samples) // SHARDS))

    def _made(self) -> Iterator[bytes]:
        assert self.size is not None
        rng = np.random.default_rng(0)
        for _ in range(self.count):
            buffer = io.BytesIO()
            made_photograph(rng, *self.size).save(buffer, "JPEG", quality=90)
            yield buffer.getvalue()

    def _real(self) -> Iterator[bytes]:
        root = os.environ.get("FARL_DATA")
        files = sorted(Path(root, self.folder).glob("*.jpg")) if root else []
        if not files:
            raise ValueError("no real photographs: FARL_DATA is not set or lacks them")
        return (file.read_bytes() for file in files[: self.count])


SETS = (
    PhotographSet("made, 250 x 250", 256, (250, 250)),
    PhotographSet("made, 500 x 400", 192, (500, 400)),
    PhotographSet("made, 1000 x 750", 128, (1000, 750)),
    PhotographSet("real, 250 x 250", 256, folder="faces/images"),
    PhotographSet("real, about 430 x 512", 202, folder="parsing/images"),
)


def made_photograph(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Leaves that cover each other, slightly out of focus, over 1/f texture.

    Such pictures have the power spectrum and the edges of photographs (A. Lee, D. Mumford, J. Huang, "Occlusion models
    for natural images", 2001). JPEGs of quality 90 have 1.0 to 1.5 bits a pixel, as real ones of these sizes.
    """
    side = max(width, height)
    picture = Image.new("RGB", (width, height), tuple(rng.integers(40, 220, 3).tolist()))
    brush = ImageDraw.Draw(picture)
    count, smallest, largest = round(0.35 * side), 0.012, 0.35
    # The law of sizes is r^-3.
    radii = side * smallest / np.sqrt(1 - rng.random(count) * (1 - (smallest / largest) ** 2))
    for radius in radii:
        x, y, tall = rng.random() * width, rng.random() * height, radius * rng.uniform(0.5, 1.5)
        color = np.clip(rng.normal(120, 50) + rng.normal(0, 18, 3), 0, 255).astype(int)
        brush.ellipse((x - radius, y - tall, x + radius, y + tall), fill=tuple(color.tolist()))
    pixels = np.asarray(picture.filter(ImageFilter.GaussianBlur(0.8))).astype(np.float32)
    cells, strength = 4, 20.0
    while cells < side:
        coarse = rng.standard_normal((max(2, height * cells // side), max(2, width * cells // side))).astype(np.float32)
        layer = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        pixels += strength * np.asarray(layer)[..., None]
        cells, strength = 2 * cells, strength / 2
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
