"""Floating-point operations of a training step, from the sizes of the model: what the MFU is measured against.

A multiply-add counts as two operations. Counted is the work that the model needs: no caption padding, no recomputed
activations, the last blocks only where their output is used, no visual tokenizer.
"""

from __future__ import annotations

from farl.model import ModelConfig

# Mean caption length of web image-text pairs, start and end token included; the log's MFU needs no better figure.
CAPTION_TOKENS = 16


def training_flops(sizes: ModelConfig, *, masked: int, caption_tokens: int = CAPTION_TOKENS) -> float:
    """FLOP per image-text pair of forward and backward (twice the forward) with `masked` patches to predict."""
    vision, text = sizes.vision, sizes.text
    rows, columns = vision.grid
    patches = rows * columns
    tokens = patches + 1
    inner = 3 * vision.patch_size**2
    clean = (vision.layers - 1) * _block(vision.width, tokens) + _block(vision.width, tokens, queries=1)
    forward = clean + 2 * vision.width * sizes.embed_dim
    if sizes.mim is not None:
        forward += vision.layers * _block(vision.width, tokens)
        forward += (sizes.mim.layers - 1) * _block(vision.width, tokens) + _block(vision.width, tokens, queries=masked)
        forward += 2 * masked * vision.width * sizes.mim.vocab_size
    forward += (text.layers - 1) * _block(text.width, caption_tokens) + _block(text.width, caption_tokens, queries=1)
    forward += 2 * text.width * sizes.embed_dim
    # Pixels need no gradient: the patch embedding costs two products, not three.
    return 3 * forward + 2 * (2 * patches * inner * vision.width)


def _block(width: int, tokens: int, queries: int | None = None) -> float:
    """Forward FLOP of a transformer block of MLP ratio 4 of which `queries` rows (default: all) are used."""
    queries = tokens if queries is None else queries
    keys_and_values = 2 * 2 * width**2 * tokens
    query_output_mlp = 2 * (2 + 8) * width**2 * queries
    attention = 2 * 2 * queries * tokens * width
    return keys_and_values + query_output_mlp + attention
