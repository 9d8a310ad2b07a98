"""add_layer_norm's raw ops as PyTorch sees them: opcheck, fake tensors, torch.compile."""

from __future__ import annotations

import pytest
import torch

from farl_kernels.layer_norm import add_layer_norm
from farl_kernels.layer_norm.custom_ops import backward, forward

EPS = 1e-5


def draw(device, *shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def call(x, residual, weight, bias, x_bias, row_scale=None, affine_dtype=None):
    return add_layer_norm(
        x,
        residual,
        weight,
        bias,
        eps=EPS,
        x_bias=x_bias,
        row_scale=row_scale,
        affine_dtype=affine_dtype,
        backend="triton",
    )


def leaves(device, rows, dtype=torch.float32, stream=torch.float32):
    made = [draw(device, rows, 5, 32, dtype=dtype), draw(device, rows, 5, 32, dtype=stream, seed=1)]
    made += [draw(device, 32, seed=s) for s in (2, 3, 4)]
    return [t.requires_grad_() for t in made]


def gradients(fn, inputs, **options):
    outs = fn(*inputs, **options)
    upstream = [draw(o.device, *o.shape, dtype=o.dtype, seed=9 + i) for i, o in enumerate(outs)]
    return [*outs, *torch.autograd.grad(outs, inputs, upstream)]


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("plain", [False, True])
def test_opcheck(device, backend, plain):
    x, residual, weight, bias, x_bias = (t.detach() for t in leaves(device, 2, stream=torch.float16))
    scale = draw(device, 2, seed=8)
    if plain:
        arguments = (x, None, weight, bias, None, None, EPS, True, backend)
    else:
        arguments = (x.half(), residual, weight, bias, x_bias, scale, EPS, False, backend)
    torch.library.opcheck(forward, arguments)
    normalised, summed, mean, rstd = forward(*arguments)
    upstream = torch.ones_like(normalised)
    if plain:
        wanted = [True, False, True, False, False]
        torch.library.opcheck(backward, (upstream, None, x, mean, rstd, weight, None, x.dtype, True, wanted, backend))
    else:
        rest = (mean, rstd, weight, scale, torch.float16, False, [True] * 5, backend)
        torch.library.opcheck(backward, (upstream, torch.ones_like(summed), summed, *rest))


@pytest.mark.parametrize(("compiler", "scaled"), [("aot_eager", False), ("aot_eager", True), ("inductor", False)])
def test_compiled_equals_eager(device, compiler, scaled):
    torch._dynamo.reset()
    inputs = leaves(device, 2, torch.float16 if scaled else torch.float32)
    options = {"row_scale": draw(device, 2, seed=8) if scaled else None, "affine_dtype": torch.float32}
    got = gradients(torch.compile(call, fullgraph=True, backend=compiler), inputs, **options)
    torch.testing.assert_close(got, gradients(call, inputs, **options), rtol=0, atol=0)


def test_compiled_inside_a_block(device):
    """With neighbours in the graph, plain first and then with a residual, as the blocks of a ViT use it."""
    torch._dynamo.reset()

    def block(x, residual, weight, bias, x_bias):
        first, stream = call(x * 2, None, weight, bias, None)
        return call(first.sin(), stream + residual, weight, bias, x_bias)

    inputs = leaves(device, 3)
    got = gradients(torch.compile(block, fullgraph=True, backend="aot_eager"), inputs)
    torch.testing.assert_close(got, gradients(block, inputs), rtol=1e-6, atol=1e-6)


def test_one_graph_serves_every_length(device):
    torch._dynamo.reset()
    graphs = []

    def counting(module, example):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    counted = torch.compile(call, fullgraph=True, dynamic=True, backend=counting)
    for rows in (3, 6):
        inputs = leaves(device, rows)
        torch.testing.assert_close(gradients(compiled, inputs), gradients(call, inputs), rtol=0, atol=0)
        counted(*inputs)
    assert len(graphs) == 1


def test_meta_tensors_get_shapes_and_dtypes():
    inputs = leaves("meta", 2, torch.bfloat16)
    normalised, summed, *grads = gradients(call, inputs, row_scale=torch.empty(2, device="meta"))
    assert (normalised.shape, normalised.dtype, summed.dtype) == ((2, 5, 32), torch.bfloat16, torch.float32)
    assert [(g.shape, g.dtype) for g in grads] == [(t.shape, t.dtype) for t in inputs]


@pytest.mark.gpu
def test_capture_in_a_graph():
    inputs = leaves("cuda", 2)
    gradients(call, inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    upstream = torch.ones(2, 5, 32, device="cuda")
    with torch.cuda.graph(graph):
        outs = call(*inputs)
        captured = [*outs, *torch.autograd.grad(outs, inputs, [upstream, upstream])]
    graph.replay()
    outs = call(*inputs)
    want = [*outs, *torch.autograd.grad(outs, inputs, [upstream, upstream])]
    assert all(a.equal(b) for a, b in zip(captured, want, strict=True))
