"""The kernels of single-query attention against float64, and what must not change their result."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from farl_kernels import single_query_attention, tables

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTHS = [[1], [5, 0, 0, 2], [0, 16, 17, 0], [63, 64, 65], [77, 197]]


def cumulative(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def run(q, kv, cotangent, lengths=None, *, backend="triton", scale=None):
    """Output and gradients; packed where `lengths` are given."""
    q, kv = q.detach().requires_grad_(), kv.detach().requires_grad_()
    packing = {} if lengths is None else {"cu_seqlens": cumulative(lengths), "max_seqlen": max(1, *lengths, 1)}
    out = single_query_attention(q, kv, scale=scale, backend=backend, **packing)
    out.backward(cotangent)
    return out.detach(), q.grad, kv.grad


def composed(q, kv, cotangent, lengths=None):
    """The same sequence by sequence, by PyTorch in the dtype of q."""
    q, kv = q.detach().requires_grad_(), kv.detach().requires_grad_()
    parts = kv if lengths is None else kv[: sum(lengths)].split(lengths)
    outs = []
    for query, part in zip(q, parts, strict=True):
        k, v = (x.transpose(0, 1)[None] for x in part.unbind(1))
        outs.append(F.scaled_dot_product_attention(query[None, :, None], k, v)[0, :, 0] if len(part) else 0 * query)
    out = torch.stack(outs)
    out.backward(cotangent)
    return out.detach(), q.grad, kv.grad


def check_against_float64(check_error, q, kv, lengths=None):
    cotangent = draw(*q.shape, dtype=q.dtype, seed=9)
    got, same = run(q, kv, cotangent, lengths), composed(q, kv, cotangent, lengths)
    truth = composed(q.double(), kv.double(), cotangent.double(), lengths)
    for name, factor, *results in zip(("out", "dq", "dkv"), (2, 3, 3), got, same, truth, strict=True):
        check_error(*results, factor=factor, name=name)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_packed_against_float64(check_error, poisoned, kernel_dtype, lengths):
    q, kv = draw(len(lengths), 2, 32, dtype=kernel_dtype), draw(sum(lengths) + 3, 2, 2, 32, dtype=kernel_dtype, seed=1)
    check_against_float64(check_error, q, kv, lengths)


@pytest.mark.parametrize("length", [1, 16, 65, 197])
def test_dense_against_float64(check_error, poisoned, kernel_dtype, length):
    q, kv = draw(3, 2, 32, dtype=kernel_dtype), draw(3, length, 2, 2, 32, dtype=kernel_dtype, seed=1)
    check_against_float64(check_error, q, kv)


@pytest.mark.parametrize("dim", [16, 24, 64, 80, 128])
def test_head_dims(check_error, poisoned, kernel_dtype, dim):
    q, kv = draw(2, 1, dim, dtype=kernel_dtype), draw(40, 2, 1, dim, dtype=kernel_dtype, seed=1)
    check_against_float64(check_error, q, kv, [33, 5])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lengths", "dim"),
    [([127, 128, 129, 0], 16), ([196, 198, 256, 257], 40), ([577, 3], 64), ([785, 1025], 96), ([300, 77], 128)],
)
def test_long_against_float64(check_error, poisoned, kernel_dtype, lengths, dim):
    q = draw(len(lengths), 2, dim, dtype=kernel_dtype)
    kv = draw(sum(lengths) + 200, 2, 2, dim, dtype=kernel_dtype, seed=1)
    check_against_float64(check_error, q, kv, lengths)
    n = sum(lengths) // len(lengths)
    check_against_float64(check_error, q, kv[: n * len(lengths)].view(len(lengths), n, 2, 2, dim))


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.one_of(st.just(0), st.integers(0, 40)), max_size=6),
    spare=st.integers(0, 90),
    block=st.sampled_from([8, 16, 32]),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_properties(lengths, spare, block, seed, data):
    """Packed equals padded, the order of the sequences does not matter, and neither does the size of the blocks."""
    sequences, total, longest = len(lengths), sum(lengths), max([1, *lengths])
    q, kv = draw(sequences, 1, 16, seed=seed), draw(total + spare, 2, 1, 16, seed=seed + 1)
    kv[total:] = float("nan")
    cotangent = draw(sequences, 1, 16, seed=seed + 2)
    config = {"BLOCK_N": block, "num_warps": 1, "num_stages": 1}
    with (
        tables.override("attention_single_query", "forward", "float-d64-text", config),
        tables.override("attention_single_query", "backward", "float-d64-text", config),
    ):
        out, dq, dkv = run(q, kv, cotangent, lengths)
        assert out.shape == dq.shape == q.shape and dkv.shape == kv.shape and dkv[total:].eq(0).all()
        order = data.draw(st.permutations(range(sequences)))
        parts = kv[:total].split(lengths) if lengths else []
        turned = torch.cat([parts[i] for i in order]) if lengths else kv[:0]
        outs = run(q[order], turned, cotangent[order], [lengths[i] for i in order])
    # Every sequence is worked on alone: nothing of it may depend on its place.
    assert torch.equal(outs[0], out[order]) and torch.equal(outs[1], dq[order])
    for i, part in zip(order, outs[2].split([lengths[i] for i in order]), strict=True):
        assert torch.equal(part, dkv[:total].split(lengths)[i])
    if not lengths:
        return
    k, v = (
        torch.nn.utils.rnn.pad_sequence([part[:, j] for part in parts], batch_first=True, padding_value=7.0)
        if total
        else kv.new_zeros(sequences, 1, 1, 16)
        for j in range(2)
    )
    scores = torch.einsum("shd,snhd->shn", q, k) / 4
    beyond = torch.arange(k.shape[1], device=DEVICE) >= torch.tensor(lengths, device=DEVICE)[:, None]
    weights = scores.masked_fill(beyond[:, None], float("-inf")).softmax(-1).nan_to_num(0.0)
    torch.testing.assert_close(out, torch.einsum("shn,snhd->shd", weights, v), rtol=1e-5, atol=1e-5)
    assert longest >= k.shape[1]


@pytest.mark.parametrize("spare", [1, 90])
def test_what_stands_past_the_end_is_never_read(poisoned, kernel_dtype, spare):
    lengths, total = [4, 0, 13], 17
    q, kv = draw(3, 2, 32, dtype=kernel_dtype), draw(total, 2, 2, 32, dtype=kernel_dtype, seed=1)
    want = run(q, kv, q, lengths)
    got = run(q, torch.cat([kv, kv.new_full((spare, 2, 2, 32), float("nan"))]), q, lengths)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert torch.equal(got[2][:total], want[2]) and got[2][total:].eq(0).all()
    assert got[0][1].eq(0).all() and got[1][1].eq(0).all()


@pytest.mark.parametrize("packed", [True, False])
def test_strided_inputs(packed):
    half = {"dtype": torch.float16}
    lengths = [5, 0, 8] if packed else None
    shape = (13,) if packed else (3, 5)
    queries = [
        draw(3, 7, 2, 16, **half)[:, 0],
        draw(2, 3, 16, **half).transpose(0, 1),
        draw(3, 2, 32, **half)[..., ::2],
    ]
    keys = [
        draw(*shape, 3, 2, 16, **half)[..., 1:, :, :],
        draw(*shape, 2, 2, 40, **half)[..., 5:21],
        draw(2, 2, *shape, 16, **half).movedim((0, 1), (-3, -2)),
        draw(*shape, 2, 2, 32, **half)[..., ::2],
        draw(*shape, 2, 1, 16, **half).expand(*shape, 2, 2, 16),
    ]
    cotangents = [draw(2, 3, 16, **half).transpose(0, 1), draw(1, 1, 1, **half).expand(3, 2, 16)]
    calls = [(q, keys[0], cotangents[0]) for q in queries]
    calls += [(queries[0], kv, cotangents[1]) for kv in keys]
    for inputs in calls:
        want = run(*(x.contiguous() for x in inputs), lengths)
        for x, y in zip(run(*inputs, lengths), want, strict=True):
            assert torch.equal(x, y)


def test_runs_are_bitwise_equal(kernel_dtype):
    q, kv = draw(2, 2, 64, dtype=kernel_dtype), draw(80, 2, 2, 64, dtype=kernel_dtype, seed=1)
    for x, y in zip(run(q, kv, q, [33, 40]), run(q, kv, q, [33, 40]), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("scale", [0.0, -0.3, 40.0])
def test_scales(scale):
    q, kv = draw(2, 1, 16), draw(33, 2, 1, 16, seed=1)
    truth = run(q.double(), kv.double(), q.double(), [20, 13], scale=scale, backend="reference")
    for x, y in zip(run(q, kv, q, [20, 13], scale=scale), truth, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4 * (1 + abs(scale)))


@pytest.mark.parametrize("wanted", ["q", "kv"])
def test_only_wanted_gradients(wanted):
    q, kv = draw(2, 1, 16), draw(9, 2, 1, 16, seed=1)
    want = run(q, kv, q, [5, 3])
    q, kv = q.requires_grad_(wanted == "q"), kv.requires_grad_(wanted == "kv")
    out = single_query_attention(q, kv, cu_seqlens=cumulative([5, 3]), max_seqlen=5, backend="triton")
    out.backward(q.detach())
    if wanted == "q":
        assert kv.grad is None and torch.equal(q.grad, want[1])
    else:
        assert q.grad is None and torch.equal(kv.grad, want[2])


@pytest.mark.parametrize(
    ("q_shape", "kv_shape", "lengths"),
    [
        ((0, 2, 16), (0, 5, 2, 2, 16), None),
        ((2, 2, 16), (2, 0, 2, 2, 16), None),
        ((2, 0, 16), (2, 3, 2, 0, 16), None),
        ((0, 2, 16), (4, 2, 2, 16), []),
        ((2, 2, 16), (4, 2, 2, 16), [0, 0]),
        ((2, 2, 16), (0, 2, 2, 16), [0, 0]),
    ],
)
def test_empty(poisoned, q_shape, kv_shape, lengths):
    q, kv = draw(*q_shape), draw(*kv_shape, seed=1)
    out, dq, dkv = run(q, kv, q, lengths)
    assert out.shape == q.shape and out.eq(0).all()
    assert dq.shape == q.shape and dq.eq(0).all()
    assert dkv.shape == kv.shape and dkv.eq(0).all()
