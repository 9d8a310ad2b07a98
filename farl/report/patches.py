"""What the masked branch sees and says: image, masked image, the tokens asked for, the tokens predicted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from farl.report.style import FAINT, GREEN, MUTED, RED, frame, look, save

_HIDDEN = np.array([226, 228, 234], dtype=np.uint8)


def draw_masked_patches(
    images: np.ndarray | Tensor,
    mask: Tensor,
    targets: Tensor,
    predictions: Tensor,
    path: str | Path,
    *,
    grid: tuple[int, int],
    decode: Callable[[Tensor], Tensor | np.ndarray] | None = None,
) -> Path:
    """Draw a row an image: itself | masked | its visual tokens | those predicted for masked patches | right or wrong.

    Args:
        images: uint8 [n, H, W, 3].
        mask: bool [n, P], True = masked; P = rows * columns of `grid`.
        targets: int64 [n, P], the visual tokens of the whole image.
        predictions: int64 [n, P]; only those at masked patches are looked at.
        decode: tokens int64 [n, P] -> uint8 [n, h, w, 3]; without it (as with the dVAE encoder, which has no decoder
            here) the two columns of decoded tokens are left out.

    Raises:
        ValueError: shapes that do not fit together.
    """
    pixels = images.cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    mask, targets, predictions = mask.cpu(), targets.cpu(), predictions.cpu()
    wanted = (len(pixels), grid[0] * grid[1])
    if not tuple(mask.shape) == tuple(targets.shape) == tuple(predictions.shape) == wanted or not len(pixels):
        raise ValueError(
            f"mask {tuple(mask.shape)}, targets {tuple(targets.shape)} and predictions {tuple(predictions.shape)} must "
            f"all be {wanted}: {len(pixels)} images of {grid[0]} x {grid[1]} patches, at least one image"
        )
    right = (targets == predictions) & mask
    cells = _to_pixels(mask, grid, pixels.shape[1:3])
    columns: list[tuple[str, np.ndarray]] = [
        ("image", pixels),
        ("masked", np.where(cells[..., None], _HIDDEN, pixels)),
    ]
    if decode is not None:
        asked = _resized(decode(targets), pixels.shape[1:3])
        guessed = _resized(decode(torch.where(mask, predictions, targets)), pixels.shape[1:3])
        columns.append(("its visual tokens", asked))
        columns.append(("predicted tokens,\nmasked patches", np.where(cells[..., None], guessed, pixels)))
    columns.append(("right and wrong\npredictions", _faded(pixels)))

    with look():
        side, header, gap = 1.75, 0.62, 0.12
        width = len(columns) * side + gap
        height = len(pixels) * (side + 0.12) + header + 0.1
        figure = Figure(figsize=(width, height))
        for column, (title, _) in enumerate(columns):
            figure.text(
                (gap + column * side + (side - gap) / 2) / width, 1 - header / 2 / height, title, ha="center",
                va="center", fontsize=10, fontweight="bold", linespacing=1.25,
            )  # fmt: skip
        for row in range(len(pixels)):
            bottom = height - header - (row + 1) * (side + 0.12) + 0.24
            for column, (_, pictures) in enumerate(columns):
                axes = figure.add_axes(
                    ((gap + column * side) / width, bottom / height, (side - gap) / width, (side - gap) / height)
                )
                axes.imshow(pictures[row], interpolation="nearest", extent=(0, grid[1], grid[0], 0))
                frame(axes, FAINT, 1.0)
            _mark(axes, mask[row], right[row], grid)
            masked = int(mask[row].sum())
            axes.set_xlabel(f"{int(right[row].sum())} of {masked} right", fontsize=8.5, color=MUTED, labelpad=2)
        return save(figure, path)


def _mark(axes: Axes, mask: Tensor, right: Tensor, grid: tuple[int, int]) -> None:
    overlay = np.zeros((*grid, 4), dtype=np.float32)
    hidden, hit = mask.view(grid).numpy(), right.view(grid).numpy()
    overlay[hidden & hit] = (*_rgb(GREEN), 0.8)
    overlay[hidden & ~hit] = (*_rgb(RED), 0.55)
    axes.imshow(overlay, interpolation="nearest", extent=(0, grid[1], grid[0], 0))


def _to_pixels(mask: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """bool [n, P] -> bool [n, H, W]."""
    rows = np.arange(size[0]) * grid[0] // size[0]
    columns = np.arange(size[1]) * grid[1] // size[1]
    return mask.view(-1, *grid).numpy()[:, rows[:, None], columns[None, :]]


def _resized(images: Tensor | np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [n, h, w, 3] -> uint8 [n, *size, 3], by the nearest pixel."""
    pixels = images.cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    rows = np.arange(size[0]) * pixels.shape[1] // size[0]
    columns = np.arange(size[1]) * pixels.shape[2] // size[1]
    return pixels[:, rows[:, None], columns[None, :]]


def _faded(pixels: np.ndarray) -> np.ndarray:
    gray = pixels.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    return np.repeat((128 + gray / 2).astype(np.uint8)[..., None], 3, axis=-1)


def _rgb(color: str) -> tuple[float, float, float]:
    return int(color[1:3], 16) / 255, int(color[3:5], 16) / 255, int(color[5:7], 16) / 255
