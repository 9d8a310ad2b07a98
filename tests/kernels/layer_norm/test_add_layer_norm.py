from __future__ import annotations

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from farl_kernels.dispatch import use_backend
from farl_kernels.layer_norm import add_layer_norm, apex_backend

BACKENDS = [None, "reference", "torch"]
EPS = 1e-5


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def loops(x, residual, weight, bias, x_bias, row_scale):
    """Row by row in Python floats: x [B, N, C], row_scale [B]."""
    normalised, summed = torch.empty_like(x), torch.empty_like(x)
    for b in range(x.shape[0]):
        for n in range(x.shape[1]):
            row = [float(residual[b, n, c] + row_scale[b] * (x[b, n, c] + x_bias[c])) for c in range(x.shape[2])]
            mean = math.fsum(row) / len(row)
            variance = math.fsum((value - mean) ** 2 for value in row) / len(row)
            out = [(value - mean) / math.sqrt(variance + EPS) for value in row]
            summed[b, n] = torch.tensor(row, dtype=x.dtype)
            normalised[b, n] = torch.tensor(out, dtype=x.dtype) * weight + bias
    return normalised, summed


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("affine_dtype", [None, torch.float32])
def test_equals_loops(backend, affine_dtype):
    x, residual, row_scale = draw(2, 3, 7), draw(2, 3, 7, seed=1), torch.tensor([0.0, 1.25], dtype=torch.float64)
    weight, bias, x_bias = (draw(7, seed=s) for s in (2, 3, 4))
    got = add_layer_norm(
        x,
        residual,
        weight,
        bias,
        eps=EPS,
        affine_dtype=affine_dtype,
        x_bias=x_bias,
        row_scale=row_scale,
        backend=backend,
    )
    torch.testing.assert_close(got, loops(x, residual, weight, bias, x_bias, row_scale), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("with_x_bias", [False, True])
@pytest.mark.parametrize("scale_shape", [None, (2,), (2, 3)])
def test_gradcheck(backend, with_residual, with_x_bias, scale_shape):
    row_scale = None if scale_shape is None else draw(*scale_shape, seed=9).abs()
    x, residual = draw(2, 3, 5).requires_grad_(), draw(2, 3, 5, seed=1).requires_grad_()
    weight, bias, x_bias = (draw(5, seed=s).requires_grad_() for s in (2, 3, 4))
    inputs = (x, weight, bias) + (residual,) * with_residual + (x_bias,) * with_x_bias

    def call(x, weight, bias, *rest):
        rest = list(rest)
        r = rest.pop(0) if with_residual else None
        xb = rest.pop(0) if with_x_bias else None
        return add_layer_norm(x, r, weight, bias, eps=EPS, x_bias=xb, row_scale=row_scale, backend=backend)

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_two_orders_of_cast_and_affine(backend, dtype):
    """Each convention equals its original to the bit: CLIP's casts last, FaRL's casts before the affine."""
    x = draw(64, 96, dtype=dtype) * 3
    weight, bias = 1 + 0.3 * draw(96, dtype=torch.float32, seed=1), draw(96, dtype=torch.float32, seed=2)
    clip = F.layer_norm(x.float(), (96,), weight, bias, EPS).to(dtype)
    farl = F.layer_norm(x.float(), (96,), None, None, EPS).to(dtype) * weight.to(dtype) + bias.to(dtype)
    assert not torch.equal(clip, farl)
    got_clip, same = add_layer_norm(x, None, weight, bias, eps=EPS, affine_dtype=torch.float32, backend=backend)
    got_farl, _ = add_layer_norm(x, None, weight, bias, eps=EPS, affine_dtype=None, backend=backend)
    assert torch.equal(same, x)
    # Another order of summation may move the last bit of a few values.
    assert (got_clip != clip).float().mean() < 0.005
    assert (got_farl != farl).float().mean() < 0.005


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("affine_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("stream", [None, torch.float32])
def test_error_in_every_dtype(backend, affine_dtype, dtype, stream):
    """`stream` float32 keeps the residual in float32 beside a half-precision x."""
    x = draw(16, 64, dtype=dtype).requires_grad_()
    residual = draw(16, 64, dtype=stream or dtype, seed=1).requires_grad_()
    weight, bias, x_bias = ((1 + 0.1 * draw(64, dtype=torch.float32, seed=s)).requires_grad_() for s in (2, 3, 4))
    inputs = (x, residual, weight, bias, x_bias)

    def call(backend, x, residual, weight, bias, x_bias):
        return add_layer_norm(
            x, residual, weight, bias, eps=EPS, affine_dtype=affine_dtype, x_bias=x_bias, backend=backend
        )

    exact_in = [t.detach().double().requires_grad_() for t in inputs]
    normalised, summed = call(backend, *inputs)
    exact_normalised, exact_summed = call("reference", *exact_in)
    assert normalised.dtype == dtype
    assert summed.dtype == torch.promote_types(dtype, stream or dtype)
    unit = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)  # the parameters are float32
    assert (normalised.double() - exact_normalised).abs().max() <= 10 * unit
    assert (summed.double() - exact_summed).abs().max() <= 6 * unit
    weights = draw(16, 64, seed=7), draw(16, 64, seed=8)

    def grads(outs, inputs):
        return torch.autograd.grad(sum((o.double() * w).sum() for o, w in zip(outs, weights, strict=True)), inputs)

    for got, want, t in zip(
        grads((normalised, summed), inputs), grads((exact_normalised, exact_summed), exact_in), inputs, strict=True
    ):
        assert got.dtype == t.dtype
        assert (got.double() - want).abs().max() <= 30 * unit * max(1.0, want.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded", "step_two"])
def test_any_strides(backend, layout):
    make = {
        "sliced": lambda s: draw(6, 5, 12, seed=s)[1:4, :, 2:10],
        "transposed": lambda s: draw(5, 3, 8, seed=s).transpose(0, 1),
        "expanded": lambda s: draw(1, 5, 8, seed=s).expand(3, 5, 8),
        "step_two": lambda s: draw(3, 5, 16, seed=s)[..., ::2],
    }[layout]
    x, residual, weight, bias = make(0), make(1), draw(16, seed=2)[::2], draw(1, seed=3).expand(8)
    got = add_layer_norm(x, residual, weight, bias, eps=EPS, backend=backend)
    want = add_layer_norm(
        x.contiguous(), residual.contiguous(), weight.contiguous(), bias.contiguous(), eps=EPS, backend="reference"
    )
    torch.testing.assert_close(got, want)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), min_size=0, max_size=2),
    channels=st.integers(1, 70),
    parts=st.tuples(*[st.booleans()] * 5),
    seed=st.integers(0, 1000),
)
def test_backends_agree(shape, channels, parts, seed):
    x = draw(*shape, channels, seed=seed)
    residual, weight, bias, x_bias, row_scale = (
        draw(*s, seed=seed + i) if part and s else None
        for i, (part, s) in enumerate(zip(parts, [x.shape, *[(channels,)] * 3, tuple(shape[:1])], strict=True), start=1)
    )
    arguments = {"eps": EPS, "x_bias": x_bias, "row_scale": row_scale}
    got = add_layer_norm(x, residual, weight, bias, backend="torch", **arguments)
    want = add_layer_norm(x, residual, weight, bias, backend="reference", **arguments)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_row_scale_is_not_rounded_to_16_bits(backend, with_residual):
    x, residual = (
        draw(64, 96, dtype=torch.bfloat16),
        draw(64, 96, dtype=torch.bfloat16, seed=1) if with_residual else None,
    )
    scale = torch.full((64,), 1 / 0.9)  # 0.16 % less in bfloat16
    exact = x.double() / 0.9 + (residual.double() if with_residual else 0)
    _, summed = add_layer_norm(x, residual, None, None, eps=EPS, row_scale=scale, backend=backend)
    assert summed.dtype == torch.bfloat16
    assert (summed != exact.to(torch.bfloat16)).float().mean() < 0.005


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_keeps_the_dtype_of_x(backend):
    x, residual = draw(4, 16, dtype=torch.bfloat16), draw(4, 16, dtype=torch.float32, seed=1)
    weight, bias = draw(16, dtype=torch.float32, seed=2), draw(16, dtype=torch.float32, seed=3)
    arguments = {"eps": EPS, "affine_dtype": torch.float32, "backend": backend}
    want = add_layer_norm(x, residual, weight, bias, **arguments)
    with torch.autocast("cpu", torch.bfloat16):
        got = add_layer_norm(x, residual, weight, bias, **arguments)
        wide, _ = add_layer_norm(residual, None, weight, bias, **arguments)
    assert (got[0].dtype, got[1].dtype, wide.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4, dtype=torch.int64)}, r"x is torch.int64 \(2, 4\), want floating point"),
        ({"residual": torch.zeros(2, 5)}, r"residual is torch.float32 \(2, 5\), want floating point \(2, 4\)"),
        ({"weight": torch.zeros(5)}, r"weight is torch.float32 \(5,\), want floating point \(4,\)"),
        ({"bias": torch.zeros(4, device="meta")}, "bias is on meta, want cpu"),
        ({"x_bias": torch.zeros(2, 4)}, "x_bias is"),
        ({"row_scale": torch.zeros(3)}, r"row_scale has shape \(3,\), want the leading dimensions of x \(2, 4\)"),
        ({"row_scale": torch.zeros(2, requires_grad=True)}, "row_scale must be a floating-point constant"),
        ({"affine_dtype": torch.bfloat16}, "affine_dtype is torch.bfloat16, want torch.float32"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"backend": "sdpa"}, "backend 'sdpa' is not one of triton, torch, reference, apex"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = {"x": torch.zeros(2, 4), "residual": None, "weight": None, "bias": None, "eps": EPS} | change
    with pytest.raises(ValueError, match=message):
        add_layer_norm(**arguments)


def test_absent_apex_is_a_clear_error_and_is_not_imported_unasked(monkeypatch):
    x = draw(2, 8)
    monkeypatch.setitem(sys.modules, "apex", None)  # as where it is not installed
    monkeypatch.setattr(apex_backend, "load", apex_backend.load.__wrapped__)
    add_layer_norm(x, None, None, None, eps=EPS)
    with pytest.raises(ValueError, match=r"'apex' cannot run this call: apex does not run here .*built from source"):
        add_layer_norm(x, None, None, None, eps=EPS, backend="apex")


def test_apex_backend_calls_apexs_function(monkeypatch):
    calls = []

    def fused_layer_norm_affine(x, weight, bias, normalized_shape, eps):
        calls.append(normalized_shape)
        return F.layer_norm(x, normalized_shape, weight, bias, eps)

    monkeypatch.setattr(apex_backend, "load", lambda: (fused_layer_norm_affine, None))
    x, weight, bias = draw(2, 8), draw(8, seed=1), draw(8, seed=2)
    with pytest.raises(ValueError, match="apex runs on CUDA tensors, x is on cpu"):
        add_layer_norm(x, x, weight, bias, eps=EPS, backend="apex")
    arguments = {"eps": EPS, "affine_dtype": torch.float32, "x_bias": None, "row_scale": None}
    got = apex_backend.add_layer_norm(x, x, weight, bias, **arguments)
    torch.testing.assert_close(got, add_layer_norm(x, x, weight, bias, eps=EPS, affine_dtype=torch.float32))
    assert calls == [(8,)]


def test_use_backend_reaches_the_op():
    x, weight = draw(3, 65, dtype=torch.float32) + 1e4, draw(65, dtype=torch.float32)
    with use_backend("reference"):
        got = add_layer_norm(x, None, weight, None, eps=EPS)
    assert torch.equal(got[0], add_layer_norm(x, None, weight, None, eps=EPS, backend="reference")[0])
    assert not torch.equal(got[0], add_layer_norm(x, None, weight, None, eps=EPS)[0])


def test_compiles_without_graph_break():
    x, residual, weight, bias = (draw(*s, dtype=torch.float32, seed=i) for i, s in enumerate([(3, 8)] * 2 + [(8,)] * 2))
    x.requires_grad_()
    call = lambda x, r, w, b: add_layer_norm(x, r, w, b, eps=EPS, affine_dtype=torch.float32)
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(x, residual, weight, bias)
    torch.testing.assert_close(got, call(x, residual, weight, bias))
    got[0].square().sum().backward()
    assert x.grad is not None and x.grad.ne(0).any()
