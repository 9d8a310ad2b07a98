from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farl_kernels.activation import gelu, quick_gelu
from farl_kernels.dispatch import use_backend

BACKENDS = [None, "reference", "torch"]
OPS = [quick_gelu, gelu]
FORMULAS = {
    quick_gelu: lambda z: z / (1 + math.exp(-1.702 * z)),
    gelu: lambda z: 0.5 * z * math.erfc(-z / math.sqrt(2)),
}


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_formula(op, backend):
    x, bias = 3 * draw(5, 6), draw(6, seed=1)
    want = torch.tensor([[FORMULAS[op](float(z)) for z in row] for row in x + bias], dtype=torch.float64)
    torch.testing.assert_close(op(x, bias, backend=backend), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(op(x + bias, backend=backend), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 0, 4), (2, 3, 4)])
def test_gradcheck(op, backend, shape):
    x, bias = draw(*shape).requires_grad_(), draw(4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: op(x, backend=backend), (x,))
    assert torch.autograd.gradcheck(lambda x, b: op(x, b, backend=backend), (x, bias))
    (only_bias,) = torch.autograd.grad(op(x.detach(), bias, backend=backend).sum(), bias)
    (both, _) = torch.autograd.grad(op(x, bias, backend=backend).sum(), (bias, x))
    torch.testing.assert_close(only_bias, both)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_within_twice_eager_pytorchs(op, backend, dtype):
    """Forward within 2 and backward within 3 times the error of the formula in eager PyTorch in the same dtype."""

    def eager(x, bias):
        z = x + bias
        if op is quick_gelu:
            return z * torch.sigmoid(1.702 * z)
        return torch.nn.functional.gelu(z)

    x, bias = 3 * draw(64, 33, dtype=dtype), draw(33, dtype=dtype, seed=1)
    cotangent = draw(64, 33, seed=2).to(dtype)

    def run(fn, cast):
        inputs = [t.to(cast).detach().requires_grad_() for t in (x, bias)]
        out = fn(*inputs)
        assert out.dtype == cast
        return [t.double() for t in (out, *torch.autograd.grad(out, inputs, cotangent.to(cast)))]

    truth = run(lambda x, b: op(x, b, backend="reference"), torch.float64)
    plain, got = run(eager, dtype), run(lambda x, b: op(x, b, backend=backend), dtype)
    for factor, a, b, t in zip((2, 3, 3), got, plain, truth, strict=True):
        assert (a - t).abs().max() <= factor * (b - t).abs().max() + 1e-6


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_large_arguments_stay_finite(op, dtype):
    limit = torch.finfo(dtype).max / 4 if dtype != torch.float16 else torch.finfo(dtype).max
    x = torch.tensor([-limit, -100.0, 100.0, limit], dtype=dtype, requires_grad=True)
    out = op(x)
    out.sum().backward()
    torch.testing.assert_close(out, torch.tensor([0.0, 0.0, 100.0, limit], dtype=dtype))
    torch.testing.assert_close(x.grad, torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=dtype))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded", "step_two"])
def test_any_strides(op, backend, layout):
    x = {
        "sliced": lambda: draw(6, 12)[1:4, 2:10],
        "transposed": lambda: draw(8, 3).T,
        "expanded": lambda: draw(1, 8).expand(3, 8),
        "step_two": lambda: draw(3, 16)[:, ::2],
    }[layout]()
    bias = draw(16, seed=1)[::2]
    view, dense = x.requires_grad_(), x.detach().contiguous().requires_grad_()
    got, want = op(view, bias, backend=backend), op(dense, bias, backend="reference")
    torch.testing.assert_close(got, want)
    cotangent = draw(8, 3, seed=3).T
    torch.testing.assert_close(torch.autograd.grad(got, view, cotangent), torch.autograd.grad(want, dense, cotangent))


@settings(max_examples=40, deadline=None)
@given(
    op=st.sampled_from(OPS),
    shape=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    with_bias=st.booleans(),
    size=st.floats(0.01, 50),
)
def test_backends_agree(op, shape, with_bias, size):
    x, bias = size * draw(*shape), draw(shape[-1], seed=1) if with_bias else None
    torch.testing.assert_close(op(x, bias, backend="torch"), op(x, bias, backend="reference"), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_input_is_left_alone(op, backend):
    x, bias = draw(4, 5).requires_grad_(), draw(5, seed=1)
    before = x.detach().clone()
    out = op(x, bias, backend=backend)
    cotangent = torch.ones_like(out)
    out.backward(cotangent)
    assert torch.equal(x, before) and cotangent.eq(1).all() and torch.equal(bias, draw(5, seed=1))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_penalty_is_right_or_raises(op, backend):
    def penalty(call):
        x = draw(3, 4).requires_grad_()
        (first,) = torch.autograd.grad(call(x).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    formula = {
        quick_gelu: lambda x: x * torch.sigmoid(1.702 * x),
        gelu: lambda x: 0.5 * x * (1 + torch.erf(x * 0.5**0.5)),
    }[op]
    if op is quick_gelu and backend != "reference":
        with pytest.raises(RuntimeError, match='use backend="reference"'):
            penalty(lambda x: op(x, backend=backend))
    else:
        torch.testing.assert_close(penalty(lambda x: op(x, backend=backend)), penalty(formula))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(op, backend):
    x, bias = draw(4, 6, dtype=torch.bfloat16), draw(6, dtype=torch.float32, seed=1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = op(x, bias, backend=backend)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert bias.grad is not None and bias.grad.dtype == torch.float32
    torch.testing.assert_close(out.double(), op(x.double(), bias.double()), rtol=3e-2, atol=2e-2)


@pytest.mark.parametrize("op", OPS)
def test_errors_name_the_argument(op):
    name = op.__name__
    with pytest.raises(ValueError, match=f"{name}: x is torch.int64, want floating point"):
        op(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=rf"{name}: bias is torch.float32 \(3,\), want floating point \(4,\)"):
        op(torch.zeros(2, 4), torch.zeros(3))
    with pytest.raises(ValueError, match=f"{name}: bias is on meta, want cpu"):
        op(torch.zeros(2, 4), torch.zeros(4, device="meta"))
    with pytest.raises(ValueError, match=f"{name}: backend 'erf' is not one of triton, torch, reference"):
        op(torch.zeros(2), backend="erf")


def test_use_backend_reaches_the_op():
    x = draw(500, dtype=torch.bfloat16)
    with use_backend("reference"):
        got = quick_gelu(x)
    assert torch.equal(got, quick_gelu(x, backend="reference"))
    assert not torch.equal(got, quick_gelu(x))


@pytest.mark.parametrize("op", OPS)
def test_compiles_without_graph_break(op):
    x, bias = draw(3, 8, dtype=torch.float32).requires_grad_(), draw(8, dtype=torch.float32, seed=1).requires_grad_()
    got = torch.compile(op, fullgraph=True, backend="aot_eager")(x, bias)
    torch.testing.assert_close(got, op(x, bias))
    grads = torch.autograd.grad(got.sum(), (x, bias))
    torch.testing.assert_close(grads, torch.autograd.grad(op(x, bias).sum(), (x, bias)))
