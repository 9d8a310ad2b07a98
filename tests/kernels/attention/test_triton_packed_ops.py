"""Packed attention by kernels as PyTorch ops: registration, compilation, refusals."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from farl_kernels import launch, masked_attention_packed, tables
from farl_kernels.attention.packed import cases, custom_ops

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def offsets(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def call(qkv, bias, cu_seqlens, max_seqlen=7):
    return masked_attention_packed(
        qkv, qkv_bias=bias, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, causal=True, backend="triton"
    )


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(backend, bias):
    qkv, qkv_bias = draw(12, 3, 2, 16), draw(3, 2, 16, seed=1) if bias else None
    forward = (qkv, qkv_bias, offsets(0, 4, 4, 11), 7, True, 0.25, backend)
    torch.library.opcheck(custom_ops.FORWARD, forward)
    out, lse = custom_ops.FORWARD(*forward)
    backward = (draw(12, 2, 16, seed=2), *forward[:3], out, lse, *forward[3:6], bias, backend)
    torch.library.opcheck(custom_ops.BACKWARD, backward)


@pytest.mark.parametrize("causal", [True, False])
def test_raw_ops_equal_their_references(causal):
    qkv, bias, cu_seqlens = draw(40, 3, 2, 16), draw(3, 2, 16, seed=1), offsets(0, 4, 4, 33)
    out, lse = custom_ops.FORWARD(qkv, bias, cu_seqlens, 29, causal, 0.25, "triton")
    want_out, want_lse = custom_ops.FORWARD(qkv, bias, cu_seqlens, 29, causal, 0.25, "reference")
    torch.testing.assert_close(out, want_out)
    assert lse[:, 33:].isneginf().all()
    # The bias of the keys, which the kernels leave out, moves the log-sum-exp of a query, and nothing else.
    q, k_bias = (qkv[:, 0] + bias[0]).transpose(0, 1), bias[1]
    shift = 0.25 * (q * k_bias[:, None]).sum(-1)
    torch.testing.assert_close(lse[:, :33], (want_lse - shift)[:, :33])
    grad = draw(40, 2, 16, seed=2)
    got = custom_ops.BACKWARD(grad, qkv, bias, cu_seqlens, out, lse, 29, causal, 0.25, True, "triton")
    want = custom_ops.BACKWARD(grad, qkv, bias, cu_seqlens, out, lse, 29, causal, 0.25, True, "reference")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_equals_eager(compiler):
    cu_seqlens = offsets(0, 3, 3, 9)

    def gradients(function):
        qkv, bias = draw(11, 3, 2, 16).requires_grad_(), draw(3, 2, 16, seed=1).requires_grad_()
        out = function(2 * qkv, bias, cu_seqlens)
        out.sin().sum().backward()
        return out.detach(), qkv.grad, bias.grad

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    torch.testing.assert_close(gradients(compiled), gradients(call))


def test_compiled_for_dynamic_shapes():
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for total, cu_seqlens in ((11, offsets(0, 3, 3, 9)), (20, offsets(0, 7, 12, 13, 19))):
        results = []
        for function in (compiled, call):
            qkv, bias = draw(total, 3, 2, 16).requires_grad_(), draw(3, 2, 16, seed=1).requires_grad_()
            out = function(qkv, bias, cu_seqlens)
            out.sin().sum().backward()
            results.append((out.detach(), qkv.grad, bias.grad))
        torch.testing.assert_close(*results)


def test_fake_tensors():
    with FakeTensorMode():
        qkv = torch.empty(12, 3, 2, 16, dtype=torch.float16).requires_grad_()
        out = custom_ops.attention_packed(
            qkv,
            qkv_bias=None,
            cu_seqlens=torch.empty(4, dtype=torch.int32),
            max_seqlen=7,
            causal=True,
            key_mask=None,
            scale=0.25,
        )
        out.sum().backward()
        assert out.shape == (12, 2, 16) and out.dtype == torch.float16
        assert qkv.grad is not None and qkv.grad.stride() == qkv.stride()


def test_gradient_of_a_gradient_raises():
    qkv = draw(9, 3, 1, 16).requires_grad_()
    out = call(qkv, None, offsets(0, 4, 9))
    with pytest.raises(
        RuntimeError, match='masked_attention_packed: for gradients of gradients use backend="reference"'
    ):
        torch.autograd.grad(out.square().sum(), qkv, create_graph=True)


@pytest.mark.parametrize(
    ("qkv", "message"),
    [
        (torch.zeros(4, 3, 1, 12), "cannot run this call: head dim 12 is no multiple of 8 from 16 to 128"),
        (torch.zeros(4, 3, 1, 136), "head dim 136"),
        (torch.zeros(4, 3, 1, 16, dtype=torch.float64), "the tensors are float64"),
    ],
)
def test_refusals(qkv, message):
    with pytest.raises(ValueError, match=message):
        call(qkv.to(DEVICE), None, offsets(0, 4))


def test_float32_is_not_taken_unasked():
    qkv, cu_seqlens = torch.zeros(4, 3, 1, 16), torch.zeros(2, dtype=torch.int32)
    reason = custom_ops.declines(qkv, cu_seqlens=cu_seqlens)
    assert reason is not None and "float32" in reason


@pytest.mark.parametrize("architecture", tables.architectures())
def test_every_table_entry_has_a_case_that_uses_it(architecture):
    table = tables.shipped(architecture, "attention_packed")
    entries = {(kernel, bucket) for kernel, buckets in table.items() for bucket in buckets}
    assert entries == {(case.kernel, case.bucket) for case in cases.cases()}
    for case in cases.cases():
        with tables.use_architecture(architecture), launch.recorded_launches() as launches:
            case.prepare(torch.device("meta"))()
        want = table[case.kernel][case.bucket]
        assert any(want.items() <= found.options.items() for found in launches), case.name
