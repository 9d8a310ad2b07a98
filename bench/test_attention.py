"""Attention of image towers (197 to 1025 tokens), of packed captions, and of one query a sequence.

Peers get q, k and v apart in the layout that suits them; ours start from the packed output of the qkv projection and
write its packed gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from bench import attention_peers as peers
from bench.contest import DTYPE, MODES, Contender, Cost, Problem, backend_of, compete, our_names, randn
from bench.timing import CUDA, DEVICE
from farl_kernels import masked_attention_packed, single_query_attention

# batch, tokens, heads, head dim
IMAGES = {
    "ViT-B/16, 197 tokens, 12 x 64": (256 if CUDA else 2, 197, 12, 64),
    "ViT-L/14, 257 tokens, 16 x 64": (128, 257, 16, 64),
    "448 px, 785 tokens, 12 x 64": (64, 785, 12, 64),
    "512 px, 1025 tokens, 12 x 64": (32, 1025, 12, 64),
    "tiny, 65 tokens, 2 x 64": (1024 if CUDA else 16, 65, 2, 64),
}
# captions, heads, head dim
CAPTIONS = {"CLIP text, 8 x 64": (320 if CUDA else 16, 8, 64), "tiny text, 2 x 64": (1024 if CUDA else 64, 2, 64)}
ON_CPU = ("ViT-B/16, 197 tokens, 12 x 64", "tiny, 65 tokens, 2 x 64", *CAPTIONS)
FLASH, CUDNN, EFFICIENT = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
ITEM = DTYPE.itemsize


def shapes(all_of: dict[str, Any]) -> list[str]:
    return [name for name in all_of if CUDA or name in ON_CPU]


@functools.cache
def packing_of(shape: str) -> peers.Packing:
    """Captions of 8 to 26 tokens, 17 on average."""
    lengths = torch.randint(8, 27, (CAPTIONS[shape][0],), generator=torch.Generator().manual_seed(0))
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return peers.Packing(ends.to(DEVICE, torch.int32), tuple(ends.tolist()))


def cost(pairs: float, tokens: int, heads: int, dim: int) -> Cost:
    """Of `pairs` of query and key a head: two products forward, five backward; qkv in, output (dqkv and do) out."""
    unit = tokens * heads * dim * ITEM
    return Cost(4 * pairs * heads * dim, 10 * pairs * heads * dim, 4 * unit, 7 * unit)


@functools.lru_cache(maxsize=2)
def image_problem(shape: str) -> Problem:
    b, n, h, d = IMAGES[shape]
    return Problem(
        "attention of an image tower",
        f"{shape}, batch {b}",
        randn((b, n, 3, h, d)),
        lambda qkv: masked_attention_packed(qkv, backend="reference"),
        cost(b * n * n, b * n, h, d),
    )


def image_contender(name: str, shape: str) -> Contender:
    b, n, _, _ = IMAGES[shape]
    if name.startswith("farl_kernels"):
        backend = backend_of(name)
        return Contender(lambda qkv: masked_attention_packed(qkv, backend=backend), ours=True)
    return {
        "SDPA, flash (FlashAttention-2)": lambda: peers.sdpa(FLASH),
        "SDPA, cuDNN": lambda: peers.sdpa(CUDNN),
        "SDPA, efficient": lambda: peers.sdpa(EFFICIENT),
        "torch varlen_attn": lambda: peers.varlen(b, n),
        "FlexAttention": peers.flex,
        "xformers": peers.xformers,
        "flash-attn": peers.flash_attn,
    }[name]()


OURS = our_names("triton", "default", "sdpa", "reference")
IMAGE_PEERS = ["SDPA, cuDNN", "SDPA, flash (FlashAttention-2)", "SDPA, efficient", "torch varlen_attn"]
IMAGE_PEERS += ["FlexAttention", "xformers", "flash-attn"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OURS + IMAGE_PEERS)
@pytest.mark.parametrize("shape", shapes(IMAGES))
def test_image(benchmark: Any, shape: str, name: str, mode: str) -> None:
    make = functools.partial(built_image, name, shape)
    compete(benchmark, image_problem(shape), name, make, mode)


# The three modes of a contender follow each other and share what was compiled.
built_image = functools.lru_cache(maxsize=1)(image_contender)


@functools.lru_cache(maxsize=2)
def text_problem(shape: str) -> Problem:
    _, h, d = CAPTIONS[shape]
    packing = packing_of(shape)
    pairs = sum(n * (n + 1) / 2 for n in packing.lengths)
    return Problem(
        "attention of packed captions, causal",
        f"{shape}, {len(packing.lengths)} captions, {packing.total} tokens",
        randn((packing.total, 3, h, d)),
        functools.partial(packed, packing, "reference"),
        cost(pairs, packing.total, h, d),
    )


def packed(packing: peers.Packing, backend: str | None, qkv: Tensor) -> Tensor:
    ends, longest = packing.cu_seqlens, packing.longest
    return masked_attention_packed(qkv, cu_seqlens=ends, max_seqlen=longest, causal=True, backend=backend)


TEXT_PEERS: dict[str, Callable[[peers.Packing], Contender]] = {
    "torch varlen_attn": peers.packed_varlen,
    "SDPA, padded to 77": lambda packing: peers.padded_sdpa(packing, peers.CONTEXT),
    "SDPA, padded to the longest": lambda packing: peers.padded_sdpa(packing, packing.longest),
    "FlexAttention": peers.packed_flex,
    "xformers": peers.packed_xformers,
    "flash-attn": peers.packed_flash_attn,
}


@functools.lru_cache(maxsize=1)
def built_text(name: str, shape: str) -> Contender:
    packing = packing_of(shape)
    if name in TEXT_PEERS:
        return TEXT_PEERS[name](packing)
    return Contender(functools.partial(packed, packing, backend_of(name)), ours=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [*OURS, *TEXT_PEERS])
@pytest.mark.parametrize("shape", shapes(CAPTIONS))
def test_packed_text(benchmark: Any, shape: str, name: str, mode: str) -> None:
    compete(benchmark, text_problem(shape), name, functools.partial(built_text, name, shape), mode)


@functools.lru_cache(maxsize=1)
def class_token_problem() -> Problem:
    b, n, h, d = IMAGES["ViT-B/16, 197 tokens, 12 x 64"]
    return Problem(
        "attention of one query a sequence",
        f"class token, {n} keys, {h} x {d}, batch {b}",
        randn((b, h, d), (b, n, 2, h, d)),
        lambda q, kv: single_query_attention(q, kv, backend="reference"),
        query_cost(b * n, b, h, d),
        wanted=(0, 1),
    )


def query_cost(keys: int, queries: int, heads: int, dim: int) -> Cost:
    """Keys and values in, their gradients out; and the queries', which hardly count."""
    both, one = 2 * keys * heads * dim * ITEM, queries * heads * dim * ITEM
    return Cost(4 * keys * heads * dim, 10 * keys * heads * dim, both + 2 * one, 2 * both + 3 * one)


QUERY_OURS = our_names("triton", "default", "sdpa")
QUERY_PEERS = {"SDPA, its own choice": None, "SDPA, efficient": EFFICIENT, "SDPA, flash (FlashAttention-2)": FLASH}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [*QUERY_OURS, *QUERY_PEERS])
def test_class_token(benchmark: Any, name: str, mode: str) -> None:
    def make() -> Contender:
        if name in QUERY_PEERS:
            return peers.query_sdpa(QUERY_PEERS[name])
        return Contender(lambda q, kv: single_query_attention(q, kv, backend=backend_of(name)), ours=True)

    compete(benchmark, class_token_problem(), name, make, mode)


@functools.lru_cache(maxsize=1)
def end_of_text_problem(shape: str) -> Problem:
    _, h, d = CAPTIONS[shape]
    packing = packing_of(shape)
    return Problem(
        "attention of one query a sequence",
        f"end of text, {shape}, {len(packing.lengths)} captions, {packing.total} keys",
        randn((len(packing.lengths), h, d), (packing.total, 2, h, d)),
        functools.partial(end_of_text, packing, "reference"),
        query_cost(packing.total, len(packing.lengths), h, d),
        wanted=(0, 1),
    )


def end_of_text(packing: peers.Packing, backend: str | None, q: Tensor, kv: Tensor) -> Tensor:
    return single_query_attention(q, kv, cu_seqlens=packing.cu_seqlens, max_seqlen=packing.longest, backend=backend)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", QUERY_OURS)
@pytest.mark.parametrize("shape", shapes(CAPTIONS))
def test_end_of_text(benchmark: Any, shape: str, name: str, mode: str) -> None:
    make = lambda: Contender(functools.partial(end_of_text, packing_of(shape), backend_of(name)), ours=True)
    compete(benchmark, end_of_text_problem(shape), name, make, mode)
