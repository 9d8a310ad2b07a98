"""What only a GPU can show of the Triton kernels: capture, bit equality, no host sync, bfloat16, peak memory.

All shapes are ragged (no length is a multiple of a tile), so that ``compute-sanitizer`` over this file means something.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from farl_kernels import (
    add_layer_norm,
    contrastive_loss,
    gelu,
    mask_patches,
    masked_attention,
    masked_attention_packed,
    masked_token_cross_entropy,
    patchify,
    quick_gelu,
    sample_block_masks,
    single_query_attention,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

Leaves = tuple[Tensor, ...]
Call = Callable[[str | None, Leaves], Any]
Made = tuple[Call, Leaves]
LENGTHS = (1, 5, 16, 17, 9, 26, 63, 65, 2, 33)


class Draw:
    """Random numbers on `device`; floats get gradients in `dtype`."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device=device).manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(shape, device=self.device, generator=self._generator)
        return values.to(dtype or self.dtype).requires_grad_()

    def below(self, limit: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(0, limit, shape, device=self.device, generator=self._generator).to(dtype)

    def unit(self, *shape: int) -> Tensor:
        return F.normalize(self(*shape, dtype=torch.float32).detach(), dim=-1).to(self.dtype).requires_grad_()

    def scalar(self, value: float) -> Tensor:
        return torch.tensor(value, device=self.device, requires_grad=True)


def packing(draw: Draw) -> dict[str, Any]:
    ends = torch.tensor((0, *LENGTHS), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return {"cu_seqlens": ends.to(draw.device), "max_seqlen": max(LENGTHS)}


def attention(tokens: int, **options: Any) -> Callable[[Draw], Made]:
    def make(draw: Draw) -> Made:
        return (
            lambda backend, x: masked_attention_packed(x[0], qkv_bias=x[1], backend=backend, **options),
            (draw(3, tokens, 3, 2, 64), draw(3, 2, 64)),
        )

    return make


def padded_attention(draw: Draw) -> Made:
    mask = torch.arange(77, device=draw.device)[None] < draw.below(78, 3, 1)
    shape = (3, 2, 77, 64)
    return (
        lambda backend, x: masked_attention(*x, key_mask=mask, backend=backend),
        (draw(*shape), draw(*shape), draw(*shape)),
    )


def text_attention(draw: Draw) -> Made:
    options = packing(draw)
    # Three tokens more than the captions have: their output and gradient are 0.
    return (
        lambda backend, x: masked_attention_packed(x[0], qkv_bias=x[1], causal=True, backend=backend, **options),
        (draw(sum(LENGTHS) + 3, 3, 2, 64), draw(3, 2, 64)),
    )


def class_token(draw: Draw) -> Made:
    return (
        lambda backend, x: single_query_attention(*x, backend=backend),
        (draw(5, 2, 64), draw(5, 197, 2, 2, 64)),
    )


def end_of_text(draw: Draw) -> Made:
    options = packing(draw)
    return (
        lambda backend, x: single_query_attention(*x, backend=backend, **options),
        (draw(len(LENGTHS), 2, 64), draw(sum(LENGTHS), 2, 2, 64)),
    )


def layer_norm(**options: Any) -> Callable[[Draw], Made]:
    def make(draw: Draw) -> Made:
        return (
            lambda backend, x: add_layer_norm(
                x[0], x[1], x[2], x[3], eps=1e-5, x_bias=x[4], backend=backend, **options
            ),
            (draw(333, 768), draw(333, 768), draw(768), draw(768), draw(768)),
        )

    return make


def activation(op: Callable[..., Tensor]) -> Callable[[Draw], Made]:
    return lambda draw: (lambda backend, x: op(*x, backend=backend), (draw(333, 3072), draw(3072)))


def patches(draw: Draw) -> Made:
    images = draw.below(256, 5, 48, 80, 3, dtype=torch.uint8)
    options = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25), "dtype": draw.dtype}
    return lambda backend, x: patchify(images, 16, backend=backend, **options), ()


def block_masks(draw: Draw) -> Made:
    ids, views = draw.below(1 << 40, 37), draw.below(9, 37)
    return lambda backend, x: sample_block_masks(ids, views, grid=(14, 14), max_masked=75, seed=3, backend=backend), ()


def sequences(mode: str) -> Callable[[Draw], Made]:
    def make(draw: Draw) -> Made:
        order = torch.rand(5, 45, device=draw.device).argsort(1)
        visible = order[:, :13].sort(1).values.int() if mode == "gather" else None

        def call(backend: str | None, x: Leaves) -> Tensor:
            parameters = {
                "class_token": x[1],
                "position_embedding": x[2],
                "mask_token": None if visible is not None else x[3],
            }
            return mask_patches(x[0], order < 17, mode=mode, visible=visible, backend=backend, **parameters)

        leaves = (draw(5, 45, 192), draw(192), draw(46, 192), draw(192))
        return call, leaves if visible is None else leaves[:3]

    return make


def token_loss(draw: Draw) -> Made:
    targets = draw.below(1001, 333) - 1
    scaled = (draw(1000, 192).detach() * 192**-0.5).requires_grad_()
    return (
        lambda backend, x: masked_token_cross_entropy(x[0], x[1], x[2], targets, backend=backend)[0],
        (draw(333, 192), scaled, draw(1000)),
    )


def contrast(**options: Any) -> Callable[[Draw], Made]:
    def make(draw: Draw) -> Made:
        leaves = (draw.unit(777, 192), draw.unit(777, 192), draw.scalar(14.3))
        if options.get("kind") == "sigmoid":
            leaves = (*leaves, draw.scalar(-10.0))
        ids = draw.below(300, 777) if "duplicates" in options else None

        def call(backend: str | None, x: Leaves) -> Any:
            bias = x[3] if len(x) > 3 else None
            return contrastive_loss(*x[:3], logit_bias=bias, ids=ids, backend=backend, **options)

        return call, leaves

    return make


CALLS: dict[str, Callable[[Draw], Made]] = {
    "attention of 197 tokens": attention(197),
    "attention of 785 tokens": attention(785),
    "attention of 65 tokens, causal": attention(65, causal=True),
    "attention with a key mask": padded_attention,
    "attention of packed captions": text_attention,
    "attention of the class token": class_token,
    "attention of the end of text": end_of_text,
    "add_layer_norm": layer_norm(),
    "add_layer_norm, affine in float32": layer_norm(affine_dtype=torch.float32),
    "quick_gelu": activation(quick_gelu),
    "gelu": activation(gelu),
    "patchify": patches,
    "sample_block_masks": block_masks,
    "mask_patches fork": sequences("fork"),
    "mask_patches mask": sequences("mask"),
    "mask_patches gather": sequences("gather"),
    "masked_token_cross_entropy": token_loss,
    "contrastive_loss": contrast(),
    "contrastive_loss deterministic": contrast(deterministic=True),
    "contrastive_loss sigmoid": contrast(kind="sigmoid"),
    "contrastive_loss with duplicates masked": contrast(duplicates="mask"),
}


def results(call: Call, backend: str | None, leaves: Leaves, seed: int = 1) -> list[Tensor]:
    """Outputs, then the gradients of all leaves."""
    made = call(backend, leaves)
    outputs = list(made) if isinstance(made, tuple) else [made]
    live = [x for x in outputs if x.requires_grad]
    if not live or not leaves:
        return [x.detach() for x in outputs]
    generator = torch.Generator(device=live[0].device).manual_seed(seed)
    upstream = [torch.randn(x.shape, device=x.device, generator=generator).to(x.dtype) for x in live]
    grads = torch.autograd.grad(live, leaves, upstream)
    return [x.detach() for x in outputs] + list(grads)


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float32], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def clean_memory() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("name", CALLS)
def test_error_against_float64(
    name: str, dtype: torch.dtype, device: torch.device, check_error: Callable[..., None]
) -> None:
    call, leaves = CALLS[name](Draw(device, dtype))
    exact = tuple(x.detach().double().requires_grad_() for x in leaves)
    got, plain = results(call, "triton", leaves), results(call, "reference", leaves)
    truth = results(call, "reference", exact)
    outputs = len(got) - len(leaves)
    for index, (mine, same, right) in enumerate(zip(got, plain, truth, strict=True)):
        if not mine.is_floating_point() or not leaves:
            # Patches of pixels and sampled masks: one rounding at most between the two.
            torch.testing.assert_close(mine, same)
            continue
        factor, kind = (2, "output") if index < outputs else (3, "gradient")
        check_error(mine, same, right, factor=factor, name=f"{kind} {index}")


@pytest.mark.parametrize("name", CALLS)
def test_two_runs_are_equal_bit_for_bit(name: str, dtype: torch.dtype, device: torch.device) -> None:
    call, leaves = CALLS[name](Draw(device, dtype))
    first = results(call, "triton", leaves)
    for _ in range(3):
        for a, b in zip(first, results(call, "triton", leaves), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", CALLS)
def test_nothing_waits_for_the_device(name: str, device: torch.device) -> None:
    call, leaves = CALLS[name](Draw(device, torch.bfloat16))
    # The first call compiles, and loading a kernel may wait.
    results(call, "triton", leaves)
    torch.cuda.synchronize()
    with waiting_is_an_error():
        results(call, "triton", leaves)


@contextlib.contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", ["triton", None], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_a_captured_graph_replays_on_new_inputs(name: str, backend: str | None, device: torch.device) -> None:
    call, leaves = CALLS[name](Draw(device, torch.bfloat16))
    static = tuple(x.detach().clone().requires_grad_() for x in leaves)
    upstream: list[Tensor] = []
    # Not the device's own generator: a capture that fails would leave it in capture for the tests that follow.
    generator = torch.Generator(device=device).manual_seed(1)

    def step() -> list[Tensor]:
        made = call(backend, static)
        outputs = list(made) if isinstance(made, tuple) else [made]
        live = [x for x in outputs if x.requires_grad]
        if not upstream:
            drawn = (torch.randn(x.shape, device=device, generator=generator).to(x.dtype) for x in live)
            upstream.extend(drawn)
        grads = torch.autograd.grad(live, static, upstream) if static else ()
        return [x.detach() for x in outputs] + list(grads)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        with waiting_is_an_error():
            step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = step()
        with torch.no_grad():
            for x in static:
                x.copy_(x * 0.5 if x.ndim else x + 1)
        for x in captured:
            if x.is_floating_point():
                x.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        expected = step()
        torch.cuda.synchronize()
    for mine, eager in zip(captured, expected, strict=True):
        assert torch.equal(mine, eager)


@pytest.mark.slow
@pytest.mark.parametrize("count", [8_192, 32_768])
def test_memory_of_the_contrastive_loss(count: int, device: torch.device) -> None:
    draw = Draw(device, torch.bfloat16)
    leaves = (draw.unit(count, 512), draw.unit(count, 512), draw.scalar(14.3))
    results(lambda backend, x: contrastive_loss(*x, backend=backend), "triton", leaves)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results(lambda backend, x: contrastive_loss(*x, backend=backend), "triton", leaves)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= 512 << 20


def test_offsets_past_two_to_the_31(device: torch.device) -> None:
    """The last rows of a tensor of more than 2^31 elements are as right as those of a small one."""
    if torch.cuda.get_device_properties(device).total_memory < 40 << 30:
        pytest.skip("needs 40 GB of memory")
    rows, width = 700_032, 3072
    assert rows * width > 2**31
    generator = torch.Generator(device=device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator)

    x, bias = draw(rows, width), draw(width)
    assert torch.equal(quick_gelu(x, bias, backend="triton")[-64:], quick_gelu(x[-64:], bias, backend="triton"))
    weight = draw(width)
    got = add_layer_norm(x, None, weight, bias, eps=1e-5, backend="triton")[0][-64:]
    assert torch.equal(got, add_layer_norm(x[-64:], None, weight, bias, eps=1e-5, backend="triton")[0])
    del x, got
    gc.collect()
    torch.cuda.empty_cache()
    qkv = draw(4_800, 197, 3, 12, 64)
    assert qkv.numel() > 2**31
    got = masked_attention_packed(qkv, backend="triton")[-2:]
    assert torch.equal(got, masked_attention_packed(qkv[-2:], backend="triton"))
