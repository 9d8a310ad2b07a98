"""The attention kernels as PyTorch ops: schemas, fakes, the compiler, gradients of gradients, who serves what."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from farl_kernels.attention import custom_ops, masked_attention, masked_attention_packed
from farl_kernels.attention.op import MASKED_ATTENTION, MASKED_ATTENTION_PACKED
from farl_kernels.launch import recorded_launches

OPS = torch.ops.farl_kernels


def draw(*shape, dtype=torch.float16, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def separate(backend, device, dtype):
    q, k, v = (draw(2, n, 1, 16, dtype=dtype, device=device, seed=n) for n in (3, 5, 6))
    v = v[:, :5]
    mask = torch.ones(2, 5, dtype=torch.bool, device=device)
    out, lse = OPS.attention_forward(q, k, v, mask, False, 0.25, backend)
    yield OPS.attention_forward, (q, k, v, mask, False, 0.25, backend)
    yield OPS.attention_backward, (out, q, k, v, mask, out, lse, False, 0.25, True, True, backend)
    yield OPS.attention_backward, (out, q, k, v, None, out, lse, False, 0.25, False, True, backend)


def packed(backend, device, dtype):
    qkv, bias = draw(2, 5, 3, 1, 16, dtype=dtype, device=device), draw(3, 1, 16, dtype=dtype, device=device, seed=1)
    out, lse = OPS.attention_qkv_forward(qkv, bias, None, True, 0.25, backend)
    yield OPS.attention_qkv_forward, (qkv, bias, None, True, 0.25, backend)
    yield OPS.attention_qkv_backward, (out, qkv, bias, None, out, lse, True, 0.25, True, backend)
    yield OPS.attention_qkv_backward, (out, qkv, None, None, out, lse, True, 0.25, False, backend)


@pytest.mark.parametrize("form", [separate, packed])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_opcheck(form, backend, device):
    for op, arguments in form(backend, device, torch.float16):
        torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("form", [separate, packed])
def test_both_backends_return_the_same_form(form, device):
    for (op, got), (_, want) in zip(
        form("triton", device, torch.float32), form("reference", device, torch.float32), strict=True
    ):
        for a, b in zip(op(*got), op(*want), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, check_stride=True)


def test_explicit_reference_is_the_gradient(device):
    qkv = draw(2, 6, 3, 2, 16, dtype=torch.float64, device=device).requires_grad_()
    bias = draw(3, 2, 16, dtype=torch.float64, device=device, seed=1).requires_grad_()
    mask = torch.rand(2, 6, generator=torch.Generator().manual_seed(2)).to(device) < 0.6
    mask[1] = False
    out = masked_attention_packed(qkv, qkv_bias=bias, key_mask=mask, scale=0.3, backend="reference")
    grad = draw(2, 6, 2, 16, dtype=torch.float64, device=device, seed=3)
    wanted = torch.autograd.grad(out, (qkv, bias), grad)
    plain = qkv.detach(), bias.detach()
    got, lse = OPS.attention_qkv_forward(*plain, mask, False, 0.3, "reference")
    torch.testing.assert_close(got, out, rtol=1e-12, atol=1e-12)
    grads = OPS.attention_qkv_backward(grad, *plain, mask, got, lse, False, 0.3, True, "reference")
    torch.testing.assert_close(grads, wanted, rtol=1e-11, atol=1e-12)


def call_separate(x, bias, mask):
    q, k, v = (x + bias).unbind(2)
    out = masked_attention(*(y.transpose(1, 2) for y in (q, k, v)), key_mask=mask, backend="triton")
    return out.transpose(1, 2).flatten(2)


def call_packed(x, bias, mask):
    return masked_attention_packed(x, qkv_bias=bias, key_mask=mask, causal=True, backend="triton").flatten(2)


def gradients(call, n, device):
    x, bias = draw(2, n, 3, 2, 16, device=device, seed=n), draw(3, 2, 16, device=device, seed=1)
    mask = torch.rand(2, n, generator=torch.Generator().manual_seed(n)).to(device) < 0.7
    x, bias = x.requires_grad_(), bias.requires_grad_()
    out = call(x, bias, mask)
    grad = draw(*out.shape, device=device, seed=4)
    return (out.detach(), *torch.autograd.grad(out, (x, bias), grad))


@pytest.mark.parametrize("call", [call_separate, call_packed])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_equals_eager(call, backend, device):
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    for got, want in zip(gradients(compiled, 9, device), gradients(call, 9, device), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)
    assert want.ne(0).any()


@pytest.mark.parametrize("call", [call_separate, call_packed])
def test_compiled_for_any_length(call, device):
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (9, 18):
        for got, want in zip(gradients(compiled, n, device), gradients(call, n, device), strict=True):
            torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)


def test_fake_tensors():
    with FakeTensorMode():
        qkv = torch.empty(2, 7, 3, 2, 16, device="cuda", dtype=torch.bfloat16)
        out = masked_attention_packed(qkv, causal=True, backend="triton")
        lse = torch.empty(2, 2, 7, device="cuda")
        grad, bias_grad = OPS.attention_qkv_backward(out, qkv, None, None, out, lse, True, 0.25, True, "triton")
    assert out.shape == (2, 7, 2, 16) and out.dtype == torch.bfloat16 and out.device.type == "cuda"
    assert grad.shape == qkv.shape and grad.dtype == qkv.dtype and grad.is_contiguous()
    assert bias_grad.shape == (3, 2, 16) and bias_grad.dtype == torch.float32


def test_meta_tensors_start_the_kernels_of_their_length():
    names = []
    for n, dtype in ((197, torch.bfloat16), (257, torch.bfloat16), (197, torch.float32)):
        qkv = torch.empty(2, n, 3, 2, 64, device="meta", dtype=dtype)
        with recorded_launches() as launches:
            out, lse = custom_ops._triton_qkv_forward(qkv, None, None, False, 0.125)
            custom_ops._triton_qkv_backward(out, qkv, None, None, out, lse, False, 0.125, True)
        names.append([x.kernel.__name__.removeprefix("attention_") for x in launches])
    long = ["long_forward_kernel", "long_delta_kernel", "backward_kernel"]
    assert names == [["short_forward_kernel", "backward_kernel"], long, long]
    assert launches[-1].args[0].shape == (2, 197, 2, 64)


def test_197_keys_cost_208_columns():
    q = torch.empty(2, 197, 1, 64, device="meta", dtype=torch.bfloat16)
    with recorded_launches() as launches:
        custom_ops._triton_forward(q, q, q, None, False, 0.125)
    assert [launches[0].options[f"KEYS_{i}"] for i in range(3)] == [128, 64, 16]


def test_key_chunks():
    from farl_kernels.attention.short.launchers import key_chunks

    for n in range(257):
        chunks = [x for x in key_chunks(n) if x]
        assert all(x in (16, 32, 64, 128) for x in chunks)
        assert n <= sum(chunks) <= max(16, n + 31)
        # Masks are applied to the last one only.
        assert sum(chunks[:-1]) <= n


@pytest.mark.parametrize("form", ["separate", "packed"])
def test_gradients_of_gradients_are_refused(form, device):
    x = draw(1, 5, 3, 1, 16, device=device).requires_grad_()
    if form == "packed":
        out = masked_attention_packed(x, backend="triton")
    else:
        out = masked_attention(*(y.transpose(1, 2) for y in x.unbind(2)), backend="triton")
    with pytest.raises(RuntimeError, match='for gradients of gradients use backend="reference"'):
        torch.autograd.grad(out.float().sum(), x, create_graph=True)


def test_the_order_of_backends():
    assert MASKED_ATTENTION.names[:2] == ("triton", "sdpa")
    assert MASKED_ATTENTION_PACKED.names[:2] == ("triton", "sdpa")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "the kernels compute in float32, the tensors are float64"),
        ({"dim": 20}, "head dim 20 is no multiple of 8 from 16 to 128"),
        ({"dim": 8}, "head dim 8 is no multiple"),
        ({"dim": 136}, "head dim 136 is no multiple"),
    ],
)
def test_what_the_kernels_refuse(change, message, device):
    shape = 1, 3, 3, 1, change.get("dim", 16)
    qkv = draw(*shape, dtype=change.get("dtype", torch.float32), device=device)
    with pytest.raises(ValueError, match=f"masked_attention_packed: backend 'triton' cannot run this call: {message}"):
        masked_attention_packed(qkv, backend="triton")
    with pytest.raises(ValueError, match=f"masked_attention: backend 'triton' cannot run this call: {message}"):
        masked_attention(*(x.transpose(1, 2) for x in qkv.unbind(2)), backend="triton")


def test_what_they_decline_unasked():
    def reason(n, dtype):
        qkv = torch.empty(1, n, 3, 1, 64, device="cuda", dtype=dtype)
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
        one = custom_ops.declines(q, k, v, causal=False, key_mask=None, scale=0.125)
        assert one == custom_ops.declines_packed(qkv, cu_seqlens=None)
        return one

    with FakeTensorMode():
        assert reason(256, torch.bfloat16) is None
        assert "over 256 keys" in str(reason(257, torch.bfloat16))
        assert "float32" in str(reason(197, torch.float32))
    assert "CUDA only" in str(custom_ops.declines(draw(1, 1, 3, 16), draw(1, 1, 3, 16)))


def test_nothing_changes_on_cpu_tensors_unasked():
    q, k, v = (draw(1, 1, 5, 16, dtype=torch.float32, seed=i) for i in range(3))
    assert torch.equal(masked_attention(q, k, v), masked_attention(q, k, v, backend="sdpa"))
