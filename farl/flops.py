"""Floating-point operations of a training step: from the sizes of the model, and counted while a step runs.

A multiply-add counts as two operations, and only products of matrices count. Counted is the work that the model needs,
which is what the MFU is measured against: no caption padding, no recomputed activations or attention scores, the last
blocks only where their output is used, no visual tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

import farl_kernels  # noqa: F401  registers the fused ops that FORMULAS names
from farl.model import ModelConfig

# Mean caption length of web image-text pairs, start and end token included; the log's MFU needs no better figure.
CAPTION_TOKENS = 16


class ForwardFlops(NamedTuple):
    """FLOP of one pair's forward pass by part.

    `patches` is the patch embedding (once for clean and masked image), `trunk` the image tower on those images that the
    losses want, `mim` the masked branch's own blocks and its head.
    """

    patches: float
    trunk: float
    mim: float
    text: float

    @property
    def image(self) -> float:
        return self.patches + self.trunk + self.mim


def forward_flops(
    sizes: ModelConfig, *, masked: int, caption_tokens: int = CAPTION_TOKENS, contrast: bool = True
) -> ForwardFlops:
    """FLOP per pair of the forward pass with `masked` patches to predict; arguments as in `training_flops`."""
    vision, text = sizes.vision, sizes.text
    tokens = vision.num_patches + 1

    def image_block(queries: int = tokens) -> float:
        return _block(vision.width, vision.mlp_ratio, tokens, queries)

    trunk = mim = words = 0.0
    if contrast:
        trunk = (vision.layers - 1) * image_block() + image_block(queries=1) + 2 * vision.width * sizes.embed_dim
        words = (text.layers - 1) * _block(text.width, text.mlp_ratio, caption_tokens, caption_tokens)
        words += _block(text.width, text.mlp_ratio, caption_tokens, 1) + 2 * text.width * sizes.embed_dim
    if sizes.mim is not None:
        trunk += vision.layers * image_block()
        mim = (sizes.mim.layers - 1) * image_block() + image_block(queries=masked)
        mim += 2 * masked * vision.width * sizes.mim.vocab_size
    return ForwardFlops(2 * vision.num_patches * 3 * vision.patch_size**2 * vision.width, trunk, mim, words)


def training_flops(
    sizes: ModelConfig,
    *,
    masked: int,
    caption_tokens: int = CAPTION_TOKENS,
    contrast: bool = True,
    global_batch: int = 0,
) -> float:
    """FLOP per image-text pair of forward and backward (twice the forward).

    Args:
        masked: patches to predict in an image.
        contrast: False trains the masked branch alone: no captions, no clean images.
        global_batch: pairs that the contrastive loss compares each one with; 0 leaves the loss out (at 5,120 pairs it
            is a ten-thousandth of ViT-B/16's step).
    """
    forward = forward_flops(sizes, masked=masked, caption_tokens=caption_tokens, contrast=contrast)
    # Pixels need no gradient: the patch embedding costs two products, not three.
    return 3 * sum(forward) - forward.patches + 3 * 2 * global_batch * sizes.embed_dim


def eliminated_flops(sizes: ModelConfig, *, masked: int, caption_tokens: int = CAPTION_TOKENS) -> dict[str, float]:
    """FLOP per pair, forward and backward, that a step written without each elimination takes more, by its name.

    The others stay in place. Padding is to the text tower's context length.
    """
    vision, text = sizes.vision, sizes.text
    tokens = vision.num_patches + 1

    def rows(width: int, mlp_ratio: float, of: int, used: int) -> float:
        return 3 * (_block(width, mlp_ratio, of, of) - _block(width, mlp_ratio, of, used))

    needed = training_flops(sizes, masked=masked, caption_tokens=caption_tokens)
    found = {
        "captions without padding": training_flops(sizes, masked=masked, caption_tokens=text.context_length) - needed,
        "last text block: end-of-text row only": rows(text.width, text.mlp_ratio, caption_tokens, 1),
        "last image block: class token only": rows(vision.width, vision.mlp_ratio, tokens, 1),
    }
    if sizes.mim is not None:
        head = 3 * 2 * (vision.num_patches - masked) * vision.width * sizes.mim.vocab_size
        found["last masked block: masked rows only"] = rows(vision.width, vision.mlp_ratio, tokens, masked)
        found["head of visual tokens: masked rows only"] = head
        patches = forward_flops(sizes, masked=masked).patches
        found["patches embedded once for both streams"] = 2 * patches
    return found


def encoder_flops(
    *, masked: int, image_size: int = 112, vocab_size: int = 8192, hidden: int = 256, blocks_per_group: int = 2
) -> float:
    """FLOP of the visual tokens of one image by DALL-E's encoder (`farl.tokens.DalleEncoder`), which is not trained.

    Its last convolution counts at the `masked` cells alone, where tokens are wanted. `training_flops` is without all of
    it: add it where tokens are made in the step.
    """
    pixels, width = image_size**2, hidden
    found = 2 * 7**2 * 3 * hidden * pixels
    for group in range(4):
        outputs = hidden << group
        inner = outputs // 4
        for _ in range(blocks_per_group):
            past = width * outputs if width != outputs else 0
            found += 2 * pixels * (3**2 * (width * inner + 2 * inner**2) + inner * outputs + past)
            width = outputs
        # Three times between four groups, the side is halved.
        pixels //= 4 if group < 3 else 1
    return float(found + 2 * masked * width * vocab_size)


def count_flops(run: Callable[[], object]) -> int:
    """FLOP of the products taken while `run` runs, forward and backward, by torch's counter and `FORMULAS`.

    What runs twice counts twice (activation checkpointing does). Sums over packed tokens that take the place of small
    products on a CPU are not seen.
    """
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        run()
    return counter.get_total_flops()


def _block(width: int, mlp_ratio: float, tokens: int, queries: int) -> float:
    """Forward FLOP of a transformer block of which `queries` rows of its `tokens` are used."""
    keys_and_values = 2 * 2 * width**2 * tokens
    query_and_output = 2 * 2 * width**2 * queries
    mlp = 2 * 2 * width * round(width * mlp_ratio) * queries
    attention = 2 * 2 * queries * tokens * width
    return keys_and_values + query_and_output + mlp + attention


Shape = Sequence[int]


def _attention(q: Shape, k: Shape, axis: int = -2) -> int:
    """Two products: q [B, H, M, D], k [B, H, N, D]; `axis` is that of the N keys."""
    return 4 * prod(q) * k[axis]


def _qkv(qkv: Shape) -> int:
    """[B, N, 3, H, D]."""
    return 4 * prod(qkv) // 3 * qkv[1]


def _packed(qkv: Shape, cu_seqlens: Shape) -> int:
    """[T, 3, H, D] of S sequences taken as equally long, as the shapes tell no more."""
    return 4 * prod(qkv) // 3 * qkv[0] // (cu_seqlens[0] - 1)


def _token_loss(hidden: Shape, weight: Shape, needs: Sequence[bool]) -> int:
    """The gradients of hidden states and weight are made in the forward pass."""
    return 2 * prod(hidden) * weight[0] * (1 + sum(needs))


def _formulas() -> dict[Any, Callable[..., int]]:
    aten, ours = torch.ops.aten, torch.ops.farl_kernels
    found: dict[Any, Callable[..., int]] = {
        # torch's counter knows the functional forms alone.
        aten.addmm_: lambda _, a, b, *rest, **__: 2 * prod(a) * b[-1],
        # The raw ops have heads after tokens.
        ours.attention_forward: lambda q, k, *_, **__: _attention(q, k, axis=1),
        ours.attention_backward: lambda _, q, k, *rest, **__: 2 * _attention(q, k, axis=1),
        ours.attention_qkv_forward: lambda qkv, *_, **__: _qkv(qkv),
        ours.attention_qkv_backward: lambda _, qkv, *rest, **__: 2 * _qkv(qkv),
        ours.attention_packed_forward: lambda qkv, _, cu_seqlens, *rest, **__: _packed(qkv, cu_seqlens),
        ours.attention_packed_backward: lambda _, qkv, bias, cu_seqlens, *rest, **__: 2 * _packed(qkv, cu_seqlens),
        # Each key meets one query, each value one weight.
        ours.attention_single_query_forward: lambda q, kv, *_, **__: 2 * prod(kv),
        ours.attention_single_query_backward: lambda _, q, kv, *rest, **__: 4 * prod(kv),
        # In one process all texts are at hand; several take plain products.
        ours.contrastive_forward: lambda image, text, *_, **__: 2 * prod(image) * text[0],
        ours.contrastive_backward: lambda _, image, text, *rest, **__: 4 * prod(image) * text[0],
        ours.masked_token_cross_entropy_forward: (
            lambda hidden, weight, bias, targets, ignore, mean, for_hidden, for_weight, *_, **__: _token_loss(
                hidden, weight, (for_hidden, for_weight)
            )
        ),
    }
    # Four products in the backward pass: the fifth of torch's formula computes the scores again. (Not every supported
    # torch counts the CPU's op at all.)
    for kind in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention"):
        name = f"_scaled_dot_product_{kind}"
        found[getattr(aten, name)] = lambda q, k, *_, **__: _attention(q, k)
        found[getattr(aten, f"{name}_backward")] = lambda _, q, k, *rest, **__: 2 * _attention(q, k)
    return found


# FLOP of ops by the shapes of their tensors, for `FlopCounterMode(custom_mapping=...)`; ops without products (norms,
# activations, patches and masks) have none.
FORMULAS = _formulas()
