"""Single-query attention by kernels as PyTorch ops: registration, compilation, refusals."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from farl_kernels import launch, single_query_attention, tables
from farl_kernels.attention.single_query import cases, custom_ops

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def offsets(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def call(q, kv, cu_seqlens):
    longest = None if cu_seqlens is None else 9
    return single_query_attention(q, kv, cu_seqlens=cu_seqlens, max_seqlen=longest, backend="triton")


def inputs(packed, sequences=3, total=12):
    q = draw(sequences, 2, 16)
    if not packed:
        return q, draw(sequences, 5, 2, 2, 16, seed=1), None
    return q, draw(total, 2, 2, 16, seed=1), offsets(0, *range(1, sequences), total - 2)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("packed", [True, False])
def test_opcheck(backend, packed):
    forward = (*inputs(packed), 9, 0.25, backend)
    torch.library.opcheck(custom_ops.FORWARD, forward)
    out, lse = custom_ops.FORWARD(*forward)
    backward = (draw(3, 2, 16, seed=2), *forward[:3], out, lse, 9, 0.25, packed, backend)
    torch.library.opcheck(custom_ops.BACKWARD, backward)


@pytest.mark.parametrize("packed", [True, False])
def test_raw_ops_equal_their_references(packed):
    arguments = inputs(packed)
    results = [custom_ops.FORWARD(*arguments, 9, 0.25, backend) for backend in ("triton", "reference")]
    torch.testing.assert_close(*results)
    grad = draw(3, 2, 16, seed=2)
    got, want = (
        custom_ops.BACKWARD(grad, *arguments, *results[1], 9, 0.25, True, backend)
        for backend in ("triton", "reference")
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("compiler", "packed"), [("aot_eager", True), ("aot_eager", False), ("inductor", True)])
def test_compiled_equals_eager(compiler, packed):
    def gradients(function):
        q, kv, cu_seqlens = inputs(packed)
        q, kv = q.requires_grad_(), kv.requires_grad_()
        out = function(2 * q, kv, cu_seqlens)
        out.sin().sum().backward()
        return out.detach(), q.grad, kv.grad

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    torch.testing.assert_close(gradients(compiled), gradients(call))


def test_compiled_for_dynamic_shapes():
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for sequences, total in ((3, 9), (5, 11)):
        results = []
        for function in (compiled, call):
            q, kv, cu_seqlens = inputs(True, sequences, total)
            q, kv = q.requires_grad_(), kv.requires_grad_()
            out = function(q, kv, cu_seqlens)
            out.sin().sum().backward()
            results.append((out.detach(), q.grad, kv.grad))
        torch.testing.assert_close(*results)


def test_fake_tensors():
    with FakeTensorMode():
        q = torch.empty(3, 2, 16, dtype=torch.float16, device=DEVICE).requires_grad_()
        kv = torch.empty(3, 5, 2, 2, 16, dtype=torch.float16, device=DEVICE).requires_grad_()
        out = call(q, kv, None)
        out.sum().backward()
        assert out.shape == (3, 2, 16) and out.dtype == torch.float16
        assert q.grad is not None and q.grad.stride() == q.stride()
        assert kv.grad is not None and kv.grad.stride() == kv.stride()


def test_gradient_of_a_gradient_raises():
    q, kv, cu_seqlens = inputs(True)
    q.requires_grad_()
    out = call(q, kv, cu_seqlens)
    with pytest.raises(
        RuntimeError, match='single_query_attention: for gradients of gradients use backend="reference"'
    ):
        torch.autograd.grad(out.square().sum(), q, create_graph=True)


@pytest.mark.parametrize(
    ("dim", "dtype", "message"),
    [
        (12, torch.float32, "cannot run this call: head dim 12 is no multiple of 8 from 16 to 128"),
        (136, torch.float32, "head dim 136"),
        (16, torch.float64, "the tensors are float64"),
    ],
)
def test_refusals(dim, dtype, message):
    q, kv = torch.zeros(1, 1, dim, dtype=dtype, device=DEVICE), torch.zeros(1, 3, 2, 1, dim, dtype=dtype, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        call(q, kv, None)


@pytest.mark.parametrize("architecture", tables.architectures())
def test_every_table_entry_has_a_case_that_uses_it(architecture):
    table = tables.shipped(architecture, "attention_single_query")
    entries = {(kernel, bucket) for kernel, buckets in table.items() for bucket in buckets}
    assert entries == {(case.kernel, case.bucket) for case in cases.cases()}
    for case in cases.cases():
        with tables.use_architecture(architecture), launch.recorded_launches() as launches:
            case.prepare(torch.device("meta"))()
        want = table[case.kernel][case.bucket]
        assert any(want.items() <= found.options.items() for found in launches), case.name
