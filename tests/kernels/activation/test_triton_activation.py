"""The kernels of quick_gelu and gelu against the formulas in float64 and PyTorch in the same dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from farl_kernels import launch, tables
from farl_kernels.activation import gelu, quick_gelu
from farl_kernels.activation.custom_ops import backward, forward

OPS = pytest.mark.parametrize("op", [quick_gelu, gelu])


def draw(device, *shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def plain(op):
    """The formula in PyTorch, rounded after each operation."""

    def call(x, bias):
        z = x if bias is None else x + bias.to(x.dtype)
        return z * torch.sigmoid(1.702 * z) if op is quick_gelu else torch.nn.functional.gelu(z)

    return call


def run(call, x, bias, upstream, cast=None):
    """The result and the gradients of x and bias, in `cast` or the dtypes that come."""
    leaves = [t.detach().to(cast or t.dtype).requires_grad_() for t in (x, bias) if t is not None]
    out = call(leaves[0], leaves[1] if bias is not None else None)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def compare(check_error, op, x, bias, upstream):
    got = run(lambda x, b: op(x, b, backend="triton"), x, bias, upstream)
    same = run(plain(op), x, bias, upstream)
    truth = run(lambda x, b: op(x, b, backend="reference"), x, bias, upstream, torch.float64)
    for name, factor, *values in zip(("out", "dx", "d bias"), (2, 3, 3), got, same, truth, strict=False):
        check_error(*values, factor=factor, name=name)


@pytest.fixture
def small_tiles() -> Iterator[None]:
    """Small tiles and few programs, so that small inputs have many of each kind."""
    with ExitStack() as stack:
        for name in ("quick_gelu", "gelu"):
            for bits in (16, 32):
                tile = {"ROWS": 2, "COLUMNS": 16, "num_warps": 1, "num_stages": 1}
                stack.enter_context(tables.override("activation", "forward", f"{name}_{bits}", tile))
                stack.enter_context(tables.override("activation", "backward", f"{name}_{bits}", tile | {"PROGRAMS": 6}))
        yield


@OPS
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 1), (2, 5, 48), (17, 33), (13, 64)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_error(device, kernel_dtype, op, shape, with_bias, poisoned, small_tiles, check_error):
    x, bias = 3 * draw(device, *shape, dtype=kernel_dtype), draw(device, shape[-1], seed=1)
    upstream = draw(device, *shape, dtype=kernel_dtype, seed=2)
    compare(check_error, op, x, bias if with_bias else None, upstream)


@OPS
def test_error_with_the_tables_of_the_package(device, kernel_dtype, op, poisoned, check_error):
    x, bias = 3 * draw(device, 40, 1100, dtype=kernel_dtype), draw(device, 1100, seed=1)
    compare(check_error, op, x, bias, draw(device, 40, 1100, dtype=kernel_dtype, seed=2))


@pytest.mark.slow
@OPS
@pytest.mark.parametrize(
    ("rows", "columns"), [(257, 32), (129, 255), (127, 512), (17, 2048), (197, 3072), (65, 4096), (1, 5120)]
)
def test_more_sizes(device, kernel_dtype, op, rows, columns, poisoned, check_error):
    x, bias = 3 * draw(device, rows, columns, dtype=kernel_dtype), draw(device, columns, seed=1)
    compare(check_error, op, x, bias, draw(device, rows, columns, dtype=kernel_dtype, seed=2))


@OPS
@pytest.mark.parametrize("parameters", [torch.float16, torch.float32])
def test_bias_of_another_dtype(device, op, parameters, check_error):
    x = 3 * draw(device, 9, 24, dtype=torch.float16 if parameters == torch.float32 else torch.float32)
    upstream = draw(device, 9, 24, dtype=x.dtype, seed=2)
    compare(check_error, op, x, draw(device, 24, dtype=parameters, seed=1), upstream)


@OPS
def test_large_arguments_stay_finite(device, kernel_dtype, op):
    limit = torch.finfo(kernel_dtype).max / (1 if kernel_dtype == torch.float16 else 4)
    x = torch.tensor([-limit, -100.0, -0.0, 100.0, limit], dtype=kernel_dtype, device=device, requires_grad=True)
    out = op(x, backend="triton")
    (dx,) = torch.autograd.grad(out.sum(dtype=torch.float32), x)
    assert out.tolist() == pytest.approx([0, 0, 0, 100, limit], rel=1e-6, abs=1e-20)
    assert dx.tolist() == pytest.approx([0, 0, 0.5, 1, 1], rel=1e-6, abs=1e-20)


LAYOUTS: dict[str, Callable[..., Tensor]] = {
    "sliced": lambda d, s: draw(d, 6, 12, seed=s)[1:4, 2:10],
    "transposed": lambda d, s: draw(d, 8, 3, seed=s).T,
    "swapped": lambda d, s: draw(d, 2, 3, 2, 8, seed=s).transpose(1, 2)[:, 1],
    "expanded": lambda d, s: draw(d, 1, 8, seed=s).expand(3, 8),
    "step_two": lambda d, s: draw(d, 3, 16, seed=s)[:, ::2],
    "one value": lambda d, s: draw(d, 1, seed=s).expand(3, 8),
}


@OPS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(device, op, layout):
    x, upstream = LAYOUTS[layout](device, 0), LAYOUTS[layout](device, 2)
    bias = draw(device, 16, seed=1)[::2]
    got = run(lambda x, b: op(x, b, backend="triton"), x, bias, upstream)
    want = run(lambda x, b: op(x, b, backend="reference"), x.contiguous(), bias.contiguous(), upstream.contiguous())
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    op=st.sampled_from([quick_gelu, gelu]),
    shape=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    with_bias=st.booleans(),
    size=st.floats(0.01, 50),
    wanted=st.sampled_from([(True, True), (True, False), (False, True)]),
)
def test_agrees_with_the_reference(device, small_tiles, op, shape, with_bias, size, wanted):
    found = []
    for backend in ("triton", "reference"):
        x, bias = size * draw(device, *shape), draw(device, shape[-1], seed=1) if with_bias else None
        leaves = [t.requires_grad_() for t, want in zip((x, bias), wanted, strict=True) if want and t is not None]
        out = op(x, bias, backend=backend)
        found.append([out.detach(), *(torch.autograd.grad(out, leaves, torch.ones_like(out)) if leaves else ())])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5 * max(1, size))


def test_zero_dimensions(device):
    x = torch.tensor(0.5, device=device, requires_grad=True)
    out = gelu(x, backend="triton")
    assert torch.autograd.grad(out, x)[0].shape == out.shape == ()
    torch.testing.assert_close(out, gelu(x, backend="reference"))


@OPS
def test_same_bits_every_time(device, kernel_dtype, op):
    x, bias = draw(device, 90, 100, dtype=kernel_dtype), draw(device, 100, seed=1)
    upstream = draw(device, 90, 100, dtype=kernel_dtype, seed=2)
    call = lambda x, b: op(x, b, backend="triton")
    assert all(a.equal(b) for a, b in zip(*(run(call, x, bias, upstream) for _ in range(2)), strict=True))


@OPS
def test_only_x_is_kept_and_nothing_unwanted_is_made(device, op):
    x, bias = draw(device, 6, 8), draw(device, 8, seed=1).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = op(x, bias, backend="triton")
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), bias.data_ptr()}
    with launch.recorded_launches() as launches:
        torch.autograd.grad(out.sum(), bias)
    assert launches[0].args[3] is None and launches[0].args[4] is not None


@OPS
@pytest.mark.parametrize("shape", [(3, 4), (1, 4), (4,)])
def test_gradients_may_be_changed_and_add_up(device, op, shape):
    x, bias = draw(device, *shape).requires_grad_(), draw(device, 4, seed=1).requires_grad_()
    upstream = draw(device, *shape, seed=2)
    out = op(x, bias, backend="triton")
    once = torch.autograd.grad(out, (x, bias), upstream, retain_graph=True)
    wanted = [g.clone() for g in once]
    once[0].fill_(torch.nan)
    assert once[1].equal(wanted[1])
    out.backward(upstream, retain_graph=True)
    out.backward(upstream)
    torch.testing.assert_close([x.grad, bias.grad], [2 * g for g in wanted])


@OPS
def test_gradients_of_gradients_are_refused(device, op):
    x = draw(device, 3, 4).requires_grad_()
    with pytest.raises(RuntimeError, match=rf'{op.__name__}: .* use backend="reference"'):
        torch.autograd.grad(op(x, backend="triton").sum(), x, create_graph=True)


@OPS
def test_what_the_kernels_refuse(device, op, monkeypatch):
    with pytest.raises(ValueError, match=r"'triton' cannot run this call: .* float64"):
        op(torch.zeros(2, dtype=torch.float64, device=device), backend="triton")
    with pytest.raises(ValueError, match=r"'triton' cannot run this call: .* float64"):
        op(torch.zeros(2, device=device), torch.zeros(2, dtype=torch.float64, device=device), backend="triton")
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1 interprets"):
        op(torch.zeros(2), backend="triton")


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("quick", [False, True])
def test_opcheck(device, backend, quick):
    x, bias = draw(device, 2, 3, 8, dtype=torch.float16), draw(device, 8, seed=1)
    torch.library.opcheck(forward, (x, bias, quick, backend))
    torch.library.opcheck(backward, (torch.ones_like(x), x, bias, quick, True, quick, backend))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@OPS
def test_compiled_equals_eager_at_every_length(device, op, compiler):
    torch._dynamo.reset()
    call = lambda x, b: op(x, b, backend="triton")
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=compiler)
    bias = draw(device, 8, seed=1)
    for rows in (3, 6):
        x, upstream = draw(device, rows, 8), draw(device, rows, 8, seed=2)
        got = run(compiled, x, bias, upstream)
        assert all(a.equal(b) for a, b in zip(got, run(call, x, bias, upstream), strict=True))


def test_meta_tensors_get_shapes_and_dtypes():
    x, bias = torch.empty(3, 8, dtype=torch.bfloat16, device="meta"), torch.empty(8, device="meta")
    out, dx, d_bias = run(lambda x, b: gelu(x, b, backend="triton"), x, bias, torch.empty(3, 8, device="meta"))
    assert (out.shape, out.dtype, dx.shape, dx.dtype) == ((3, 8), torch.bfloat16) * 2
    assert (d_bias.shape, d_bias.dtype) == ((8,), torch.float32)


@pytest.mark.gpu
@OPS
def test_past_two_to_the_31_elements(op):
    x = torch.randn(2**20 + 3, 2048, device="cuda", dtype=torch.float16, requires_grad=True)
    out = op(x, backend="triton")
    (dx,) = torch.autograd.grad(out, x, torch.ones_like(out))
    tail = x.detach()[-5:].clone().requires_grad_()
    want = op(tail, backend="triton")
    assert out[-5:].equal(want) and dx[-5:].equal(torch.autograd.grad(want, tail, torch.ones_like(want))[0])
