from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farl_kernels.attention import masked_attention, masked_attention_packed, single_query_attention
from farl_kernels.attention.packing import PaddedLayout

BACKENDS = [None, "reference", "sdpa"]
RAGGED = [3, 0, 1, 16, 7, 0]


def cumulative(lengths):
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int32).cumsum(0).tolist()], dtype=torch.int32)


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_dense_equals_masked_attention(backend, causal, bias):
    qkv, qkv_bias = draw(2, 6, 3, 2, 8).requires_grad_(), draw(3, 2, 8, seed=1).requires_grad_()
    key_mask = torch.tensor([[True] * 6, [False, True, True, False, True, True]])
    q, k, v = (x.transpose(1, 2) for x in (qkv + qkv_bias * bias).unbind(2))
    want = masked_attention(q, k, v, causal=causal, key_mask=key_mask, backend="reference").transpose(1, 2)
    got = masked_attention_packed(
        qkv, qkv_bias=qkv_bias if bias else None, causal=causal, key_mask=key_mask, backend=backend
    )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    inputs = (qkv, qkv_bias) if bias else (qkv,)
    grads = [torch.autograd.grad(out.sin().sum(), inputs) for out in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [[1], [5], [16, 17], [63, 64, 65], [77, 1, 77], RAGGED], ids=str)
def test_packed_equals_each_sequence_alone(backend, causal, lengths, naive):
    total, budget = sum(lengths), sum(lengths) + 5
    qkv = draw(budget, 3, 2, 4).requires_grad_()
    got = masked_attention_packed(
        qkv, cu_seqlens=cumulative(lengths), max_seqlen=max(lengths) + 2, causal=causal, backend=backend
    )
    (grad,) = torch.autograd.grad(got.sin().sum(), qkv)
    assert got.shape == (budget, 2, 4)
    assert got[total:].eq(0).all() and grad[total:].eq(0).all()
    alone = qkv.detach().requires_grad_()
    outs, start = [], 0
    for length in lengths:
        q, k, v = (x.transpose(0, 1)[None] for x in alone[start : start + length].unbind(1))
        outs.append(masked_attention(q, k, v, causal=causal, backend="reference")[0].transpose(0, 1))
        start += length
    want = torch.cat(outs)
    torch.testing.assert_close(got[:total], want, rtol=1e-12, atol=1e-12)
    (want_grad,) = torch.autograd.grad(want.sin().sum(), alone)
    torch.testing.assert_close(grad, want_grad, rtol=1e-10, atol=1e-12)
    if total < 30:
        n = lengths[-2] if len(lengths) > 1 else lengths[0]
        part = (
            alone.detach()[:n] if len(lengths) == 1 else alone.detach()[total - lengths[-1] - n : total - lengths[-1]]
        )
        q, k, v = (x.transpose(0, 1)[None] for x in part.unbind(1))
        allowed = torch.ones(1, n, n, dtype=torch.bool)
        looped = naive(q, k, v, allowed.tril() if causal else allowed, 0.5)[0].transpose(0, 1)
        end = n if len(lengths) == 1 else total - lengths[-1]
        torch.testing.assert_close(got.detach()[end - n : end], looped, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(backend, causal):
    qkv, bias = draw(7, 3, 2, 3).requires_grad_(), draw(3, 2, 3, seed=1).requires_grad_()

    def call(qkv, bias):
        return masked_attention_packed(
            qkv, qkv_bias=bias, cu_seqlens=cumulative([2, 0, 4]), max_seqlen=4, causal=causal, backend=backend
        )

    assert torch.autograd.gradcheck(call, (qkv, bias))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_what_stands_past_the_end_is_never_read(backend, causal):
    clean = draw(9, 3, 2, 4)
    clean[6:] = 0
    dirty = clean.clone()
    dirty[6:] = float("nan")
    arguments = {"cu_seqlens": cumulative([4, 2]), "max_seqlen": 5, "causal": causal, "backend": backend}
    outs, grads = [], []
    for rows in (clean, dirty):
        rows.requires_grad_()
        outs.append(masked_attention_packed(rows, qkv_bias=draw(3, 2, 4, seed=3), **arguments))
        grads.append(torch.autograd.grad(outs[-1].sin().sum(), rows)[0])
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(grads[0], grads[1])
    assert outs[0][6:].eq(0).all() and grads[0][6:].eq(0).all()


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    extra=st.integers(0, 4),
    causal=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_backends_agree_and_order_of_sequences_does_not_matter(lengths, extra, causal, seed):
    bound = max(1, *lengths) + extra
    qkv = draw(sum(lengths) + extra, 3, 2, 5, seed=seed)
    arguments = {"max_seqlen": bound, "causal": causal}
    got = masked_attention_packed(qkv, cu_seqlens=cumulative(lengths), **arguments)
    want = masked_attention_packed(qkv, cu_seqlens=cumulative(lengths), backend="reference", **arguments)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    parts = qkv[: sum(lengths)].split(lengths)
    turned = masked_attention_packed(torch.cat(parts[::-1]), cu_seqlens=cumulative(lengths[::-1]), **arguments)
    back = torch.cat(turned.split(lengths[::-1])[::-1])
    torch.testing.assert_close(back, got[: sum(lengths)], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_input(backend):
    base = draw(11, 2, 3, 4, 8)
    view = base[::2, 1, :, ::2]  # [6, 3, 2, 8]
    arguments = {"cu_seqlens": cumulative([2, 4]), "max_seqlen": 4, "causal": True}
    torch.testing.assert_close(
        masked_attention_packed(view, backend=backend, **arguments),
        masked_attention_packed(view.contiguous(), backend="reference", **arguments),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(backend, dtype):
    qkv = draw(30, 3, 2, 32, dtype=dtype).requires_grad_()
    arguments = {"cu_seqlens": cumulative([10, 17]), "max_seqlen": 17, "causal": True}
    truth_in = qkv.detach().double().requires_grad_()
    truth = masked_attention_packed(truth_in, backend="reference", **arguments)
    got = masked_attention_packed(qkv, backend=backend, **arguments)
    assert got.dtype == dtype
    bound = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}[dtype]
    assert (got.double() - truth).abs().max() <= bound
    cotangent = draw(30, 2, 32, seed=9).to(dtype)
    (grad,) = torch.autograd.grad(got, qkv, cotangent)
    (truth_grad,) = torch.autograd.grad(truth, truth_in, cotangent.double())
    assert (grad.double() - truth_grad).abs().max() <= 4 * bound


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sequences", [0, 2])
def test_empty(backend, sequences):
    qkv = draw(4, 3, 2, 8).requires_grad_()
    cu_seqlens = torch.zeros(sequences + 1, dtype=torch.int32)
    out = masked_attention_packed(qkv, cu_seqlens=cu_seqlens, max_seqlen=3, backend=backend)
    out.sum().backward()
    assert out.shape == (4, 2, 8) and out.eq(0).all()
    assert qkv.grad is not None and qkv.grad.eq(0).all()
    single = single_query_attention(
        draw(sequences, 2, 8), qkv[:, :2], cu_seqlens=cu_seqlens, max_seqlen=3, backend=backend
    )
    assert single.shape == (sequences, 2, 8) and single.eq(0).all()


@pytest.mark.parametrize(
    ("backend", "packed"), [*((b, p) for b in BACKENDS for p in (False, True)), ("segments", True)]
)
def test_single_query(backend, packed, naive):
    lengths = [4, 0, 6] if packed else [5, 5, 5]
    q = draw(3, 2, 4).requires_grad_()
    kv = (draw(12, 2, 2, 4, seed=1) if packed else draw(3, 5, 2, 2, 4, seed=1)).requires_grad_()
    arguments = {"cu_seqlens": cumulative(lengths), "max_seqlen": 8} if packed else {}

    def call(q, kv):
        return single_query_attention(q, kv, scale=0.4, backend=backend, **arguments)

    got = call(q, kv)
    parts = kv.detach()[: sum(lengths)].split(lengths) if packed else kv.detach()
    for s, part in enumerate(parts):
        k, v = part.transpose(0, 2).transpose(0, 1)[None].unbind(1) if part.numel() else (kv.new_zeros(1, 2, 0, 4),) * 2
        allowed = torch.ones(1, 1, k.shape[2], dtype=torch.bool)
        want = naive(q.detach()[s][None, :, None], k, v, allowed, 0.4)[0, :, 0]
        torch.testing.assert_close(got.detach()[s], want, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(call, (q, kv))


@pytest.mark.parametrize("backend", [*BACKENDS, "segments"])
def test_single_query_never_reads_past_the_end(backend):
    kv, q = draw(9, 2, 2, 4), draw(2, 2, 4, seed=1).requires_grad_()
    kv[6:] = float("nan")
    kv.requires_grad_()
    out = single_query_attention(q, kv, cu_seqlens=cumulative([4, 2]), max_seqlen=5, backend=backend)
    kept = kv.detach()[:6].requires_grad_()
    want = single_query_attention(q, kept, cu_seqlens=cumulative([4, 2]), max_seqlen=5, backend="reference")
    torch.testing.assert_close(out, want)
    q_grad, kv_grad = torch.autograd.grad(out.sin().sum(), (q, kv))
    want_q_grad, want_kv_grad = torch.autograd.grad(want.sin().sum(), (q, kept))
    torch.testing.assert_close(q_grad, want_q_grad)
    torch.testing.assert_close(kv_grad[:6], want_kv_grad)
    assert kv_grad[6:].eq(0).all()


@pytest.mark.parametrize("backend", [*BACKENDS, "segments"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_single_query_dtypes_and_large_scores(backend, dtype):
    q, kv = 10 * draw(2, 2, 32, dtype=dtype), 10 * draw(21, 2, 2, 32, seed=1, dtype=dtype)
    arguments = {"cu_seqlens": cumulative([4, 17]), "max_seqlen": 17}
    truth = single_query_attention(q.double(), kv.double(), backend="reference", **arguments)
    got = single_query_attention(q, kv, backend=backend, **arguments)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), truth, rtol=2 * torch.finfo(dtype).eps, atol=300 * torch.finfo(dtype).eps)


def test_segments_refuses_what_is_not_packed():
    with pytest.raises(ValueError, match="it is for packed keys"):
        single_query_attention(torch.zeros(1, 2, 4), torch.zeros(1, 3, 2, 2, 4), backend="segments")


def test_autocast():
    qkv, bias = draw(9, 3, 2, 8, dtype=torch.float32), draw(3, 2, 8, dtype=torch.float32, seed=1)
    bias.requires_grad_()
    arguments = {"qkv_bias": bias, "cu_seqlens": cumulative([4, 5]), "max_seqlen": 5, "causal": True}
    with torch.autocast("cpu", torch.bfloat16):
        out = masked_attention_packed(qkv, **arguments)
        single = single_query_attention(qkv[:2, 0], qkv[:, 1:], cu_seqlens=cumulative([4, 5]), max_seqlen=5)
    out.float().sum().backward()
    assert out.dtype == single.dtype == torch.bfloat16
    assert bias.grad is not None and bias.grad.dtype == torch.float32
    torch.testing.assert_close(out.float(), masked_attention_packed(qkv, **arguments), rtol=3e-2, atol=3e-2)


def test_second_derivative_is_right_or_raises():
    def penalty(backend):
        qkv = draw(6, 3, 1, 3).requires_grad_()
        arguments = {"cu_seqlens": cumulative([2, 3]), "max_seqlen": 3, "causal": True, "backend": backend}
        out = masked_attention_packed(qkv, **arguments)
        (first,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
        return torch.autograd.grad(first.square().sum(), qkv)[0]

    try:
        got = penalty(None)
    except (RuntimeError, NotImplementedError) as error:
        assert "derivative" in str(error)
    else:
        torch.testing.assert_close(got, penalty("reference"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(6, 2, 2, 8)}, r"qkv has shape \(6, 2, 2, 8\), want 3 \(q, k, v\)"),
        ({"qkv": torch.zeros(2, 6, 3, 2, 8)}, r"want \[T, 3, H, D\]"),
        ({"cu_seqlens": None}, "max_seqlen is given without cu_seqlens|want .B, N, 3, H, D."),
        ({"cu_seqlens": torch.tensor([0, 3, 6])}, r"cu_seqlens is torch.int64 \(3,\), want torch.int32 \[S \+ 1\]"),
        ({"cu_seqlens": cumulative([3, 4])}, "cu_seqlens runs from 0 to 7, want ascending from 0 to T = 6 at most"),
        ({"cu_seqlens": torch.tensor([0, 4, 2], dtype=torch.int32)}, "want ascending from 0"),
        ({"max_seqlen": None}, "max_seqlen is None, want an int >= 1"),
        ({"max_seqlen": 2}, "max_seqlen is 2, but a sequence has 3 tokens"),
        ({"qkv_bias": torch.zeros(3, 16)}, r"qkv_bias is \(3, 16\) on cpu, want \(3, 2, 8\)"),
        ({"key_mask": torch.ones(2, 3, dtype=torch.bool)}, "key_mask does not go with cu_seqlens"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = {"qkv": torch.zeros(6, 3, 2, 8), "cu_seqlens": cumulative([3, 3]), "max_seqlen": 3} | change
    with pytest.raises(ValueError, match=message):
        masked_attention_packed(arguments.pop("qkv"), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 8)}, r"q has shape \(2, 8\), want \[S, H, D\]"),
        ({"kv": torch.zeros(6, 2, 3, 8)}, r"kv has shape \(6, 2, 3, 8\), want \[6, 2, 2, 8\]"),
        ({"q": torch.zeros(3, 2, 8)}, "cu_seqlens has 3 entries, want S . 1 = 4"),
        ({"kv": torch.zeros(6, 2, 2, 8, dtype=torch.float64)}, "kv is torch.float64, want torch.float32"),
    ],
)
def test_single_query_errors(change, message):
    arguments = {"q": torch.zeros(2, 2, 8), "kv": torch.zeros(6, 2, 2, 8)} | change
    with pytest.raises(ValueError, match=message):
        single_query_attention(arguments["q"], arguments["kv"], cu_seqlens=cumulative([3, 3]), max_seqlen=3)


def test_a_bound_that_is_too_small_cuts_sequences_and_mixes_none():
    """What a GPU does with it, where the lengths are not read: no row goes to another's place or out of bounds."""
    layout = PaddedLayout.build(cumulative([5, 2, 4]), 12, 3)
    rows = torch.arange(1.0, 13.0)[:, None].requires_grad_()
    padded = layout.pad(rows)
    assert padded[..., 0].tolist() == [[1, 2, 3], [6, 7, 0], [8, 9, 10]]
    back = layout.unpad(padded)
    assert back[:, 0].tolist() == [1, 2, 3, 0, 0, 6, 7, 8, 9, 10, 0, 0]
    (grad,) = torch.autograd.grad(back.square().sum(), rows)
    torch.testing.assert_close(grad, 2 * back)


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_func_takes_its_gradient(backend):
    qkv = draw(9, 3, 2, 8)

    def loss(qkv):
        out = masked_attention_packed(qkv, cu_seqlens=cumulative([3, 5]), max_seqlen=6, backend=backend)
        return out.sin().sum()

    (want,) = torch.autograd.grad(loss(leaf := qkv.clone().requires_grad_()), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(qkv), want)


def test_compiles_without_graph_break():
    qkv = draw(9, 3, 2, 8, dtype=torch.float32).requires_grad_()

    def call(qkv, cu_seqlens):
        return masked_attention_packed(qkv, cu_seqlens=cu_seqlens, max_seqlen=6, causal=True)

    got = torch.compile(call, fullgraph=True, backend="aot_eager")(qkv, cumulative([3, 5]))
    torch.testing.assert_close(got, call(qkv, cumulative([3, 5])))
    got.sum().backward()
    assert qkv.grad is not None and qkv.grad[8:].eq(0).all()
