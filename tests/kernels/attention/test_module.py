from __future__ import annotations

import pytest
import torch
from torch import nn

from farl_kernels.attention import MaskedAttention


@pytest.fixture
def pair():
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(32, 4, batch_first=True).double()
    nn.init.normal_(theirs.in_proj_bias)
    nn.init.normal_(theirs.out_proj.bias)
    ours = MaskedAttention(32, 4).double()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_multihead_attention(pair, causal, masked):
    ours, theirs = pair
    x = torch.randn(3, 7, 32, dtype=torch.float64)
    key_mask = torch.arange(7) < torch.tensor([[7], [3], [5]]) if masked else None
    forbidden = torch.ones(7, 7, dtype=torch.bool).triu(1) if causal else None
    padding = None if key_mask is None else ~key_mask
    want, _ = theirs(x, x, x, attn_mask=forbidden, key_padding_mask=padding, need_weights=False)
    torch.testing.assert_close(ours(x, key_mask, causal=causal), want)


def test_packed_equals_padded(pair):
    ours, _ = pair
    lengths = torch.tensor([7, 3, 5])
    x = torch.randn(3, 7, 32, dtype=torch.float64)
    inside = torch.arange(7) < lengths[:, None]
    cu_seqlens = torch.tensor([0, 7, 10, 15], dtype=torch.int32)
    for causal in (False, True):
        packed = ours(x[inside], causal=causal, cu_seqlens=cu_seqlens, max_seqlen=7)
        torch.testing.assert_close(packed, ours(x, inside, causal=causal)[inside])


def test_starts_as_multihead_attention_does():
    torch.manual_seed(1)
    theirs = nn.MultiheadAttention(16, 2)
    ours = MaskedAttention(16, 2)
    assert [(n, p.shape) for n, p in ours.named_parameters()] == [(n, p.shape) for n, p in theirs.named_parameters()]
    assert ours.in_proj_bias is not None and ours.in_proj_bias.eq(0).all() and ours.out_proj.bias.eq(0).all()
    bound = (6 / (16 + 48)) ** 0.5
    assert 0.9 * bound < ours.in_proj_weight.abs().max() <= bound


def test_autocast_and_gradients():
    layer = MaskedAttention(16, 2)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(torch.randn(2, 5, 16))
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.ne(0).any() for p in layer.parameters())


def test_errors():
    with pytest.raises(ValueError, match="dim 10 is no multiple of num_heads 4"):
        MaskedAttention(10, 4)
    with pytest.raises(ValueError, match=r"x has shape \(2, 5, 8\), want \[B, N, 16\]"):
        MaskedAttention(16, 2)(torch.zeros(2, 5, 8))
    with pytest.raises(ValueError, match=r"want \[T, 16\]"):
        MaskedAttention(16, 2)(torch.zeros(2, 5, 16), cu_seqlens=torch.zeros(2, dtype=torch.int32), max_seqlen=1)
