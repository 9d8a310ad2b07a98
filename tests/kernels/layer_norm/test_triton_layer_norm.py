"""The kernels of add_layer_norm against the formula in float64 and PyTorch in the same dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from farl_kernels import launch, tables
from farl_kernels.layer_norm import add_layer_norm

EPS = 1e-5
NAMES = ("x", "residual", "weight", "bias", "x_bias")
CONVENTIONS = pytest.mark.parametrize("affine_dtype", [None, torch.float32], ids=["farl", "clip"])


def draw(device, *shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def make(device, shape, dtype, *, stream=None, parameters=torch.float32, absent=()):
    """x, residual, weight, bias and x_bias."""
    dtypes = {"x": dtype, "residual": stream or dtype}
    shapes = {"x": shape, "residual": shape}
    made: list[Tensor | None] = []
    for seed, name in enumerate(NAMES):
        value = draw(device, *shapes.get(name, shape[-1:]), dtype=dtypes.get(name, parameters), seed=seed)
        made.append(None if name in absent else 1 + value / 4 if name == "weight" else value)
    return made


def run(backend, inputs, *, row_scale=None, wide=False, used=(True, True), upstream=None, **options):
    """Outputs and gradients by name. `wide` computes in float64; `used` says which outputs get a gradient."""
    cast = lambda t: None if t is None else t.detach().double() if wide else t.detach()
    leaves = {n: cast(t).requires_grad_() for n, t in zip(NAMES, inputs, strict=True) if t is not None}
    x, residual, weight, bias, x_bias = (leaves.get(n) for n in NAMES)
    options |= {"x_bias": x_bias, "row_scale": cast(row_scale)}
    outs = add_layer_norm(x, residual, weight, bias, eps=EPS, backend=backend, **options)
    grads = upstream or [draw(o.device, *o.shape, dtype=o.dtype, seed=20 + i) for i, o in enumerate(outs)]
    pairs = [(o, g.to(o.dtype)) for o, g, u in zip(outs, grads, used, strict=True) if u]
    found = torch.autograd.grad(
        [o for o, _ in pairs], list(leaves.values()), [g for _, g in pairs], allow_unused=True, materialize_grads=True
    )
    named = {"normalised": outs[0].detach(), "sum": outs[1].detach()}
    return named, {f"d {n}": g for n, g in zip(leaves, found, strict=True)}


def compare(check_error, inputs, **options):
    """Forward at most twice, backward at most three times as far from float64 as PyTorch in the same dtype."""
    # The cotangents are rounded once, to what the op itself returns, and shared.
    outs = add_layer_norm(*inputs[:4], eps=EPS, x_bias=inputs[4], backend="torch")
    upstream = [draw(o.device, *o.shape, dtype=o.dtype, seed=20 + i) for i, o in enumerate(outs)]
    got, plain, truth = (
        run(backend, inputs, upstream=upstream, wide=wide, **options)
        for backend, wide in (("triton", False), ("torch", False), ("reference", True))
    )
    for which, factor in ((0, 2), (1, 3)):
        assert got[which].keys() == truth[which].keys()
        for name in got[which]:
            check_error(got[which][name], plain[which][name], truth[which][name], factor=factor, name=name)


@pytest.fixture
def small_tiles() -> Iterator[None]:
    """Tiles of few rows and at most two programs, so that short inputs have many of each kind."""
    with ExitStack() as stack:
        for pieces in (2, 3):
            for bits in (16, 32):
                bucket = f"{pieces}_pieces_{bits}"
                tile = {"TILE": 128, "num_warps": 4, "num_stages": 1}
                stack.enter_context(tables.override("layer_norm", "forward", bucket, tile))
                stack.enter_context(tables.override("layer_norm", "backward", bucket, tile | {"PROGRAMS": 2}))
        yield


@CONVENTIONS
@pytest.mark.parametrize("columns", [1, 5, 32, 33, 192, 320, 768, 1280])
def test_error(device, kernel_dtype, affine_dtype, columns, poisoned, small_tiles, check_error):
    compare(check_error, make(device, (2, 5, columns), kernel_dtype), affine_dtype=affine_dtype)


@CONVENTIONS
@pytest.mark.parametrize("scale_shape", [(3,), (3, 7)])
def test_row_scale(device, kernel_dtype, affine_dtype, scale_shape, poisoned, check_error):
    inputs = make(device, (3, 7, 96), kernel_dtype)
    scale = draw(device, *scale_shape, seed=9).abs()
    scale.view(-1)[1] = 0
    compare(check_error, inputs, affine_dtype=affine_dtype, row_scale=scale)
    _, grads = run("triton", inputs, affine_dtype=affine_dtype, row_scale=scale)
    dropped = grads["d x"][1] if scale.ndim == 1 else grads["d x"][0, 1]
    assert dropped.eq(0).all()


@CONVENTIONS
@pytest.mark.parametrize("parameters", [torch.float32, torch.float16])
def test_mixed_dtypes(device, affine_dtype, parameters, poisoned, check_error):
    """A float32 residual stream beside half-precision branches, the other way about, and parameters of either."""
    for x, stream in ((torch.float16, torch.float32), (torch.float32, torch.float16)):
        inputs = make(device, (4, 48), x, stream=stream, parameters=parameters)
        compare(check_error, inputs, affine_dtype=affine_dtype)


@pytest.mark.slow
@CONVENTIONS
@pytest.mark.parametrize(
    ("rows", "columns"),
    [(257, 48), (129, 96), (197, 384), (65, 512), (63, 640), (77, 769), (64, 1024), (17, 2048), (16, 3072), (5, 4095)],
)
def test_more_sizes(device, kernel_dtype, affine_dtype, rows, columns, poisoned, check_error):
    compare(check_error, make(device, (rows, columns), kernel_dtype), affine_dtype=affine_dtype)


@CONVENTIONS
def test_bits_of_both_conventions(device, affine_dtype):
    """In half precision the result is PyTorch's but for a few last bits: every rounding is where it should be."""
    inputs = make(device, (64, 96), torch.float16, absent=("x_bias",))
    got, _ = run("triton", inputs, affine_dtype=affine_dtype)
    want, _ = run("torch", inputs, affine_dtype=affine_dtype)
    assert got["sum"].equal(want["sum"])
    assert (got["normalised"] != want["normalised"]).float().mean() < 0.005


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    leading=st.lists(st.integers(0, 5), min_size=0, max_size=2),
    columns=st.integers(1, 70),
    parts=st.tuples(*[st.booleans()] * 5),
    clip=st.booleans(),
    used=st.sampled_from([(True, True), (True, False), (False, True)]),
)
def test_any_subset_of_arguments(device, small_tiles, leading, columns, parts, clip, used):
    absent = [n for n, part in zip(NAMES[1:], parts[1:], strict=True) if not part]
    inputs = make(device, (*leading, columns), torch.float32, absent=absent)
    scale = draw(device, leading[0], seed=9) if parts[0] and leading else None
    options = {"affine_dtype": torch.float32 if clip else None, "row_scale": scale, "used": used}
    got, want = (run(backend, inputs, **options) for backend in ("triton", "reference"))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


def test_large_mean(device, check_error):
    inputs = make(device, (6, 96), torch.float32)
    inputs[1] += 1e3
    compare(check_error, inputs, affine_dtype=torch.float32)


LAYOUTS: dict[str, Callable[..., Tensor]] = {
    "sliced": lambda d, s: draw(d, 6, 5, 48, seed=s)[1:4, :, 2:34],
    "rows of a wider tensor": lambda d, s: draw(d, 3, 5, 64, seed=s)[..., :32],
    "transposed": lambda d, s: draw(d, 5, 3, 32, seed=s).transpose(0, 1),
    "expanded": lambda d, s: draw(d, 1, 5, 32, seed=s).expand(3, 5, 32),
    "step_two": lambda d, s: draw(d, 3, 5, 64, seed=s)[..., ::2],
    "one value": lambda d, s: draw(d, 1, seed=s).expand(3, 5, 32),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(device, layout):
    strided = LAYOUTS[layout]
    vectors = [draw(device, 64, seed=2)[::2], draw(device, 1, seed=3).expand(32), draw(device, 40, seed=4)[3:35]]
    inputs = [strided(device, 0), strided(device, 1), *vectors]
    scale = draw(device, 10, 3, seed=5).T[:, ::2]
    for absent in ((), (1, 4)):
        some = [None if i in absent else t for i, t in enumerate(inputs)]
        row_scale = None if absent else scale
        upstream = [strided(device, 7), strided(device, 8)]
        got = run("triton", some, row_scale=row_scale, upstream=upstream)
        dense = [None if t is None else t.contiguous() for t in some]
        want = run("reference", dense, row_scale=row_scale, upstream=[u.contiguous() for u in upstream])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("needed", [*[(n,) for n in NAMES], ("x", "weight"), ("residual", "x_bias")])
def test_only_wanted_gradients_are_made(device, needed, monkeypatch):
    x, residual, weight, bias, x_bias = inputs = make(device, (5, 32), torch.float32)
    _, want = run("reference", inputs)
    leaves = [t for n, t in zip(NAMES, inputs, strict=True) if n in needed]
    for leaf in leaves:
        leaf.requires_grad_()
    outs = add_layer_norm(x, residual, weight, bias, eps=EPS, x_bias=x_bias, backend="triton")
    upstream = [draw(o.device, *o.shape, seed=20 + i) for i, o in enumerate(outs)]
    with launch.recorded_launches() as launches:
        torch.autograd.grad(outs, leaves, upstream, retain_graph=True)
    *_, d_residual, dx, d_weight, d_bias, d_x_bias = launches[0].args[:12]
    shared = "x" in needed or "residual" in needed
    assert (d_residual is not None, dx) == (shared, None)
    assert [d_weight is not None, d_bias is not None, d_x_bias is not None] == [n in needed for n in NAMES[2:]]
    got = torch.autograd.grad(outs, leaves, upstream)
    torch.testing.assert_close(list(got), [want[f"d {n}"] for n in NAMES if n in needed], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (0, 4, 8)])
def test_nothing_to_do(device, shape, poisoned):
    outs, grads = run("triton", make(device, shape, torch.float32))
    assert outs["normalised"].shape == outs["sum"].shape == shape
    assert all(grads[f"d {n}"].eq(0).all() for n in NAMES)


def test_same_bits_every_time(device, kernel_dtype):
    inputs = make(device, (120, 96), kernel_dtype)
    first, again = (run("triton", inputs) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert all(a[name].equal(b[name]) for name in a)


@pytest.mark.parametrize("absent", [(), ("residual", "x_bias")])
def test_only_the_sum_and_two_numbers_a_row_are_kept(device, absent):
    x, residual, weight, bias, x_bias = make(device, (6, 64), torch.float32, absent=absent)
    x.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _, summed = add_layer_norm(x, residual, weight, bias, eps=EPS, x_bias=x_bias, backend="triton")
    new = [t for t in kept if t.data_ptr() not in (summed.data_ptr(), weight.data_ptr())]
    assert sorted(t.numel() for t in new) == [6, 6]
    if absent:
        assert summed is x


def test_gradients_may_be_changed_and_add_up(device):
    """x and residual get one tensor as their gradients; autograd must not let that be seen."""
    inputs = [t.requires_grad_() for t in make(device, (4, 16), torch.float32)]
    x, residual, weight, bias, x_bias = inputs

    def backward():
        # Through other nodes too, where autograd sums what it was given in place if it may.
        doubled, branch = residual * 2, x * 1
        outs = add_layer_norm(branch, doubled, weight, bias, eps=EPS, x_bias=x_bias, backend="triton")
        outs = (*outs, branch, doubled)
        torch.autograd.backward(outs, [draw(o.device, *o.shape, seed=20 + i) for i, o in enumerate(outs)])

    backward()
    once = [t.grad.clone() for t in inputs]
    torch.testing.assert_close(once[1] - 2 * draw(device, 4, 16, seed=23), 2 * (once[0] - draw(device, 4, 16, seed=22)))
    backward()
    torch.testing.assert_close([t.grad for t in inputs], [2 * g for g in once])
    for t in inputs:
        t.grad = None
    outs = add_layer_norm(x, residual, weight, bias, eps=EPS, x_bias=x_bias, backend="triton")
    torch.autograd.backward(outs, [torch.ones_like(o) for o in outs])
    wanted = [t.grad.clone() for t in inputs]
    for t, want in zip(inputs, wanted, strict=True):
        assert t.grad.equal(want)
        t.grad.fill_(torch.nan)


def test_gradients_of_gradients_are_refused(device):
    x, residual, weight, bias, x_bias = make(device, (3, 16), torch.float32)
    x.requires_grad_()
    normalised, _ = add_layer_norm(x, residual, weight, bias, eps=EPS, x_bias=x_bias, backend="triton")
    with pytest.raises(RuntimeError, match=r'add_layer_norm: .* use backend="reference"'):
        torch.autograd.grad(normalised.sum(), x, create_graph=True)


def test_what_the_kernels_refuse(device, monkeypatch):
    x = torch.zeros(2, 8, device=device)
    call = lambda x, r=None: add_layer_norm(x, r, None, None, eps=EPS, backend="triton")
    with pytest.raises(ValueError, match=r"'triton' cannot run this call: .* float64"):
        call(x.double())
    with pytest.raises(ValueError, match=r"'triton' cannot run this call: .* float64"):
        call(x, x.double())
    with pytest.raises(ValueError, match="rows of 4097 do not fit in registers, want at most 4096"):
        call(torch.zeros(1, 4097, device=device))
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1 interprets"):
        call(torch.zeros(2, 8))


@pytest.mark.parametrize("columns", [768, 1024])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_lane_loads_16_bytes(columns, dtype):
    """Of rows that the models have: no lane is idle, and a warp needs no other where it has a row to itself."""
    x = torch.empty(8, columns, dtype=dtype, device="meta")
    weight = torch.empty(columns, device="meta")
    from farl_kernels.layer_norm import launchers

    for architecture in tables.architectures():
        with tables.use_architecture(architecture), launch.recorded_launches() as launches:
            launchers.forward(x, x, weight, weight, weight, None, EPS, False)
            statistics = torch.empty(8, device="meta")
            wanted = [True, False, True, True, True]
            launchers.backward(x, x, x, statistics, statistics, weight, None, dtype, False, wanted)
        for options in (found.options for found in launches):
            assert options["CHUNK"] * options["CHUNKS"] == columns
            lanes = 32 * options["num_warps"]
            assert options["ROWS"] * options["CHUNK"] * dtype.itemsize == 16 * lanes


@pytest.mark.gpu
def test_past_two_to_the_31_elements():
    rows, columns = 2**21 + 3, 1024
    x = torch.randn(rows, columns, device="cuda", dtype=torch.float16)
    normalised, summed = add_layer_norm(x, x, None, None, eps=EPS, backend="triton")
    want, _ = add_layer_norm(x[-5:], x[-5:], None, None, eps=EPS, backend="triton")
    assert normalised[-5:].equal(want) and summed[-5:].equal(2 * x[-5:])
