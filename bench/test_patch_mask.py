"""From a uint8 batch to the sequences of the trunk: patches, block masks, and the fork into clean and masked halves."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.contest import DTYPE, MODES, Contender, Cost, Problem, backend_of, compete, compiled, our_names, randn
from bench.timing import CUDA, DEVICE
from farl_kernels import mask_patches, patchify, sample_block_masks

BATCH = 256 if CUDA else 16
SIDE, PATCH, WIDTH, GRID, MASKED = 224, 16, 768, (14, 14), 75
PATCHES = GRID[0] * GRID[1]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def draw_images(g: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.randint(0, 256, (BATCH, SIDE, SIDE, 3), dtype=torch.uint8, generator=g, device=DEVICE),)


@functools.cache
def pixel_statistics(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # Made once: a copy from the host could not be captured in a graph.
    return torch.tensor(MEAN, device=DEVICE, dtype=dtype), torch.tensor(STD, device=DEVICE, dtype=dtype)


def eager_patchify(images: Tensor, dtype: torch.dtype = DTYPE) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    mean, std = pixel_statistics(wide)
    pixels = (images.to(wide) / 255 - mean) / std
    tiles = pixels.unflatten(2, (-1, PATCH)).unflatten(1, (-1, PATCH))
    return tiles.permute(0, 1, 3, 5, 2, 4).flatten(3).flatten(1, 2).to(dtype)


PATCHIFY = Problem(
    "patchify",
    f"uint8 {SIDE} px, patch {PATCH}, batch {BATCH}",
    draw_images,
    functools.partial(eager_patchify, dtype=torch.float64),
    Cost(forward_bytes=BATCH * SIDE * SIDE * 3 * (1 + DTYPE.itemsize)),
    wanted=(),
    tolerance=5e-3,
)
NAMES = [*our_names("triton", "reference"), "eager PyTorch", "torch.compile"]


@pytest.mark.parametrize("name", NAMES)
def test_patchify(benchmark: Any, name: str) -> None:
    def make() -> Contender:
        if name.startswith("farl_kernels"):
            settings = {"mean": MEAN, "std": STD, "dtype": DTYPE, "backend": backend_of(name)}
            return Contender(lambda images: patchify(images, PATCH, **settings), ours=True)
        pixel_statistics(torch.float32)
        return Contender(compiled(eager_patchify) if name == "torch.compile" else eager_patchify)

    compete(benchmark, PATCHIFY, name, make, "forward")


def draw_ids(g: torch.Generator) -> tuple[Tensor, ...]:
    return tuple(torch.randint(0, 1 << 30, (BATCH,), generator=g, device=DEVICE) for _ in range(2))


def sampled(backend: str | None, ids: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
    return sample_block_masks(ids, views, grid=GRID, max_masked=MASKED, seed=0, backend=backend)


SAMPLE = Problem(
    "sample_block_masks",
    f"14 x 14 patches, at most {MASKED}, batch {BATCH}",
    draw_ids,
    functools.partial(sampled, "reference"),
    Cost(forward_bytes=BATCH * (16 + PATCHES + 4 * MASKED)),
    wanted=(),
    tolerance=0.0,
)


@pytest.mark.parametrize("name", our_names("triton", "reference"))
def test_sample_block_masks(benchmark: Any, name: str) -> None:
    make = lambda: Contender(functools.partial(sampled, backend_of(name)), ours=True)
    compete(benchmark, SAMPLE, name, make, "forward")


def draw_fork(g: torch.Generator) -> tuple[Tensor, ...]:
    mask = torch.rand(BATCH, PATCHES, generator=g, device=DEVICE).argsort(1) < MASKED
    return (*randn((BATCH, PATCHES, WIDTH), (WIDTH,), (WIDTH,), (PATCHES + 1, WIDTH))(g), mask)


def eager_fork(x: Tensor, mask_token: Tensor, class_token: Tensor, position: Tensor, mask: Tensor) -> Tensor:
    masked = torch.where(mask[:, :, None], mask_token, x)
    patches = torch.cat([x, masked])
    return torch.cat([class_token.expand(len(patches), 1, -1), patches], dim=1) + position


def ours_fork(
    backend: str | None, x: Tensor, mask_token: Tensor, class_token: Tensor, position: Tensor, mask: Tensor
) -> Tensor:
    parameters = {"mask_token": mask_token, "class_token": class_token, "position_embedding": position}
    return mask_patches(x, mask, mode="fork", backend=backend, **parameters)


UNIT = BATCH * PATCHES * WIDTH * DTYPE.itemsize
FORK = Problem(
    "mask_patches, fork into clean and masked",
    f"{PATCHES} patches, width {WIDTH}, batch {BATCH}",
    draw_fork,
    eager_fork,
    Cost(forward_bytes=3 * UNIT, backward_bytes=3 * UNIT),
    wanted=(0, 1, 2, 3),
)
FORK_NAMES = [*our_names("triton", "torch"), "eager PyTorch", "torch.compile"]


@functools.lru_cache(maxsize=1)
def built_fork(name: str) -> Contender:
    if name.startswith("farl_kernels"):
        return Contender(functools.partial(ours_fork, backend_of(name)), ours=True)
    return Contender(compiled(eager_fork) if name == "torch.compile" else eager_fork)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FORK_NAMES)
def test_mask_patches(benchmark: Any, name: str, mode: str) -> None:
    compete(benchmark, FORK, name, functools.partial(built_fork, name), mode)
