"""Retrieval as a person sees it: captions with the images they find, images with the captions they find."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from farl.evaluation.captions import normalise_caption
from farl.report.style import FAINT, GREEN, INK, MUTED, frame, look, save


def spread_queries(captions: Sequence[str], count: int) -> list[int]:
    """Samples with different captions at about equal distances: never a choice by hand or by result."""
    candidates = list(_first_with(captions).values())
    count = min(count, len(candidates))
    return [candidates[(2 * k + 1) * len(candidates) // (2 * count)] for k in range(count)]


def _first_with(captions: Sequence[str]) -> dict[str, int]:
    """Each different caption, normalised, and the first sample that has it, ascending."""
    first: dict[str, int] = {}
    for i, caption in enumerate(captions):
        first.setdefault(normalise_caption(caption), i)
    return first


def draw_caption_queries(
    images: np.ndarray | Tensor,
    captions: Sequence[str],
    image_features: Tensor,
    text_features: Tensor,
    path: str | Path,
    *,
    queries: Sequence[int] | None = None,
    top: int = 5,
) -> Path:
    """A row a caption: the `top` images it finds, every image with that caption framed in green, and at the end the
    right image where none of them is.

    Args:
        images: uint8 [N, H, W, 3]; captions: N texts; image_features, text_features: [N, E] in any scale.
        queries: samples whose captions ask; None takes six at equal distances.
    """
    pixels, scores = _check(images, captions, image_features, text_features)
    queries = spread_queries(captions, 6) if queries is None else queries
    group = [normalise_caption(caption) for caption in captions]
    top = min(top, len(captions))
    with look():
        side, text_width, gap = 1.35, 3.3, 0.35
        width = text_width + (top + 1) * side + gap + 0.15
        height = len(queries) * side + 0.75
        figure = Figure(figsize=(width, height))
        figure.text(0.15 / width, 1 - 0.22 / height, "Caption", fontsize=12, fontweight="bold", va="center")
        figure.text(
            text_width / width,
            1 - 0.22 / height,
            f"finds, of {len(captions):,} images",
            fontsize=12,
            fontweight="bold",
            va="center",
        )
        for row, query in enumerate(queries):
            bottom = height - 0.45 - (row + 1) * side
            order = scores[:, query].argsort(descending=True, stable=True).tolist()
            right = [image for image in range(len(group)) if group[image] == group[query]]
            best = min(order.index(image) for image in right)
            figure.text(
                0.15 / width,
                (bottom + side / 2) / height,
                _wrapped(captions[query], 34, 5),
                fontsize=10,
                va="center",
                linespacing=1.35,
            )
            places = [(column, image) for column, image in enumerate(order[:top])]
            if best >= top:
                places.append((top, order[best]))
            for column, image in places:
                hit = group[image] == group[query]
                left = text_width + column * side + (gap if column == top else 0)
                axes = figure.add_axes(
                    (left / width, (bottom + 0.1) / height, (side - 0.14) / width, (side - 0.14) / height)
                )
                axes.imshow(pixels[image], interpolation="lanczos")
                frame(axes, GREEN if hit else FAINT, (2.0 if column == top else 3.5) if hit else 1.0)
                if column == top:
                    axes.text(
                        0.5, 0.06, f"rank {best + 1:,}", transform=axes.transAxes, ha="center", fontsize=8,
                        color="white", bbox={"boxstyle": "round,pad=0.25", "facecolor": INK, "edgecolor": "none"},
                    )  # fmt: skip
        figure.text(
            0.15 / width, 0.14 / height,
            "Green frame: the image has this caption. Set apart: the best of those, where none is among the first.",
            fontsize=8.5, color=MUTED, va="center",
        )  # fmt: skip
        return save(figure, path)


def draw_image_queries(
    images: np.ndarray | Tensor,
    captions: Sequence[str],
    image_features: Tensor,
    text_features: Tensor,
    path: str | Path,
    *,
    queries: Sequence[int] | None = None,
    top: int = 4,
) -> Path:
    """An image with the `top` captions it finds among the different ones, the right one in green; two images a row.

    Arguments as `draw_caption_queries`.
    """
    pixels, scores = _check(images, captions, image_features, text_features)
    queries = spread_queries(captions, 6) if queries is None else queries
    first = _first_with(captions)
    choices = list(first.values())
    with look():
        columns = 2 if len(queries) > 1 else 1
        rows = -(-len(queries) // columns)
        side, cell = 2.0, 6.9
        width, height = columns * cell, rows * side + 0.5
        figure = Figure(figsize=(width, height))
        figure.text(
            0.15 / width,
            1 - 0.22 / height,
            f"Image finds, of {len(choices):,} different captions",
            fontsize=12,
            fontweight="bold",
            va="center",
        )
        for number, query in enumerate(queries):
            left = (number % columns) * cell + 0.15
            bottom = height - 0.45 - (number // columns + 1) * side
            axes = figure.add_axes((left / width, (bottom + 0.1) / height, (side - 0.2) / width, (side - 0.2) / height))
            axes.imshow(pixels[query], interpolation="lanczos")
            frame(axes, FAINT, 1.0)
            order = scores[query, choices].argsort(descending=True, stable=True).tolist()
            ranked = [choices[i] for i in order]
            place = ranked.index(first[normalise_caption(captions[query])])
            shown = list(enumerate(ranked))[:top]
            if place >= len(shown):
                shown.append((place, ranked[place]))
            line = (side - 0.2) / (top + 1)
            for slot, (rank, choice) in enumerate(shown):
                hit = rank == place
                y = bottom + side - 0.1 - (slot + 0.5) * line
                if slot == top:
                    y -= 0.04
                color = GREEN if hit else (MUTED if slot else INK)
                figure.text(
                    (left + side + 0.22) / width, y / height, f"{rank + 1}.", fontsize=9, color=color, va="center",
                    ha="right", fontweight="bold" if hit else "normal",
                )  # fmt: skip
                figure.text(
                    (left + side + 0.29) / width, y / height, _wrapped(captions[choice], 62, 2), fontsize=9,
                    color=color, va="center",
                )  # fmt: skip
        return save(figure, path)


def _check(
    images: np.ndarray | Tensor, captions: Sequence[str], image_features: Tensor, text_features: Tensor
) -> tuple[np.ndarray, Tensor]:
    pixels = images.cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    if not len(pixels) == len(captions) == len(image_features) == len(text_features) or not len(pixels):
        raise ValueError(
            f"got {len(pixels)} images, {len(captions)} captions, {len(image_features)} image features and "
            f"{len(text_features)} text features; wanted as many of each, at least one"
        )
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
        raise ValueError(f"images are {pixels.dtype} {pixels.shape}; wanted uint8 [N, H, W, 3]")
    with torch.no_grad():
        scores = F.normalize(image_features.float().cpu(), dim=1) @ F.normalize(text_features.float().cpu(), dim=1).T
    return pixels, scores


def _wrapped(text: str, width: int, lines: int) -> str:
    """At most `lines` lines of at most `width` characters; control characters, which no font has, become spaces."""
    clean = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return "\n".join(textwrap.wrap(clean, width, max_lines=lines, placeholder=" …")) or "(empty)"
