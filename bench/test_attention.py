"""Attention: reference, sdpa and auto, forward + backward, at ViT-B/16 and packed-text shapes.

On CPU the batches are small; on CUDA they are those of a training step. Each benchmark first checks its result.
"""

from __future__ import annotations

import pytest
import torch

from farl_kernels.attention import masked_attention_packed, single_query_attention

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
BACKENDS = ["reference", "sdpa", None]
IMAGE_BATCHES = {
    "vit_b16_197x12x64": (256 if CUDA else 2, 197, 12, 64),
    "tiny_65x2x64": (1024 if CUDA else 16, 65, 2, 64),
}
TEXT_BATCHES = {"clip_text_8x64": (256 if CUDA else 16, 8, 64), "tiny_text_2x64": (1024 if CUDA else 64, 2, 64)}


def draw(*shape):
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE, requires_grad=True)


def captions(sequences):
    """Lengths of short captions (8 to 24 tokens): cu_seqlens, their sum, their maximum."""
    lengths = torch.randint(8, 25, (sequences,), generator=torch.Generator().manual_seed(0))
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(DEVICE, torch.int32)
    return cu_seqlens, int(lengths.sum()), int(lengths.max())


def compare(benchmark, call, inputs, group):
    """Check `call(backend)` against float64 and time forward + backward of the backend under test."""
    backend, run = call
    benchmark.group = group
    out = run(backend, *inputs)
    cotangent = torch.randn_like(out)
    exact_in = [x.detach().double().requires_grad_() for x in inputs]
    exact = run("reference", *exact_in)
    tolerance = 3e-2 if torch.bfloat16 == DTYPE else 1e-4
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)
    grads = torch.autograd.grad(out, inputs, cotangent)
    exact_grads = torch.autograd.grad(exact, exact_in, cotangent.double())
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(grad.double(), exact_grad, rtol=tolerance, atol=4 * tolerance)

    def step():
        torch.autograd.grad(run(backend, *inputs), inputs, cotangent)
        if CUDA:
            torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=7, warmup_rounds=1)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("shape", IMAGE_BATCHES)
def test_image(benchmark, backend, shape):
    b, n, h, d = IMAGE_BATCHES[shape]
    run = lambda backend, qkv: masked_attention_packed(qkv, backend=backend)
    compare(benchmark, (backend, run), (draw(b, n, 3, h, d),), f"masked_attention_packed {shape}")


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("shape", TEXT_BATCHES)
def test_packed_text(benchmark, backend, shape):
    sequences, h, d = TEXT_BATCHES[shape]
    if CUDA and backend == "reference":
        sequences //= 8  # its T x T mask would not fit
    cu_seqlens, total, longest = captions(sequences)

    def run(backend, qkv):
        return masked_attention_packed(qkv, cu_seqlens=cu_seqlens, max_seqlen=longest, causal=True, backend=backend)

    compare(benchmark, (backend, run), (draw(total, 3, h, d),), f"masked_attention_packed causal {shape}")


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("shape", TEXT_BATCHES)
def test_end_of_text_query(benchmark, backend, shape):
    sequences, h, d = TEXT_BATCHES[shape]
    if CUDA and backend == "reference":
        sequences //= 8
    cu_seqlens, total, longest = captions(sequences)

    def run(backend, q, kv):
        return single_query_attention(q, kv, cu_seqlens=cu_seqlens, max_seqlen=longest, backend=backend)

    inputs = (draw(sequences, h, d), draw(total, 2, h, d))
    compare(benchmark, (backend, run), inputs, f"single_query_attention {shape}")
