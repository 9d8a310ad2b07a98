"""Labelled pictures from files: upright RGB images, and label maps whose values are class numbers."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
# What Pillow raises for damaged files.
_DAMAGE = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def list_images(folder: Path) -> list[Path]:
    """Image files of a folder, by name.

    Raises:
        ValueError: two differ in nothing but the extension, so that a label could belong to both.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in EXTENSIONS and not path.name.startswith("."):
            if path.stem in found:
                raise ValueError(f"{folder} holds {found[path.stem].name} and {path.name}: rename one of them")
            found[path.stem] = path
    return list(found.values())


def read_image(source: Path | bytes, name: str = "") -> NDArray[np.uint8]:
    """RGB [H, W, 3], turned upright as EXIF says; transparency is laid over white, 16-bit gray is scaled to 8 bits.

    Args:
        source: a file, or the bytes of one. name: what errors call it; the file's path by default.

    Raises:
        ValueError: not an image, or a damaged one. OSError: the file is not there or cannot be read.
    """
    image = ImageOps.exif_transpose(_load(source, name))
    if image.mode.startswith("I"):
        values = np.asarray(image, np.int64)
        gray = np.clip(values >> 8 if values.max(initial=0) > 255 else values, 0, 255).astype(np.uint8)
        return np.repeat(gray[..., None], 3, 2)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def read_mask(source: Path | bytes, name: str = "") -> NDArray[np.uint8]:
    """Class numbers [H, W]: the indices of a palette image, or the values of a gray one.

    Raises:
        ValueError: colours instead of class numbers, numbers above 255, or a damaged file. OSError: as `read_image`.
    """
    image = _load(source, name)
    if image.mode not in ("P", "L", "1") and not image.mode.startswith("I"):
        raise ValueError(
            f"{name or source} is a mask in colours ({image.mode}): save class numbers, as a palette or 8-bit gray PNG"
        )
    values = np.asarray(image)
    if values.max(initial=0) > 255:
        raise ValueError(f"{name or source} holds the value {values.max()}; class numbers go from 0 to 255")
    return values.astype(np.uint8)


def check_same_size(image: NDArray[np.uint8], mask: NDArray[np.uint8], name: str) -> None:
    """ValueError, with both sizes, where a mask does not lie on its image pixel by pixel."""
    if image.shape[:2] != mask.shape:
        (height, width), (rows, columns) = image.shape[:2], mask.shape
        raise ValueError(
            f"{name}: the image is {width} x {height} pixels (upright, as EXIF says) but its mask {columns} x {rows}; "
            "a mask has a class number for each pixel of its image"
        )


def check_present(files: Sequence[Path], hint: str = "") -> None:
    """ValueError, with the first one that is missing and `hint`, where not all are there.

    One look a folder; asking for each file takes minutes on a network disk.
    """
    there = {file for folder in {file.parent for file in files} if folder.is_dir() for file in folder.iterdir()}
    missing = [file for file in files if file not in there]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{missing[0]}{more} missing{hint}")


def real_paths(files: Sequence[Path]) -> list[str]:
    """Absolute paths; links among the folders are followed (one look a folder), links to single files are not."""
    folders = {folder: os.path.realpath(folder) for folder in {file.parent for file in files}}
    return [f"{folders[file.parent]}/{file.name}" for file in files]


def _load(source: Path | bytes, name: str) -> Image.Image:
    content = source if isinstance(source, bytes) else source.read_bytes()
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except UnidentifiedImageError:
        raise ValueError(f"{name or source} cannot be decoded: it is no image") from None
    except _DAMAGE as error:
        raise ValueError(f"{name or source} cannot be decoded: {error}") from None
    return image
