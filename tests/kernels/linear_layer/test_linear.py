"""The linear layer of mixed precision: F.linear where nothing is cast, else 16-bit products and unrounded gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from farl_kernels import gemm, linear, use_backend

BACKENDS = [None, "torch", "reference"]
HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(params=[True, False], ids=["products in float32", "products in 16 bits"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CPU does without and with AMX; a GPU makes no difference."""
    monkeypatch.setattr(gemm, "_CPU_PREFERS_FLOAT32", request.param)


def draw(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()


def gradients(out: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    # Eighths, which every dtype holds.
    upstream = (8 * draw(*out.shape, seed=9).detach()).round() / 8
    return list(torch.autograd.grad(out, inputs, upstream.to(out.device, out.dtype)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_of_one_dtype_it_is_f_linear(dtype: torch.dtype, backend: str | None) -> None:
    inputs = draw(3, 4, 5, dtype=dtype), draw(6, 5, dtype=dtype, seed=1), draw(6, dtype=dtype, seed=2)
    got, wanted = linear(*inputs, backend=backend), F.linear(*inputs)
    assert got.equal(wanted)
    assert all(map(torch.equal, gradients(got, inputs), gradients(wanted, inputs)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_under_autocast_it_is_f_linear(backend: str | None) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        inputs = draw(4, 5, dtype=dtype), draw(6, 5, seed=1), draw(6, seed=2)
        with torch.autocast("cpu", torch.bfloat16):
            got, wanted = linear(*inputs, backend=backend), F.linear(*inputs)
        assert got.equal(wanted) and got.dtype == torch.bfloat16
        assert all(map(torch.equal, gradients(got, inputs), gradients(wanted, inputs)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(5,), (1, 5), (0, 5), (7, 5), (2, 3, 5)], ids=str)
def test_of_two_dtypes_equals_the_formula(shape: tuple[int, ...], backend: str | None) -> None:
    """In float64 with float32 weights, where nothing is rounded on the way but the gradients of these."""
    inputs = draw(*shape, dtype=torch.float64), draw(6, 5, seed=1), draw(6, seed=2)
    out = linear(*inputs, backend=backend)
    wanted = inputs[0] @ inputs[1].double().T + inputs[2]
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    for got, truth, x in zip(gradients(out, inputs), gradients(wanted, inputs), inputs, strict=True):
        assert got.dtype == x.dtype and got.shape == x.shape
        torch.testing.assert_close(got, truth, rtol=1e-6 if x.dtype == torch.float32 else 1e-12, atol=1e-6)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_errors_against_those_of_rounded_weights(
    dtype: torch.dtype, device: torch.device, check_error: Callable[..., None]
) -> None:
    """Result and dx within the bounds of every op, and gradients of parameters with no rounding to 16 bits at all."""
    inputs = (
        draw(9, 33, 64, dtype=dtype, device=device),
        draw(48, 64, device=device, seed=1),
        draw(48, device=device, seed=2),
    )
    exact = [x.detach().to(dtype).double().requires_grad_() for x in inputs]
    got, plain, truth = linear(*inputs), linear(*inputs, backend="reference"), F.linear(*exact)
    check_error(got, plain, truth, factor=2)
    found, eager, wanted = (gradients(y, x) for y, x in ((got, inputs), (plain, inputs), (truth, tuple(exact))))
    check_error(found[0], eager[0], wanted[0], factor=3)
    for mine, right in zip(found[1:], wanted[1:], strict=True):
        assert mine.dtype == torch.float32
        assert (mine - right).abs().max() <= 2e-6 * right.abs().max()
    assert (eager[1] - wanted[1]).abs().max() > 1e-4 * wanted[1].abs().max()


@pytest.mark.usefixtures("products")
def test_strided_inputs_and_gradients(device: torch.device) -> None:
    """Rows of a larger tensor, a transposed weight, a part of a weight, and an upstream gradient without strides."""
    x, weight = draw(4, 3, 8, dtype=torch.bfloat16, device=device), draw(8, 12, device=device, seed=1)
    for rows in (x[:, 0], x.transpose(0, 1), x[..., ::1].expand(2, 4, 3, 8)):
        for matrix in (weight.t(), weight.t()[:5], weight[:, :8]):
            out = linear(rows, matrix)
            wanted = F.linear(rows.double(), matrix.bfloat16().double())
            torch.testing.assert_close(out.double(), wanted, rtol=2**-8, atol=1e-2)
            got = torch.autograd.grad(out.sum(), (x, weight))
            for a, b in zip(got, torch.autograd.grad(wanted.sum(), (x, weight)), strict=True):
                torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-4)


@pytest.mark.usefixtures("products")
def test_the_gradient_of_a_transposed_weight_is_laid_out_as_it_is() -> None:
    """Autograd would copy any other."""
    x, weight = draw(4, 8, dtype=torch.bfloat16), draw(8, 6, seed=1)
    (through_view,) = torch.autograd.grad(linear(x, weight.t()).sum(), weight)
    (straight,) = torch.autograd.grad(linear(x, weight.t().contiguous()).sum(), weight)
    assert through_view.is_contiguous() and through_view.equal(straight)


@pytest.mark.usefixtures("products")
def test_only_what_a_gradient_needs_is_kept() -> None:
    def kept(x: Tensor, weight: Tensor) -> list[tuple[torch.dtype, int]]:
        found = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (found.append((t.dtype, t.numel())), t)[1], lambda t: t
        ):
            linear(x, weight)
        return found

    x, weight = draw(7, 8, dtype=torch.bfloat16), draw(6, 8, seed=1)
    inputs, matrix = (torch.bfloat16, 56), (torch.bfloat16, 48)
    assert kept(x, weight) == [inputs, matrix]
    assert kept(x.detach(), weight) == [inputs]
    assert kept(x, weight.detach()) == [matrix]
    with torch.no_grad():
        assert kept(x, weight) == []


def test_backward_passes_add_up() -> None:
    inputs = draw(3, 4, dtype=torch.bfloat16), draw(5, 4, seed=1), draw(5, seed=2)
    out = linear(*inputs)
    once = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    out.sum().backward(retain_graph=True)
    out.sum().backward()
    for x, gradient in zip(inputs, once, strict=True):
        assert x.grad is not None
        torch.testing.assert_close(x.grad, 2 * gradient)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_compiles_to_one_graph(backend: str | None) -> None:
    x, weight, bias = draw(3, 4, 8, dtype=torch.bfloat16), draw(6, 8, seed=1), draw(6, seed=2)

    def both(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear(linear(x, weight, bias, backend=backend), weight.t(), backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    got, wanted = compiled(x, weight, bias), both(x, weight, bias)
    assert got.equal(wanted)
    inputs = (x, weight, bias)
    assert all(map(torch.equal, gradients(got, inputs), gradients(wanted, inputs)))


def test_gradients_of_gradients_are_right_or_refused() -> None:
    x, weight = draw(3, 4, dtype=torch.bfloat16), draw(5, 4, seed=1)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        torch.autograd.grad(linear(x, weight).square().sum(), x, create_graph=True)
    with use_backend("reference"):
        (first,) = torch.autograd.grad(linear(x, weight).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), weight)
    matrix = weight.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad((2 * x.double() @ matrix.T @ matrix).sum(), matrix)
    assert (second - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.usefixtures("products")
def test_three_products_are_counted() -> None:
    x, weight = draw(2, 7, 8, dtype=torch.bfloat16), draw(6, 8, seed=1)
    with FlopCounterMode(display=False) as counter:
        linear(x, weight).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 14 * 8 * 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(8)}, r"weight is torch\.float32 \(8,\), want floating point \[D, C\]"),
        ({"weight": torch.zeros(6, 8, dtype=torch.int64)}, "weight is torch.int64"),
        ({"x": torch.zeros(3, 7)}, r"x is torch\.float32 \(3, 7\), want floating point \[\.\.\., 8\]"),
        ({"x": torch.zeros(())}, "x is"),
        ({"bias": torch.zeros(8)}, r"bias is torch\.float32 \(8,\), want floating point \[6\]"),
        ({"weight": torch.zeros(6, 8, device="meta")}, "weight is on meta, want cpu"),
        ({"backend": "triton"}, "'triton' is not one of torch, reference"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_that_do_not_fit_are_named(change: dict[str, object], message: str) -> None:
    arguments = {"x": torch.zeros(3, 8), "weight": torch.zeros(6, 8), "bias": torch.zeros(6)} | change
    with pytest.raises(ValueError, match=message):
        linear(**arguments)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_in_a_graph_it_gives_the_same_bits() -> None:
    x, weight = draw(70, 40, dtype=torch.bfloat16, device="cuda"), draw(24, 40, device="cuda", seed=1)
    wanted = torch.autograd.grad(linear(x, weight).sum(), (x, weight))
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(linear(x, weight).sum(), (x, weight))
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        got = torch.autograd.grad(linear(x, weight).sum(), (x, weight))
    graph.replay()
    assert all(map(torch.equal, got, wanted))
