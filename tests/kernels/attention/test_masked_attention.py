from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from farl_kernels.attention import masked_attention, xformers_backend
from farl_kernels.dispatch import use_backend

BACKENDS = [None, "reference", "sdpa"]
LENGTHS = [1, 5, 16, 17, 63, 64, 65, 77, 127, 128, 129, 196, 197, 198, 256, 257, 577]


def draw(b, h, m, n, d, dtype=torch.float64, seed=0, grad=False):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(b, h, m, d), (b, h, n, d), (b, h, n, d)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad) for s in shapes]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_equals_loops(backend, causal, naive):
    q, k, v = draw(2, 2, 5, 5, 4)
    key_mask = torch.tensor([[True, False, True, True, False], [False, False, True, True, True]])
    allowed = key_mask[:, None, :].expand(2, 5, 5)
    if causal:
        allowed = allowed & torch.ones(5, 5, dtype=torch.bool).tril()
    want = naive(q, k, v, allowed, 0.3)
    got = masked_attention(q, k, v, causal=causal, key_mask=key_mask, scale=0.3, backend=backend)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_keys_than_queries_and_default_scale(backend, naive):
    q, k, v = draw(1, 2, 3, 7, 16)
    want = naive(q, k, v, torch.ones(1, 3, 7, dtype=torch.bool), 16**-0.5)
    torch.testing.assert_close(masked_attention(q, k, v, backend=backend), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["plain", "causal", "key_mask", "causal_key_mask", "cross"])
def test_gradcheck(backend, case):
    q, k, v = draw(2, 2, 4, 6 if case == "cross" else 4, 3, grad=True)
    key_mask = torch.tensor([[False, True, True, False], [False] * 4]) if "key_mask" in case else None

    def call(q, k, v):
        return masked_attention(q, k, v, causal="causal" in case, key_mask=key_mask, backend=backend)

    assert torch.autograd.gradcheck(call, (q, k, v))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", LENGTHS)
def test_lengths_against_float64(n, causal):
    q, k, v = draw(1, 2, n, n, 64, torch.float32, seed=n, grad=True)
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    truth_in = [x.detach().double().requires_grad_() for x in (q, k, v)]
    truth = masked_attention(*truth_in, causal=causal, backend="reference")
    truth_grads = torch.autograd.grad(truth, truth_in, grad.double())
    got = masked_attention(q, k, v, causal=causal)
    grads = torch.autograd.grad(got, (q, k, v), grad)
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-5)
    for a, b in zip(grads, truth_grads, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("grad", [False, True])
def test_error_within_twice_pytorchs_in_every_dtype(backend, dtype, grad):
    q, k, v = draw(2, 3, 33, 33, 32, dtype, grad=grad)
    mask = torch.arange(33) < torch.tensor([[20], [33]])
    truth_in = [x.detach().double().requires_grad_(grad) for x in (q, k, v)]
    truth = masked_attention(*truth_in, key_mask=mask, backend="reference")
    plain_in = [x.detach().clone().requires_grad_(grad) for x in (q, k, v)]
    with sdpa_kernel(SDPBackend.MATH):
        plain = F.scaled_dot_product_attention(*plain_in, attn_mask=mask[:, None, None, :])
    got = masked_attention(q, k, v, key_mask=mask, backend=backend)
    assert got.dtype == dtype
    small = 1e-12 if dtype == torch.float64 else 1e-6

    def error(a, b):
        return (a.double() - b).abs().max().item()

    assert error(got, truth) <= 2 * error(plain, truth) + small
    if grad:
        cotangent = torch.randn(q.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        truths = torch.autograd.grad(truth, truth_in, cotangent.double())
        plains = torch.autograd.grad(plain, plain_in, cotangent)
        for a, b, c in zip(torch.autograd.grad(got, (q, k, v), cotangent), truths, plains, strict=True):
            assert a.dtype == dtype
            assert error(a, b) <= 3 * error(c, b) + small


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_fully_masked_rows_give_zero_and_no_gradient(backend, dtype, causal):
    q, k, v = draw(2, 2, 20, 20, 16, dtype, grad=True)
    key_mask = torch.ones(2, 20, dtype=torch.bool)
    key_mask[0] = False
    key_mask[1, :3] = False  # with `causal`, the first three queries of sample 1 have no key either
    out = masked_attention(q, k, v, key_mask=key_mask, causal=causal, backend=backend)
    grads = torch.autograd.grad(out.float().square().sum() + out.float().sum(), (q, k, v))
    assert out[0].eq(0).all()
    assert out[1, :, :3].eq(0).all() == causal
    assert not out.isnan().any()
    for g in grads:
        assert g[0].eq(0).all()
        assert not g.isnan().any()
    assert grads[0][1, :, 3:].ne(0).any()
    assert grads[1][1, :, :3].eq(0).all()
    assert grads[2][1, :, :3].eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "dims_swapped", "step_two"])
def test_any_strides(backend, layout):
    b, h, n, d = 3, 2, 9, 8
    base = {
        "transposed": lambda: torch.randn(b, n, h, d).transpose(1, 2),
        "sliced": lambda: torch.randn(b, h, n + 4, 3 * d)[:, :, 2:-2, d : 2 * d],
        "expanded": lambda: torch.randn(1, h, n, d).expand(b, h, n, d),
        "dims_swapped": lambda: torch.randn(b, h, d, n).mT,
        "step_two": lambda: torch.randn(b, h, n, 2 * d)[..., ::2],
    }[layout]
    torch.manual_seed(0)
    views = [base().requires_grad_() for _ in range(3)]
    dense = [x.detach().contiguous().requires_grad_() for x in views]
    got, want = masked_attention(*views, causal=True, backend=backend), masked_attention(*dense, causal=True)
    torch.testing.assert_close(got, want)
    cotangent = torch.randn(h, b, n, d).transpose(0, 1)
    got_grads, want_grads = torch.autograd.grad(got, views, cotangent), torch.autograd.grad(want, dense, cotangent)
    torch.testing.assert_close(got_grads, want_grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 2, 3, 3), (2, 2, 0, 3), (2, 2, 3, 0)])
def test_empty(backend, shape):
    q, k, v = draw(*shape, 4, grad=True)
    out = masked_attention(q, k, v, key_mask=torch.ones(shape[0], shape[3], dtype=torch.bool), backend=backend)
    out.sum().backward()
    assert out.shape == q.shape
    assert out.eq(0).all()
    assert q.grad is not None and v.grad is not None


@settings(max_examples=40, deadline=None)
@given(
    b=st.integers(1, 3),
    h=st.integers(1, 3),
    m=st.integers(1, 20),
    n=st.integers(1, 20),
    d=st.integers(1, 17),
    causal=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_backends_agree(b, h, m, n, d, causal, masked, seed):
    n = m if causal else n
    q, k, v = draw(b, h, m, n, d, seed=seed, grad=True)
    key_mask = torch.rand(b, n, generator=torch.Generator().manual_seed(seed)) < 0.6 if masked else None
    outs, grads = [], []
    for backend in ("sdpa", "reference"):
        out = masked_attention(q, k, v, causal=causal, key_mask=key_mask, backend=backend)
        outs.append(out)
        grads.append(torch.autograd.grad(out.sin().sum(), (q, k, v)))
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-11)


def test_order_of_keys_does_not_matter():
    q, k, v = draw(2, 2, 6, 11, 8)
    key_mask = torch.rand(2, 11, generator=torch.Generator().manual_seed(3)) < 0.5
    order = torch.randperm(11, generator=torch.Generator().manual_seed(4))
    a = masked_attention(q, k, v, key_mask=key_mask)
    b = masked_attention(q, k[:, :, order], v[:, :, order], key_mask=key_mask[:, order])
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_second_derivative_is_right_or_raises():
    def penalty(backend):
        q, k, v = draw(1, 1, 4, 4, 3, grad=True)
        out = masked_attention(q, k, v, backend=backend)
        (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (q, k, v))

    truth = penalty("reference")
    q, k, v = draw(1, 1, 4, 4, 3, grad=True)
    plain = (q @ k.mT * 3**-0.5).softmax(-1) @ v
    (first,) = torch.autograd.grad(plain.square().sum(), q, create_graph=True)
    torch.testing.assert_close(truth, torch.autograd.grad(first.square().sum(), (q, k, v)))
    try:
        got = penalty("sdpa")
    except (RuntimeError, NotImplementedError) as error:
        assert "derivative" in str(error)
    else:
        torch.testing.assert_close(got, truth)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_computes_in_the_autocast_dtype(backend):
    q, k, v = draw(2, 2, 9, 9, 8, torch.float32, grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = masked_attention(q, k.to(torch.bfloat16), v, backend=backend)
        kept = masked_attention(q.double(), k.double(), v.double(), backend=backend)
        with pytest.raises(ValueError, match=r"k is torch.bfloat16, want torch.float64"):
            masked_attention(q.double(), k, v, backend=backend)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert kept.dtype == torch.float64
    assert q.grad is not None and q.grad.dtype == torch.float32
    want = masked_attention(*(x.detach().to(torch.bfloat16) for x in (q, k, v)))
    torch.testing.assert_close(out, want, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3)}, r"q has shape \(2, 3\), want \[B, H, M, D\]"),
        ({"q": torch.zeros(2, 2, 4, 8, dtype=torch.int32)}, "q is torch.int32"),
        ({"k": torch.zeros(2, 3, 4, 8)}, r"k has shape \(2, 3, 4, 8\), want \[2, 2, 4, 8\]"),
        ({"v": torch.zeros(2, 2, 5, 8)}, r"v has shape \(2, 2, 5, 8\), want \[2, 2, 4, 8\]"),
        ({"k": torch.zeros(2, 2, 4, 8, dtype=torch.float64)}, "k is torch.float64, want torch.float32"),
        ({"v": torch.zeros(2, 2, 4, 8, device="meta")}, "v is on meta, want cpu"),
        ({"causal": True, "q": torch.zeros(2, 2, 5, 8)}, "as many keys as queries, got M = 5 and N = 4"),
        (
            {"key_mask": torch.ones(2, 5, dtype=torch.bool)},
            r"key_mask is torch.bool \(2, 5\) on cpu, want torch.bool \(2, 4\)",
        ),
        ({"key_mask": torch.ones(2, 4)}, "key_mask is torch.float32"),
        ({"backend": "flash"}, "backend 'flash' is not one of triton, sdpa, reference, xformers"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = {name: torch.zeros(2, 2, 4, 8) for name in "qkv"} | change
    with pytest.raises(ValueError, match=message):
        masked_attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


def test_compiles_without_graph_break():
    q, k, v = draw(2, 2, 5, 5, 8, torch.float32, grad=True)
    mask = torch.rand(2, 5, generator=torch.Generator().manual_seed(0)) < 0.7
    call = lambda q, k, v, mask: masked_attention(q, k, v, key_mask=mask, causal=True)
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v, mask)
    torch.testing.assert_close(got, call(q, k, v, mask))
    got.sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()


@pytest.fixture
def fake_xformers(monkeypatch):
    """The few names of xformers.ops that are used, computed by PyTorch; heads stand before the last dimension."""

    def memory_efficient_attention(q, k, v, attn_bias=None, scale=None):
        assert attn_bias is None or isinstance(attn_bias, str) or attn_bias.stride(-2) % 8 == 0
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        causal = attn_bias == "lower" if isinstance(attn_bias, str) else False
        mask = None if isinstance(attn_bias, str) else attn_bias
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
        return out.transpose(1, 2)

    ops = types.SimpleNamespace(
        memory_efficient_attention=memory_efficient_attention, LowerTriangularMask=lambda: "lower"
    )
    monkeypatch.setattr(xformers_backend, "load", lambda: (ops, None))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_xformers_backend(fake_xformers, causal, masked):
    q, k, v = draw(2, 3, 7, 7, 8, torch.float32)
    key_mask = torch.rand(2, 7, generator=torch.Generator().manual_seed(5)) < 0.5 if masked else None
    got = masked_attention(q, k, v, causal=causal, key_mask=key_mask, backend="xformers")
    torch.testing.assert_close(got, masked_attention(q, k, v, causal=causal, key_mask=key_mask))


def test_absent_xformers_is_a_clear_error_and_is_not_imported_unasked(monkeypatch):
    q, k, v = draw(1, 1, 2, 2, 8)
    monkeypatch.setitem(sys.modules, "xformers", None)  # as where it is not installed
    xformers_backend.load.cache_clear()
    monkeypatch.setattr(xformers_backend, "load", xformers_backend.load.__wrapped__)
    masked_attention(q, k, v)
    with pytest.raises(ValueError, match=r"'xformers' cannot run this call: xformers does not run here \(.*install"):
        masked_attention(q, k, v, backend="xformers")


def test_use_backend_reaches_the_op():
    q, k, v = draw(1, 2, 40, 40, 16, torch.bfloat16)
    with use_backend("reference"):
        got = masked_attention(q, k, v)
    assert torch.equal(got, masked_attention(q, k, v, backend="reference"))
