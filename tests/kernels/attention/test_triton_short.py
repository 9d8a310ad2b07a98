"""Up to 256 keys against float64, held to a multiple of plain PyTorch's error in the same dtype.

In float16 (and bfloat16) that is the kernel that holds all keys, in float32 the one that passes over them.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from farl_kernels import tables
from farl_kernels.attention import masked_attention, masked_attention_packed
from farl_kernels.attention.arguments import LARGEST_ROW_STRIDE

LENGTHS = [1, 5, 16, 17, 63, 64, 65, 77, 127, 128, 129, 196, 197, 198, 256]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def plain(q, k, v, allowed, scale=None):
    """Attention in the dtype of q; `allowed` bool, broadcastable to the scores."""
    scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    dead = ~allowed.any(-1, keepdim=True)
    weights = scores.masked_fill(~(allowed | dead), float("-inf")).softmax(-1)
    return weights.masked_fill(dead, 0.0) @ v


def allowed_keys(m, n, causal, key_mask, device):
    allowed = torch.ones(1, 1, m, n, dtype=torch.bool, device=device)
    if causal:
        allowed = allowed.tril()
    return allowed if key_mask is None else allowed & key_mask[:, None, None]


def draw(*shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


def mask_of(batch, n, device):
    """All keys of the first sequence, some of the others, and not the first."""
    mask = torch.rand(batch, n, generator=torch.Generator().manual_seed(7)) < 0.6
    mask[0] = True
    mask[1:, 0] = False
    return mask.to(device)


def run(function, inputs, grad):
    """The result and the gradients of fresh leaves with the values and strides of `inputs`."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return out, torch.autograd.grad(out, leaves, grad)


def compare(check_error, q, k, v, *, causal=False, key_mask=None, scale=None):
    allowed = allowed_keys(q.shape[2], k.shape[2], causal, key_mask, q.device)
    grad = draw(*q.shape, dtype=q.dtype, device=q.device, seed=9)
    call = lambda q, k, v: masked_attention(q, k, v, causal=causal, key_mask=key_mask, scale=scale, backend="triton")
    in_pytorch = lambda q, k, v: plain(q, k, v, allowed, scale)
    got, grads = run(call, (q, k, v), grad)
    same, same_grads = run(in_pytorch, (q, k, v), grad)
    truth, truths = run(in_pytorch, [x.double() for x in (q, k, v)], grad.double())
    check_error(got, same, truth, factor=2, name="out")
    for name, *three in zip(("dq", "dk", "dv"), grads, same_grads, truths, strict=True):
        if k.shape[2] == 1 and name != "dv":
            # One key has all the weight whatever the scores: exactly 0, and a difference of two equal sums here.
            unit = torch.finfo(q.dtype).eps * max(x.abs().max().item() for x in (q, k)) * q.shape[-1] ** -0.5
            assert three[0].abs().max() <= 4 * unit * (grad.abs() * v.abs()).sum(-1).max()
        else:
            check_error(*three, factor=3, name=name)
    return got, grads


def qkv_inputs(batch, heads, m, n, dim, dtype, device):
    return [draw(batch, heads, x, dim, dtype=dtype, device=device, seed=x + i) for i, x in enumerate((m, n, n))]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [1, 5, 17, 65])
def test_lengths(n, causal, kernel_dtype, device, check_error, poisoned):
    # The largest of a few errors is a matter of luck, PyTorch's too: short lengths take more heads.
    batch, heads = (2, 4) if n < 32 else (1, 1)
    compare(check_error, *qkv_inputs(batch, heads, n, n, 32, kernel_dtype, device), causal=causal)


def test_image_tokens(device, check_error, poisoned):
    compare(check_error, *qkv_inputs(1, 1, 197, 197, 64, torch.float16, device))


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", LENGTHS)
def test_all_lengths(n, causal, masked, kernel_dtype, device, check_error, poisoned):
    key_mask = mask_of(2, n, device)[1:] if masked else None
    compare(check_error, *qkv_inputs(1, 1, n, n, 64, kernel_dtype, device), causal=causal, key_mask=key_mask)


@pytest.mark.parametrize(("m", "n"), [(75, 197), (3, 20), (130, 3)])
def test_other_number_of_queries(m, n, device, check_error, poisoned):
    key_mask = mask_of(2, n, device)[1:]
    compare(check_error, *qkv_inputs(1, 1, m, n, 16, torch.float16, device), key_mask=key_mask)


@pytest.mark.parametrize("dim", [16, 24, 32, 64, 80, 96, 128])
def test_head_dims(dim, kernel_dtype, device, check_error, poisoned):
    compare(check_error, *qkv_inputs(1, 2, 20, 20, dim, kernel_dtype, device), causal=True)


@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
def test_scale(scale, device, check_error):
    compare(check_error, *qkv_inputs(1, 1, 20, 20, 16, torch.float32, device), scale=scale)


@pytest.mark.parametrize("causal", [False, True])
def test_queries_without_keys_give_zero_and_no_gradient(causal, kernel_dtype, device, check_error, poisoned):
    q, k, v = qkv_inputs(3, 1, 20, 20, 16, kernel_dtype, device)
    key_mask = torch.ones(3, 20, dtype=torch.bool, device=device)
    key_mask[0] = False
    key_mask[1, :3] = False
    out, grads = compare(check_error, q, k, v, causal=causal, key_mask=key_mask)
    assert out[0].eq(0).all()
    assert out[1, :, :3].eq(0).all() == causal
    assert all(x[0].eq(0).all() for x in grads)
    assert grads[1][1, :, :3].eq(0).all() and grads[2][1, :, :3].eq(0).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in the interpreter
def test_large_scores_of_masked_keys_do_no_harm(device, check_error):
    """exp(score - lse) of a key that is masked overflows; it must not reach what others share with it."""
    q, k, v = qkv_inputs(1, 1, 20, 20, 16, torch.float32, device)
    key_mask = torch.ones(1, 20, dtype=torch.bool, device=device)
    key_mask[0, 4] = False
    k[:, :, 4] = 200 * q[:, :, 7]
    k[:, :, :4] -= 100 * q[:, :, 7:8]
    compare(check_error, q, k, v, key_mask=key_mask)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "dims_swapped", "step_two", "far_rows"])
def test_any_strides(layout, device):
    b, h, n, d = 2, 1, 18, 16
    make = {
        "transposed": lambda i: draw(b, n, h, d, dtype=torch.float16, device=device, seed=i).transpose(1, 2),
        "sliced": lambda i: draw(b, h, n + 4, 3 * d, dtype=torch.float16, device=device, seed=i)[:, :, 1:-3, 5 : d + 5],
        "expanded": lambda i: draw(1, h, n, d, dtype=torch.float16, device=device, seed=i).expand(b, h, n, d),
        "dims_swapped": lambda i: draw(b, h, d, n, dtype=torch.float16, device=device, seed=i).mT,
        "step_two": lambda i: draw(b, h, n, 2 * d, dtype=torch.float16, device=device, seed=i)[..., ::2],
        "far_rows": lambda i: (
            draw(1, 1, 2, d, dtype=torch.float16, device=device, seed=i)
            .new_zeros(LARGEST_ROW_STRIDE + 64)
            .as_strided((1, 1, 2, d), (0, 0, LARGEST_ROW_STRIDE + 16, 1))
            .copy_(draw(1, 1, 2, d, dtype=torch.float16, device=device, seed=i))
        ),
    }[layout]
    views = [make(i) for i in range(3)]
    grad = draw(*views[0].transpose(0, 1).shape, dtype=torch.float16, device=device, seed=5).transpose(0, 1)
    call = lambda q, k, v: masked_attention(q, k, v, causal=True, backend="triton")
    got, grads = run(call, views, grad)
    want, wanted = run(call, [x.clone(memory_format=torch.contiguous_format) for x in views], grad.contiguous())
    assert torch.equal(got, want)
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))


def test_gradient_with_stride_zero(device):
    q, k, v = qkv_inputs(1, 2, 18, 18, 16, torch.float16, device)
    call = lambda q, k, v: masked_attention(q, k, v, backend="triton")
    one = torch.ones((), dtype=torch.float16, device=device)
    _, got = run(call, (q, k, v), one.expand(q.shape))
    _, want = run(call, (q, k, v), torch.ones_like(q))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_neighbours_are_never_read(device):
    """NaN before, behind and between what belongs to the call."""
    around = torch.full((3, 30, 4, 3, 24), float("nan"), dtype=torch.float16, device=device)
    inside = draw(1, 18, 2, 3, 16, dtype=torch.float16, device=device)
    around[1:2, 6:24, 1:3, :, 4:20] = inside
    q, k, v = (x.transpose(1, 2) for x in around[1:2, 6:24, 1:3, :, 4:20].unbind(3))
    grad = torch.full((1, 2, 30, 16), float("nan"), dtype=torch.float16, device=device)
    grad[:, :, 6:24] = draw(1, 2, 18, 16, dtype=torch.float16, device=device, seed=3)
    call = lambda q, k, v: masked_attention(q, k, v, backend="triton")
    got, grads = run(call, (q, k, v), grad[:, :, 6:24])
    clean = [x.contiguous() for x in (q, k, v)]
    want, wanted = run(call, clean, grad[:, :, 6:24].contiguous())
    assert torch.equal(got, want) and got.isfinite().all()
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(grads, wanted, strict=True))


def packed_plain(qkv: Tensor, bias: Tensor | None, allowed: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (qkv if bias is None else qkv + bias).unbind(2))
    return plain(q, k, v, allowed).transpose(1, 2)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("n", "dim"), [(20, 16), (34, 24)])
def test_packed_with_bias(n, dim, masked, kernel_dtype, device, check_error, poisoned):
    qkv = draw(3, n, 3, 1, dim, dtype=kernel_dtype, device=device)
    bias = draw(3, 1, dim, dtype=kernel_dtype, device=device, seed=1)
    grad = draw(3, n, 1, dim, dtype=kernel_dtype, device=device, seed=2)
    key_mask = mask_of(3, n, device) if masked else None
    if key_mask is not None:
        key_mask[2] = False
    allowed = allowed_keys(n, n, masked, key_mask, device)
    call = lambda qkv, bias: masked_attention_packed(
        qkv, qkv_bias=bias, causal=masked, key_mask=key_mask, backend="triton"
    )
    got, grads = run(call, (qkv, bias), grad)
    same, same_grads = run(lambda x, b: packed_plain(x, b, allowed), (qkv, bias), grad)
    truth, truths = run(lambda x, b: packed_plain(x, b, allowed), (qkv.double(), bias.double()), grad.double())
    check_error(got, same, truth, factor=2, name="out")
    for name, *three in zip(("dqkv", "dbias"), grads, same_grads, truths, strict=True):
        check_error(*three, factor=3, name=name)
    assert got.is_contiguous() and grads[0].is_contiguous()
    # A bias of k moves all scores of a query together.
    assert grads[1][1].eq(0).all()


def test_packed_gives_the_bits_of_separate_tensors(device):
    qkv = draw(2, 20, 3, 2, 32, dtype=torch.float16, device=device)
    grad = draw(2, 20, 2, 32, dtype=torch.float16, device=device, seed=1)
    got, (dqkv,) = run(lambda x: masked_attention_packed(x, causal=True, backend="triton"), (qkv,), grad)
    separate = [x.transpose(1, 2).contiguous() for x in qkv.unbind(2)]
    call = lambda q, k, v: masked_attention(q, k, v, causal=True, backend="triton")
    want, grads = run(call, separate, grad.transpose(1, 2))
    assert torch.equal(got, want.transpose(1, 2))
    assert all(torch.equal(a, b.transpose(1, 2)) for a, b in zip(dqkv.unbind(2), grads, strict=True))


def test_strided_projection(device):
    qkv = draw(2, 18, 3, 2, 32, dtype=torch.float16, device=device)[:, 1:, :, :, ::2]
    bias = draw(2, 3, 16, dtype=torch.float16, device=device, seed=1).transpose(0, 1)
    grad = draw(2, 17, 2, 16, dtype=torch.float16, device=device, seed=2)
    call = lambda x, b: masked_attention_packed(x, qkv_bias=b, backend="triton")
    got, grads = run(call, (qkv, bias), grad)
    want, wanted = run(call, (qkv.contiguous(), bias.contiguous()), grad)
    assert torch.equal(got, want)
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))


@pytest.mark.parametrize("tiles", [1, 2, 4])
def test_tiles_of_one_program_change_nothing(tiles, device):
    q, k, v = qkv_inputs(1, 1, 100, 40, 16, torch.float16, device)
    want = masked_attention(q, k, v, backend="triton")
    config = {"BLOCK_M": 16, "TILES": tiles, "num_warps": 4, "num_stages": 2}
    with tables.override("attention_short", "forward", "half-d64-n128", config):
        got = masked_attention(q, k, v, backend="triton")
    torch.testing.assert_close(got, want, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("block", "step"), [(16, 64), (64, 16), (32, 32)])
@pytest.mark.parametrize("causal", [False, True])
def test_block_sizes_of_the_backward(block, step, causal, device, check_error, poisoned):
    config = {"BLOCK": block, "STEP": step, "num_warps": 4, "num_stages": 1}
    with tables.override("attention_short", "backward", "half-d64-n128", config):
        compare(check_error, *qkv_inputs(1, 1, 70, 70, 16, torch.float16, device), causal=causal)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "kv"])
def test_only_wanted_gradients(wanted, device):
    tensors = dict(zip("qkv", qkv_inputs(1, 1, 18, 18, 16, torch.float16, device), strict=True))
    grad = draw(1, 1, 18, 16, dtype=torch.float16, device=device, seed=9)
    call = lambda q, k, v: masked_attention(q, k, v, backend="triton")
    _, everything = run(call, tensors.values(), grad)
    leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in tensors.items()}
    call(**leaves).backward(grad)
    for name, full in zip("qkv", everything, strict=True):
        got = leaves[name].grad
        assert (got is None) == (name not in wanted)
        assert got is None or torch.equal(got, full)


def test_two_runs_give_the_same_bits(kernel_dtype, device):
    qkv = draw(2, 20, 3, 1, 16, dtype=kernel_dtype, device=device)
    bias = draw(3, 1, 16, dtype=kernel_dtype, device=device, seed=1)
    grad = draw(2, 20, 1, 16, dtype=kernel_dtype, device=device, seed=2)
    call = lambda x, b: masked_attention_packed(x, qkv_bias=b, key_mask=mask_of(2, 20, device), backend="triton")
    (out, grads), (again, grads_again) = (run(call, (qkv, bias), grad) for _ in range(2))
    assert torch.equal(out, again)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))


@pytest.mark.parametrize(("b", "h", "m", "n"), [(0, 2, 3, 3), (2, 0, 3, 3), (2, 2, 0, 3), (2, 2, 3, 0), (1, 1, 0, 0)])
def test_empty(b, h, m, n, device, poisoned):
    q, k, v = qkv_inputs(b, h, m, n, 16, torch.float16, device)
    mask = torch.ones(b, n, dtype=torch.bool, device=device)
    grad = torch.ones_like(q)
    out, grads = run(lambda *x: masked_attention(*x, key_mask=mask, backend="triton"), (q, k, v), grad)
    assert out.shape == q.shape and out.eq(0).all()
    assert all(x.eq(0).all() for x in grads)


def test_empty_packed(device):
    qkv, bias = torch.ones(2, 0, 3, 2, 16, device=device).half(), torch.ones(3, 2, 16, device=device).half()
    call = lambda x, b: masked_attention_packed(x, qkv_bias=b, backend="triton")
    out, (dqkv, dbias) = run(call, (qkv, bias), qkv[:, :, 0])
    assert out.shape == (2, 0, 2, 16) and dqkv.shape == qkv.shape
    assert dbias.eq(0).all()


@settings(max_examples=5, deadline=None)
@given(
    b=st.integers(2, 3),
    n=st.integers(1, 36),
    dim=st.sampled_from([16, 24]),
    causal=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_order_of_sequences_does_not_matter(b, n, dim, causal, seed):
    q, k, v, grad = (draw(b, 1, n, dim, dtype=torch.float16, device=DEVICE, seed=seed + i) for i in range(4))
    key_mask = (torch.rand(b, n, generator=torch.Generator().manual_seed(seed)) < 0.6).to(DEVICE)
    order = torch.randperm(b, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    results = []
    for index in (slice(None), order):
        call = lambda *x, i=index: masked_attention(*x, causal=causal, key_mask=key_mask[i], backend="triton")
        out, grads = run(call, [x[index] for x in (q, k, v)], grad[index])
        results.append((out, *grads))
    for a, b_ in zip(*results, strict=True):
        assert torch.equal(a[order], b_)


@settings(max_examples=6, deadline=None)
@given(n=st.integers(1, 40), padding=st.integers(1, 40), seed=st.integers(0, 1000))
def test_padding_does_not_matter(n, padding, seed):
    """Masked keys at the end, whatever they hold, against keys that are cut off."""
    m, total = n + padding, n + padding
    q = draw(1, 1, m, 16, dtype=torch.float32, device=DEVICE, seed=seed)
    k, v = (draw(1, 1, total, 16, dtype=torch.float32, device=DEVICE, seed=seed + i) for i in (1, 2))
    grad = draw(1, 1, m, 16, dtype=torch.float32, device=DEVICE, seed=seed + 3)
    key_mask = (torch.arange(total) < n)[None].to(DEVICE)
    out, grads = run(lambda *x: masked_attention(*x, key_mask=key_mask, backend="triton"), (q, k, v), grad)
    cut, cut_grads = run(lambda *x: masked_attention(*x, backend="triton"), (q, k[:, :, :n], v[:, :, :n]), grad)
    torch.testing.assert_close(out, cut, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(grads[0], cut_grads[0], rtol=1e-5, atol=5e-6)
    for full, short in zip(grads[1:], cut_grads[1:], strict=True):
        torch.testing.assert_close(full[:, :, :n], short, rtol=1e-5, atol=1e-5)
        assert full[:, :, n:].eq(0).all()
