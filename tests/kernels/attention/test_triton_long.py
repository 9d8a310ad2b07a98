"""The kernels for more than 256 keys against float64, held to a multiple of plain PyTorch's error in the same dtype."""

from __future__ import annotations

import pytest
import torch

from farl_kernels import tables
from farl_kernels.attention import masked_attention, masked_attention_packed, reference
from farl_kernels.attention.long import launchers
from farl_kernels.attention.reference import allowed_keys

# Tiles that a short call fills several of, so that the interpreter is done soon.
SMALL_FORWARD = {"BLOCK_M": 32, "STEP": 16, "num_warps": 4, "num_stages": 1}
SMALL_BACKWARD = {"BLOCK": 32, "STEP": 16, "num_warps": 4, "num_stages": 1}


def draw(*shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


def plain(q, k, v, allowed):
    """Attention [B, N, H, D] in the dtype of q."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    if allowed is None:
        return (scores.softmax(-1) @ v).transpose(1, 2)
    dead = ~allowed.any(-1, keepdim=True)
    weights = scores.masked_fill(~(allowed | dead), float("-inf")).softmax(-1)
    return (weights.masked_fill(dead, 0.0) @ v).transpose(1, 2)


def differentiated(q, k, v, allowed, grad):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = plain(leaves[0], leaves[1], leaves[2], allowed)
    return out, torch.autograd.grad(out, leaves, grad)


def compare(check_error, batch, m, n, dim, dtype, device, *, causal=False, key_mask=None):
    """The launchers themselves, which take any number of keys."""
    q, k, v = (draw(batch, x, 1, dim, dtype=dtype, device=device, seed=i) for i, x in enumerate((m, n, n)))
    grad = draw(batch, m, 1, dim, dtype=dtype, device=device, seed=9)
    out, lse = launchers.forward(q, k, v, None, key_mask, causal, dim**-0.5)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    launchers.backward(grad, q, k, v, None, key_mask, out, lse, causal, dim**-0.5, dq, dk, dv, False)
    grads = dq, dk, dv
    allowed = allowed_keys(m, n, causal=causal, key_mask=key_mask, device=device)
    same, same_grads = differentiated(q, k, v, allowed, grad)
    truth, truths = differentiated(q.double(), k.double(), v.double(), allowed, grad.double())
    check_error(out, same, truth, factor=2, name="out")
    for name, *three in zip(("dq", "dk", "dv"), grads, same_grads, truths, strict=True):
        check_error(*three, factor=3, name=name)
    _, lse_truth = reference.attention_forward(q.double(), k.double(), v.double(), key_mask, causal, dim**-0.5)
    torch.testing.assert_close(lse.double(), lse_truth, rtol=1e-5, atol=1e-5)
    return out, grads


@pytest.fixture
def small_tiles():
    with (
        tables.override("attention_long", "forward", "half-d64", SMALL_FORWARD),
        tables.override("attention_long", "backward", "half-d64", SMALL_BACKWARD),
    ):
        yield


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [5, 33, 64])
def test_several_small_tiles(n, causal, masked, device, check_error, poisoned, small_tiles):
    key_mask = None
    if masked:
        key_mask = torch.ones(2, n, dtype=torch.bool, device=device)
        key_mask[0] = False
        key_mask[1, :3] = False
    out, grads = compare(check_error, 2, n, n, 16, torch.float16, device, causal=causal, key_mask=key_mask)
    if masked:
        assert out[0].eq(0).all() and all(x[0].eq(0).all() for x in grads)


@pytest.mark.parametrize(("m", "n"), [(3, 40), (40, 3)])
def test_other_number_of_queries(m, n, device, check_error, poisoned, small_tiles):
    compare(check_error, 1, m, n, 24, torch.float16, device)


def test_just_too_long_for_the_short_kernel(device, check_error, poisoned):
    compare(check_error, 1, 257, 257, 16, torch.float16, device, causal=True)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [257, 577, 785, 1025])
def test_long(n, causal, device, check_error, poisoned):
    compare(check_error, 1, n, n, 64, torch.float16, device, causal=causal)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_head_dims(dim, kernel_dtype, device, check_error, poisoned):
    compare(check_error, 1, 270, 270, dim, kernel_dtype, device)


def test_neighbours_are_never_read(device, small_tiles):
    around = torch.full((3, 60, 3, 3, 24), float("nan"), dtype=torch.float16, device=device)
    around[1:2, 6:46, 1:2, :, 4:20] = draw(1, 40, 1, 3, 16, dtype=torch.float16, device=device)
    parts = around[1:2, 6:46, 1:2, :, 4:20].unbind(3)
    grad = torch.full((1, 60, 1, 16), float("nan"), dtype=torch.float16, device=device)
    grad[:, 6:46] = draw(1, 40, 1, 16, dtype=torch.float16, device=device, seed=3)
    results = []
    strided = *parts, grad[:, 6:46]
    for q, k, v, g in (strided, [x.contiguous() for x in strided]):
        out, lse = launchers.forward(q, k, v, None, None, False, 0.25)
        dq, dk, dv = (torch.empty_like(out) for _ in range(3))
        launchers.backward(g, q, k, v, None, None, out, lse, False, 0.25, dq, dk, dv, False)
        results.append((out, lse, dq, dk, dv))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want) and got.isfinite().all()


def test_bias(device, small_tiles, check_error):
    """Through the public op, in whose float32 these kernels serve short sequences too."""
    qkv = draw(2, 20, 3, 1, 16, dtype=torch.float32, device=device)
    bias = draw(3, 1, 16, dtype=torch.float32, device=device, seed=1)
    grad = draw(2, 20, 1, 16, dtype=torch.float32, device=device, seed=2)
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (qkv, bias)]
        out = masked_attention_packed(leaves[0], qkv_bias=leaves[1], causal=True, backend=backend)
        results.append((out, *torch.autograd.grad(out, leaves, grad.to(dtype))))
    for name, factor, *three in zip(("out", "dqkv", "dbias"), (2, 3, 3), *results, strict=True):
        check_error(*three, factor=factor, name=name)


def test_the_public_op_takes_the_long_kernels_when_asked(device):
    q, k, v = (draw(1, 1, 260, 16, dtype=torch.float16, device=device, seed=i) for i in range(3))
    got = masked_attention(q, k, v, backend="triton")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    want, _ = launchers.forward(q, k, v, None, None, False, 0.25)
    assert torch.equal(got, want.transpose(1, 2))
