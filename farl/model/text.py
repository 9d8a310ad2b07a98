"""CLIP's text tower (Radford et al. 2021) on packed captions: padding is never computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from farl.model.blocks import Block, LayerNorm, Packing, Stream, Transformer, take_indexed
from farl.model.config import ModelConfig, TextConfig
from farl_kernels.linear_layer import linear


@dataclass(frozen=True)
class PackedText:
    """Captions one after another, without padding; each ends with its end-of-text token.

    Attributes:
        tokens: int64 [T]; what lies past ``cu_seqlens[-1]`` (a fixed budget) has no influence.
        cu_seqlens: int32 [S + 1], caption s is ``tokens[cu_seqlens[s]:cu_seqlens[s + 1]]``.
        max_seqlen: at least the length of the longest caption.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    def __len__(self) -> int:
        """Number of captions."""
        return len(self.cu_seqlens) - 1

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> PackedText:
        """The same captions on `device`."""
        return PackedText(
            self.tokens.to(device, non_blocking=non_blocking),
            self.cu_seqlens.to(device, non_blocking=non_blocking),
            self.max_seqlen,
        )

    def pin_memory(self) -> PackedText:
        """The same captions in page-locked memory."""
        return PackedText(self.tokens.pin_memory(), self.cu_seqlens.pin_memory(), self.max_seqlen)

    def part(self, rows: slice) -> PackedText:
        """Captions `rows` (a slice of step 1). Reads `cu_seqlens`: do it before the move to a GPU."""
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise ValueError(f"part takes consecutive captions, not every {step}th")
        bounds = self.cu_seqlens[start : max(stop, start) + 1]
        return PackedText(self.tokens[int(bounds[0]) : int(bounds[-1])], bounds - bounds[0], self.max_seqlen)

    @classmethod
    def from_padded(cls, token_ids: Tensor) -> PackedText:
        """From ids [S, L] that hold anything after the end-of-text token, the (first) largest id of a row.

        Waits for the device, because the total length decides a shape.
        """
        if token_ids.ndim != 2 or token_ids.is_floating_point():
            raise ValueError(f"token_ids must be int64 [S, L], not {token_ids.dtype} {list(token_ids.shape)}")
        lengths = token_ids.argmax(dim=1) + 1
        kept = torch.arange(token_ids.shape[1], device=token_ids.device) < lengths[:, None]
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        return cls(token_ids[kept].long(), cu_seqlens, token_ids.shape[1])


class TextTower(nn.Module):
    """Captions to features.

    The released checkpoints keep these parameters at the top level, beside `visual`: so the whole model derives from
    this class and does not hold it as a part.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        text = config.text
        self.text_config: TextConfig = text
        self._compute_dtype: torch.dtype | None = None
        self.token_embedding = nn.Embedding(text.vocab_size, text.width)
        self.positional_embedding = nn.Parameter(torch.empty(text.context_length, text.width))
        self.transformer = Transformer(
            text.layers, text.width, text.heads, text.mlp_ratio, config.activation, config.layer_norm_cast
        )
        self.ln_final = LayerNorm(text.width, config.layer_norm_cast)
        self.text_projection = nn.Parameter(torch.empty(text.width, config.embed_dim))
        self._init_text()

    def encode_text(self, token_ids: Tensor) -> Tensor:
        """Features [B, embed_dim], not normalised, of padded ids, int64 [B, at most 77]. Waits for the device."""
        return self.encode_text_packed(PackedText.from_padded(token_ids))

    def encode_text_packed(self, text: PackedText) -> Tensor:
        """Features [S, embed_dim], not normalised, of S packed captions."""
        if text.max_seqlen > self.text_config.context_length:
            raise ValueError(
                f"captions of up to {text.max_seqlen} tokens: the model takes {self.text_config.context_length}"
            )
        packing = Packing(text.cu_seqlens, text.max_seqlen)
        stream = self.transformer.all_but_last(self._embed(text), causal=True, packing=packing)
        take = take_indexed(text.cu_seqlens[1:].long() - 1)
        stream = self.transformer.run(self.transformer.last.at_rows, stream, take, packing)
        return linear(self.ln_final(stream)[0], self.text_projection.t())

    def _embed(self, text: PackedText) -> Stream:
        """Tokens with their positions [T, width]; the residual stream has the dtype of the parameters throughout."""
        words = self.token_embedding(text.tokens)
        places = F.embedding(self._positions(text), self.positional_embedding)
        if self._compute_dtype is None:
            return Stream(words + places)
        # The first norm adds them, and what it gives has the dtype of its x.
        return Stream(places.to(self._compute_dtype), words)

    def _positions(self, text: PackedText) -> Tensor:
        """Position of each token in its caption, int64 [T]; past the last caption some valid position."""
        index = torch.arange(len(text.tokens), device=text.tokens.device, dtype=text.cu_seqlens.dtype)
        caption = torch.searchsorted(text.cu_seqlens[1:], index, right=True)
        return (index - text.cu_seqlens[caption]).clamp(max=self.text_config.context_length - 1).long()

    def _init_text(self) -> None:
        """Depth-scaled initialisation of openai/CLIP `clip/model.py`, initialize_parameters."""
        width, layers = self.text_config.width, self.text_config.layers
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width**-0.5)
        for block in self.transformer.resblocks:
            assert isinstance(block, Block)
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            nn.init.zeros_(block.attn.out_proj.bias)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
