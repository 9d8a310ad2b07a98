"""Pre-norm transformer blocks over a residual stream whose last addition is always still pending.

A block hands on (x, residual, x_bias) instead of their sum, so that the addition, the bias and the next LayerNorm are
one op (`farl_kernels.add_layer_norm`). A block can also be asked for some rows only: exact, because every later use
of the stream is row by row, and the way the last block of each tower skips what nobody reads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from farl.model.config import Activation, LayerNormCast
from farl_kernels.activation import gelu, quick_gelu
from farl_kernels.attention import masked_attention, masked_attention_packed, single_query_attention
from farl_kernels.layer_norm import add_layer_norm
from farl_kernels.linear_layer import linear

EPS = 1e-5
Result = TypeVar("Result")
TakeRows = Callable[[Tensor], Tensor]


class Stream(NamedTuple):
    """A residual stream; its value is ``residual + x + x_bias``, all [..., C] but the bias [C]."""

    x: Tensor
    residual: Tensor | None = None
    x_bias: Tensor | None = None

    def value(self) -> Tensor:
        """The sum that the stream stands for: [..., C]."""
        x = self.x if self.x_bias is None else self.x + self.x_bias.to(self.x.dtype)
        return x if self.residual is None else self.residual + x

    def rows(self, take: TakeRows) -> Stream:
        """The stream at the rows that `take` picks."""
        return Stream(take(self.x), None if self.residual is None else take(self.residual), self.x_bias)

    def halves(self) -> tuple[Stream, Stream]:
        """First and second half of the batch."""
        x = self.x.chunk(2)
        residual = (None, None) if self.residual is None else self.residual.chunk(2)
        return Stream(x[0], residual[0], self.x_bias), Stream(x[1], residual[1], self.x_bias)


class Packing(NamedTuple):
    """Where the sequences of a packed [T, C] stream begin: int32 [S + 1], and a bound on their length."""

    cu_seqlens: Tensor
    max_seqlen: int


class LayerNorm(nn.Module):
    """LayerNorm (eps 1e-5) of a stream. `cast` as in `ModelConfig.layer_norm_cast`."""

    def __init__(self, width: int, cast: LayerNormCast) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self._affine_dtype = torch.float32 if cast == "after" else None

    def forward(self, stream: Stream) -> tuple[Tensor, Tensor]:
        """The normalised value and the value itself (the new residual), both [..., C]."""
        return add_layer_norm(
            stream.x,
            stream.residual,
            self.weight,
            self.bias,
            eps=EPS,
            affine_dtype=self._affine_dtype,
            x_bias=stream.x_bias,
        )


class Attention(nn.Module):
    """Multi-head self-attention with the parameter names of `nn.MultiheadAttention`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, h: Tensor, *, causal: bool, packing: Packing | None) -> Tensor:
        """[n, N, C], or packed [T, C], to the same shape; the bias of `out_proj` is left to the caller."""
        qkv = linear(h, self.in_proj_weight).unflatten(-1, (3, self.heads, -1))
        bias = self.in_proj_bias.view(3, self.heads, -1)
        if packing is None:
            out = masked_attention_packed(qkv, qkv_bias=bias, causal=causal)
        else:
            out = masked_attention_packed(
                qkv, qkv_bias=bias, cu_seqlens=packing.cu_seqlens, max_seqlen=packing.max_seqlen, causal=causal
            )
        return linear(out.flatten(-2), self.out_proj.weight)

    def at_rows(self, h: Tensor, rows: Tensor, packing: Packing | None) -> Tensor:
        """Queries from `rows` ([n, C]: one a sequence; or [n, K, C]), keys and values from all of h; like `rows`.

        Without a causal mask: the one query of a causal sequence must be its last row.
        """
        width = h.shape[-1]
        q_weight, kv_weight = self.in_proj_weight.split([width, 2 * width])
        q_bias, kv_bias = self.in_proj_bias.split([width, 2 * width])
        q = linear(rows, q_weight, q_bias).unflatten(-1, (self.heads, -1))
        kv = linear(h, kv_weight, kv_bias).unflatten(-1, (2, self.heads, -1))
        if packing is not None:
            out = single_query_attention(q, kv, cu_seqlens=packing.cu_seqlens, max_seqlen=packing.max_seqlen)
        elif rows.ndim == 2:
            out = single_query_attention(q, kv)
        else:
            k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
            out = masked_attention(q.transpose(1, 2), k, v).transpose(1, 2)
        return linear(out.flatten(-2), self.out_proj.weight)


class Mlp(nn.Module):
    """Two linear layers with an activation between, under CLIP's names."""

    def __init__(self, width: int, mlp_ratio: float, activation: Activation) -> None:
        super().__init__()
        hidden = round(width * mlp_ratio)
        self.c_fc = nn.Linear(width, hidden)
        self.c_proj = nn.Linear(hidden, width)
        self._activation = quick_gelu if activation == "quick_gelu" else gelu

    def forward(self, h: Tensor) -> Tensor:
        """[..., C] to [..., C]; the bias of `c_proj` is left to the caller."""
        return linear(self._activation(linear(h, self.c_fc.weight), self.c_fc.bias), self.c_proj.weight)


class Block(nn.Module):
    """x + attention(ln_1(x)), then x + mlp(ln_2(x))."""

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, activation: Activation, layer_norm_cast: LayerNormCast
    ) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = LayerNorm(width, layer_norm_cast)
        self.mlp = Mlp(width, mlp_ratio, activation)
        self.ln_2 = LayerNorm(width, layer_norm_cast)

    def forward(self, stream: Stream, *, causal: bool = False, packing: Packing | None = None) -> Stream:
        """The stream after the block, [n, N, C], or packed [T, C] with `packing`."""
        h, residual = self.ln_1(stream)
        return self._mlp(Stream(self.attn(h, causal=causal, packing=packing), residual, self.attn.out_proj.bias))

    def at_rows(self, stream: Stream, take: TakeRows, packing: Packing | None = None) -> Stream:
        """The output at the rows that `take` picks: [n, N, C] (or packed [T, C]) to [n, C] or [n, K, C]."""
        h, residual = self.ln_1(stream)
        x = self.attn.at_rows(h, take(h), packing)
        return self._mlp(Stream(x, take(residual), self.attn.out_proj.bias))

    def _mlp(self, stream: Stream) -> Stream:
        h, residual = self.ln_2(stream)
        return Stream(self.mlp(h), residual, self.mlp.c_proj.bias)


class Transformer(nn.Module):
    """A stack of blocks. Set `checkpoint_activations` to recompute each block in the backward pass."""

    def __init__(
        self,
        layers: int,
        width: int,
        heads: int,
        mlp_ratio: float,
        activation: Activation,
        layer_norm_cast: LayerNormCast,
    ) -> None:
        super().__init__()
        self.checkpoint_activations = False
        self.resblocks = nn.ModuleList(
            Block(width, heads, mlp_ratio, activation, layer_norm_cast) for _ in range(layers)
        )

    @property
    def last(self) -> Block:
        return self.block(-1)

    def block(self, index: int) -> Block:
        block = self.resblocks[index]
        assert isinstance(block, Block)
        return block

    def all_but_last(self, stream: Stream, *, causal: bool = False, packing: Packing | None = None) -> Stream:
        """The stream that enters the last block."""
        for index in range(len(self.resblocks) - 1):
            stream = self.run(self.block(index), stream, causal=causal, packing=packing)
        return stream

    def run(self, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Call `function`, a part of this stack, keeping its activations or recomputing them later."""
        if not (self.checkpoint_activations and torch.is_grad_enabled()):
            return function(*args, **kwargs)
        # There is no dropout to repeat, and saving the state of the generator would wait for the device.
        return checkpoint(partial(function, **kwargs), *args, use_reentrant=False, preserve_rng_state=False)


def take_first(x: Tensor) -> Tensor:
    """[n, N, C] to its class-token rows [n, C]."""
    return x[:, 0]


def take_indexed(index: Tensor) -> TakeRows:
    """Rows by flat index (int64, any shape [...]) of x flattened to [rows, C]: result [..., C].

    An embedding look-up, because its backward is deterministic and, on a CPU, far faster than that of index_select.
    """
    return lambda x: F.embedding(index, x.flatten(0, -2))
