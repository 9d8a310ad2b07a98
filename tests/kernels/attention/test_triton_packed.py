"""The kernels of packed attention against float64, and what must not change their result."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from farl_kernels import masked_attention, masked_attention_packed, tables

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RAGGED = [0, 3, 0, 0, 40, 17, 66, 0]
LENGTHS = [[1], [5, 0, 0, 2], [16, 17], RAGGED]
LONG = [[63, 64, 65], [127], [77, 1, 77, 76], [128, 129], [196, 197, 198], [256, 257], [577], [1, 785, 2], [1025]]


def cumulative(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def run(qkv, lengths, cotangent, *, bias=None, causal=True, backend="triton", scale=None):
    """Output and gradients (of qkv, and of the bias where there is one)."""
    qkv = qkv.detach().requires_grad_()
    bias = None if bias is None else bias.detach().requires_grad_()
    out = masked_attention_packed(
        qkv,
        qkv_bias=bias,
        cu_seqlens=cumulative(lengths),
        max_seqlen=max(1, *lengths, 1),
        causal=causal,
        scale=scale,
        backend=backend,
    )
    out.backward(cotangent)
    return out.detach(), qkv.grad, *([] if bias is None else [bias.grad])


def composed(qkv, lengths, cotangent, *, bias=None, causal=True, scale=None):
    """The same sequence by sequence, by PyTorch in the dtype of qkv."""
    qkv = qkv.detach().requires_grad_()
    bias = None if bias is None else bias.detach().requires_grad_()
    outs = []
    for part in (qkv if bias is None else qkv + bias)[: sum(lengths)].split(lengths):
        q, k, v = (x.transpose(0, 1)[None] for x in part.unbind(1))
        if len(part):
            outs.append(F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)[0].transpose(0, 1))
    out = torch.cat([*outs, qkv.new_zeros(qkv.shape[0] - sum(lengths), *qkv.shape[2:])])
    out.backward(cotangent)
    return out.detach(), qkv.grad, *([] if bias is None else [bias.grad])


def check_against_float64(check_error, dtype, lengths, *, heads=2, dim=32, causal=True, with_bias=True, spare=3):
    total = sum(lengths) + spare
    inputs = draw(total, 3, heads, dim, dtype=dtype), lengths, draw(total, heads, dim, dtype=dtype, seed=1)
    bias = draw(3, heads, dim, dtype=dtype, seed=2) if with_bias else None
    got = run(*inputs, bias=bias, causal=causal)
    same = composed(*inputs, bias=bias, causal=causal)
    double = inputs[0].double(), lengths, inputs[2].double()
    truth = composed(*double, bias=None if bias is None else bias.double(), causal=causal)
    for name, factor, *results in zip(("out", "dqkv", "dbias"), (2, 3, 3), got, same, truth, strict=False):
        check_error(*results, factor=factor, name=name)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_against_float64(check_error, poisoned, kernel_dtype, lengths, causal):
    check_against_float64(check_error, kernel_dtype, lengths, heads=1, causal=causal, with_bias=lengths is RAGGED)


@pytest.mark.parametrize("dim", [16, 24, 64, 80, 128])
def test_head_dims(check_error, poisoned, kernel_dtype, dim):
    check_against_float64(check_error, kernel_dtype, [9, 0, 30, 5], heads=2 if dim == 16 else 1, dim=dim)


@pytest.fixture
def few_blocks():
    """The interpreter takes its time by the block, so it gets larger ones than fit on a GPU."""
    with contextlib.ExitStack() as stack:
        if DEVICE.type == "cpu":
            for kernel, buckets in tables.shipped("sm_80", "attention_packed").items():
                for bucket in buckets:
                    config = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1}
                    stack.enter_context(tables.override("attention_packed", kernel, bucket, config))
        yield


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LONG, ids=str)
def test_long_against_float64(check_error, poisoned, few_blocks, kernel_dtype, lengths, causal):
    check_against_float64(check_error, kernel_dtype, lengths, causal=causal, heads=1, dim=64)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [16, 32, 40, 64, 72, 96, 128])
@pytest.mark.parametrize("causal", [True, False])
def test_long_head_dims(check_error, poisoned, few_blocks, kernel_dtype, causal, dim):
    check_against_float64(check_error, kernel_dtype, [60, 1, 77, 0, 100], heads=2, dim=dim, causal=causal)


@pytest.mark.parametrize("causal", [True, False])
def test_many_sequences(check_error, poisoned, causal):
    """A tile holds many, and the search for their starts has more than a few steps."""
    lengths = [(i * 7) % 5 * (i % 5 > 2) for i in range(100)]
    check_against_float64(check_error, torch.float16, lengths, heads=1, dim=16, causal=causal)


@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(st.one_of(st.just(0), st.integers(0, 12), st.integers(28, 40)), max_size=6),
    spare=st.integers(0, 70),
    causal=st.booleans(),
    tile=st.sampled_from([16, 32, 64]),
    block=st.sampled_from([16, 32, 64]),
    seed=st.integers(0, 1000),
)
def test_packed_equals_padded(lengths, spare, causal, tile, block, seed):
    """Whatever the tiles are."""
    total, heads, dim = sum(lengths) + spare, 1, 16
    longest = max([1, *lengths])
    qkv = draw(total, 3, heads, dim, seed=seed)
    cotangent = draw(total, heads, dim, seed=seed + 1)
    config = {"BLOCK_M": tile, "BLOCK_N": block, "num_warps": 4, "num_stages": 1}
    with (
        tables.override("attention_packed", "forward", "float-d64", config),
        tables.override("attention_packed", "backward", "float-d64", config),
    ):
        out, grad = run(qkv, lengths, cotangent, causal=causal)
    assert out[sum(lengths) :].eq(0).all() and grad[sum(lengths) :].eq(0).all()
    if not lengths:
        return
    parts = qkv[: sum(lengths)].split(lengths)
    padded = torch.stack([torch.cat([x, x.new_full((longest - len(x), 3, heads, dim), 7.0)]) for x in parts])
    padded.requires_grad_()
    lengths_there = torch.tensor(lengths, device=DEVICE)
    mask = torch.arange(longest, device=DEVICE) < lengths_there[:, None]
    q, k, v = (x.transpose(1, 2) for x in padded.unbind(2))
    want = masked_attention(q, k, v, causal=causal, key_mask=mask, backend="reference").transpose(1, 2)[mask]
    want.backward(cotangent[: sum(lengths)])
    torch.testing.assert_close(out[: sum(lengths)], want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad[: sum(lengths)], padded.grad[mask], rtol=1e-5, atol=2e-5)


@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=5),
    causal=st.booleans(),
    data=st.data(),
)
def test_order_of_sequences_does_not_matter(lengths, causal, data):
    order = data.draw(st.permutations(range(len(lengths))))
    qkv, cotangent = draw(sum(lengths), 3, 1, 16), draw(sum(lengths), 1, 16, seed=1)
    want = run(qkv, lengths, cotangent, causal=causal)

    def permuted(x):
        parts = x.split(lengths)
        return torch.cat([parts[i] for i in order])

    got = run(permuted(qkv), [lengths[i] for i in order], permuted(cotangent), causal=causal)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, permuted(y), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("spare", [1, 90])
def test_what_stands_past_the_end_is_never_read(poisoned, kernel_dtype, causal, spare):
    lengths, total = [20, 0, 21], 41
    bias = draw(3, 1, 32, dtype=kernel_dtype, seed=2)
    qkv, cotangent = draw(total, 3, 1, 32, dtype=kernel_dtype), draw(total, 1, 32, dtype=kernel_dtype, seed=1)
    want = run(qkv, lengths, cotangent, bias=bias, causal=causal)
    nan = float("nan")
    got = run(
        torch.cat([qkv, qkv.new_full((spare, 3, 1, 32), nan)]),
        lengths,
        torch.cat([cotangent, cotangent.new_full((spare, 1, 32), nan)]),
        bias=bias,
        causal=causal,
    )
    assert got[0][total:].eq(0).all() and got[1][total:].eq(0).all()
    assert torch.equal(got[0][:total], want[0]) and torch.equal(got[1][:total], want[1])
    assert torch.equal(got[2], want[2])


def test_strided_inputs():
    lengths, cotangent = [5, 0, 8], draw(13, 2, 16, dtype=torch.float16, seed=1)
    half = {"dtype": torch.float16}
    views = [
        draw(26, 2, 3, 4, 16, **half)[::2, 1, :, ::2],
        draw(3, 2, 13, 16, **half).permute(2, 0, 1, 3),
        draw(13, 3, 2, 32, **half)[..., ::2],
        draw(13, 3, 2, 40, **half)[..., 3:19],
        draw(13, 3, 1, 16, **half).expand(-1, -1, 2, -1),
    ]
    for view in views:
        want = run(view.contiguous(), lengths, cotangent)
        for x, y in zip(run(view, lengths, cotangent), want, strict=True):
            assert torch.equal(x, y)
    wide = cotangent.repeat_interleave(2, -1)
    for gradient in (wide[..., ::2], cotangent.transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(run(view, lengths, gradient)[1], want[1])
    ones = torch.ones_like(cotangent)
    assert torch.equal(run(view, lengths, ones[:1, :1, :1].expand_as(ones))[1], run(view, lengths, ones)[1])


def test_runs_are_bitwise_equal(kernel_dtype):
    inputs = draw(50, 3, 1, 64, dtype=kernel_dtype), [33, 10], draw(50, 1, 64, dtype=kernel_dtype, seed=1)
    bias = draw(3, 1, 64, dtype=kernel_dtype, seed=2)
    for x, y in zip(run(*inputs, bias=bias), run(*inputs, bias=bias), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("scale", [0.0, -0.3, 40.0])
def test_scales(scale):
    inputs = draw(50, 3, 1, 16), [33, 10], draw(50, 1, 16, seed=1)
    truth = run(inputs[0].double(), inputs[1], inputs[2].double(), scale=scale, backend="reference")
    for x, y in zip(run(*inputs, scale=scale), truth, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4 * (1 + abs(scale)))


def test_a_bias_of_the_keys_has_no_gradient():
    bias = draw(3, 2, 16, seed=2)
    *_, grad = run(draw(30, 3, 2, 16), [20, 9], draw(30, 2, 16, seed=1), bias=bias)
    assert grad[1].eq(0).all() and grad[0].ne(0).any() and grad[2].ne(0).any()
    moved = bias.clone()
    moved[1] += 5
    out, other = (
        run(draw(30, 3, 2, 16), [20, 9], draw(30, 2, 16, seed=1), bias=x, backend="reference")[0] for x in (bias, moved)
    )
    torch.testing.assert_close(out, other)


def test_only_wanted_gradients():
    qkv, bias = draw(9, 3, 1, 16), draw(3, 1, 16, seed=1)
    arguments = {"cu_seqlens": cumulative([4, 3]), "max_seqlen": 4, "backend": "triton"}
    assert not masked_attention_packed(qkv, qkv_bias=bias, **arguments).requires_grad
    bias.requires_grad_()
    masked_attention_packed(qkv, qkv_bias=bias, **arguments).sum().backward()
    assert qkv.grad is None and bias.grad is not None
    both = qkv.clone().requires_grad_()
    masked_attention_packed(both, qkv_bias=bias.detach(), **arguments).sum().backward()
    assert both.grad is not None


@pytest.mark.parametrize("shape", [(0, 3, 2, 16), (4, 3, 0, 16), (4, 3, 2, 16)])
@pytest.mark.parametrize("sequences", [0, 2])
def test_empty(poisoned, shape, sequences):
    cotangent = draw(shape[0], *shape[2:])
    out, grad, bias_grad = run(draw(*shape), [0] * sequences, cotangent, bias=draw(*shape[1:]))
    assert out.shape == (shape[0], *shape[2:]) and out.eq(0).all()
    assert grad.shape == shape and grad.eq(0).all() and bias_grad.eq(0).all()
