"""What the ahead-of-time gate compiles and the tuner measures of the contrastive kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from farl_kernels.cases import Case
from farl_kernels.contrastive import launchers
from farl_kernels.contrastive.options import Options
from farl_kernels.contrastive.reference import AxisTerms, Tile
from farl_kernels.tables import Config

DIM = 512
# A rank's images and everybody's texts: one GPU of eight at 32,768, and FaRL's own 640 of 5,120.
SIZES = {
    "half": (4096, 32768),
    "half_more": (4096, 32768),
    "half_small": (640, 5120),
    "tf32": (2048, 8192),
    "tf32_more": (2048, 8192),
    "ieee": (1024, 4096),
}
PRECISIONS = {"half": None, "half_more": None, "half_small": None, "tf32": "tf32", "tf32_more": "tf32", "ieee": "fp32"}
VARIANTS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "metrics": {"metrics": True},
    "several": {"duplicates": "multi_positive", "metrics": True},
    "mask": {"duplicates": "mask", "label_smoothing": 0.1},
    "sigmoid": {"kind": "sigmoid"},
    "sigmoid several": {"kind": "sigmoid", "duplicates": "multi_positive", "metrics": True},
    "deterministic": {"deterministic": True},
    "deterministic several": {"deterministic": True, "duplicates": "multi_positive", "metrics": True},
}
PLAIN = ("softmax",)
MORE = ("metrics", "several", "mask", "sigmoid", "sigmoid several")


def _tile(device: torch.device, bucket: str, rows: int, columns: int, settings: dict[str, Any]) -> Tile:
    half = bucket.startswith("half")
    dtype = torch.bfloat16 if half else torch.float32
    options = Options(precision=PRECISIONS[bucket], **settings)
    image, text = (
        torch.nn.functional.normalize(torch.randn(k, DIM, device=device), dim=1).to(dtype) for k in (rows, columns)
    )
    bias = None if options.softmax else torch.full((), -10.0, device=device)
    ids = torch.arange(columns, device=device) // 2 if options.compares_ids else None
    own = None if ids is None else ids[:rows]
    return Tile(image, text, 0, torch.full((), 50.0, device=device), bias, own, ids, options)


def _terms(tile: Tile) -> tuple[AxisTerms, AxisTerms]:
    def axis(count: int) -> AxisTerms:
        def vector(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.full((count,), value, dtype=dtype, device=tile.rows.device)

        options = tile.options
        lse = vector(30.0, torch.float64) if options.softmax else None
        return AxisTerms(vector(0.5 / count), lse, vector(0.1 / count) if options.sums_same else None)

    return axis(len(tile.rows)), axis(len(tile.columns))


def _statistics(bucket: str, variants: Sequence[str]) -> Callable[[torch.device], Callable[[], Any]]:
    def prepare(device: torch.device) -> Callable[[], Any]:
        tiles = [_tile(device, bucket, *SIZES[bucket], VARIANTS[name]) for name in variants]

        def run() -> Any:
            found = []
            for tile in tiles:
                both_axes = tile.options.softmax or tile.options.metrics
                found.append(launchers.statistics(tile, with_columns=both_axes and not tile.options.deterministic))
            return found

        return run

    return prepare


def _gradients(bucket: str, variants: Sequence[str]) -> Callable[[torch.device], Callable[[], Any]]:
    def prepare(device: torch.device) -> Callable[[], Any]:
        tiles = [_tile(device, bucket, *SIZES[bucket], VARIANTS[name]) for name in variants]
        terms = [_terms(tile) for tile in tiles]

        def run() -> Any:
            return [
                launchers.gradients(
                    tile, row, column, need_rows=True, need_columns=not tile.options.deterministic, need_scalars=True
                )
                for tile, (row, column) in zip(tiles, terms, strict=True)
            ]

        return run

    return prepare


def _pairs(device: torch.device) -> Callable[[], Any]:
    tile = _tile(device, "half", 32768, 32768, {})
    lse = torch.full((32768,), 3.0, dtype=torch.float64, device=device)
    return lambda: launchers.pairs(tile.rows, tile.columns, tile.scale, None, lse, lse)


def _finish(device: torch.device) -> Callable[[], Any]:
    tile = _tile(device, "half", 32768, 32768, {})
    gradient, pull = torch.ones(32768, DIM, device=device), torch.ones(32768, device=device)
    return lambda: launchers.finish(gradient, pull, tile.columns, tile.scale)


def _tiles(bucket: str) -> tuple[Config, ...]:
    if bucket == "ieee":
        shapes = [(64, 64, 16, 4, 3), (128, 64, 16, 8, 3), (64, 64, 32, 4, 2), (128, 128, 16, 8, 2)]
    elif bucket.startswith("tf32"):
        shapes = [(128, 128, 32, 8, 3), (128, 128, 32, 4, 3), (128, 64, 32, 4, 4), (64, 128, 32, 4, 4)]
    else:
        shapes = [
            *((128, 128, k, warps, stages) for k in (32, 64) for warps in (4, 8) for stages in (2, 3, 4)),
            *((128, 256, k, 8, stages) for k in (32, 64) for stages in (3, 4)),
            *((64, 128, k, 4, stages) for k in (32, 64) for stages in (3, 4)),
            *((64, 256, 64, 4, stages) for stages in (2, 3)),
        ]
    return tuple(_config(*shape) | {"GROUP": 8} for shape in shapes)


def _config(m: int, n: int, k: int, warps: int, stages: int) -> Config:
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}


def cases() -> list[Case]:
    """Every entry of the tables, with the variants that it serves."""
    rows = tuple(
        {"BLOCK_M": m, "BLOCK_D": d, "num_warps": 4, "num_stages": 1} for m in (4, 8, 16) for d in (128, 256, 512)
    )
    found = [Case("contrastive", "pairs", "any", _pairs, rows), Case("contrastive", "finish", "any", _finish, rows)]
    for bucket in SIZES:
        variants = MORE if bucket.endswith("_more") else PLAIN if bucket in ("half", "tf32") else (*PLAIN, *MORE)
        tensor_cores = {"hgmma": bucket != "ieee", "streams": True}
        for kernel, prepare in (("statistics", _statistics), ("strip", _gradients)):
            found.append(Case("contrastive", kernel, bucket, prepare(bucket, variants), _tiles(bucket), **tensor_cores))
        if bucket in ("half", "tf32", "ieee"):
            product = tuple({k: v for k, v in config.items() if k != "GROUP"} for config in _tiles(bucket))
            prepare_product = _gradients(bucket, ("deterministic", "deterministic several"))
            found.append(Case("contrastive", "product", bucket, prepare_product, product, **tensor_cores))
    return found
