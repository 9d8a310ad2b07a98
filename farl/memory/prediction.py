"""Bytes of a training step, from the sizes of the model.

Counted are the tensors that autograd keeps, op by op as the autograd functions of `farl_kernels` save them;
docs/memory.md says what is exact and what is left out.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from farl.flops import CAPTION_TOKENS
from farl.initialize import part_of, shared_groups, without_storage
from farl.masking import MASK_RATIO, mask_sizes
from farl.model import FaRL, ModelConfig

# What the losses work on at a time on a GPU (farl_kernels.gemm.logit_chunk_bytes).
CHUNK_BYTES = 2**28


@dataclass(frozen=True)
class Memory:
    """Bytes of a process's training step.

    Attributes:
        weights, gradients, moments: float32; gradients are DDP's buckets where there are several processes. Those that
            the process keeps, where they are shared out.
        batch: images, captions, masks and visual tokens of the process's whole share of the global batch.
        image, masked, text: what the image tower on both streams, the masked branch with its head, and the text tower
            keep for the backward pass.
        features: of both towers, for the contrastive loss, with those gathered from the other processes.
        casts: bfloat16 copies of weights that autograd keeps.
        workspace: the most that either loss works on beside all of these, and casts that live no longer.
        backward: the most that the backward pass holds beyond what was kept: gradients, and a block computed again.
        held_gradients: whether gradients are there while the activations are: with DDP or micro-batches.
        gathered: where the state is shared out, the most that is whole at a time: weights of what belongs to no block,
            and five times a block: weights, gradients, and buffers of the collective calls before and after it.
        reduced: likewise at the very end: gradients of what belongs to no block, and the buffer that they are sent in.
    """

    weights: int
    gradients: int
    moments: int
    batch: int
    image: int
    masked: int
    text: int
    features: int
    casts: int
    workspace: int
    backward: int
    held_gradients: bool
    gathered: int = 0
    reduced: int = 0

    @property
    def activations(self) -> int:
        """What is kept from the forward pass for the backward pass."""
        return self.image + self.masked + self.text + self.features + self.casts

    @property
    def phases(self) -> dict[str, int]:
        """Bytes at the three moments that can be the peak; the last one from where the last gradients are there."""
        always = self.weights + self.moments + self.batch
        held = always + self.activations + (self.gradients if self.held_gradients else 0)
        return {
            "end of the forward pass": held + self.workspace + self.gathered,
            "backward pass": held + self.backward + self.gathered,
            "optimizer step": always + self.gradients + self.reduced,
        }

    @property
    def peak(self) -> int:
        return max(self.phases.values())


class _Tower(NamedTuple):
    """Bytes that blocks keep; `wide` bytes a number of the residual stream, `size` of everything else."""

    width: int
    hidden: int
    heads: int
    size: int
    wide: int

    def norm(self, rows: int) -> int:
        """The sum that it normalises, and two statistics a row."""
        return rows * (self.width * self.wide + 8)

    def block(self, rows: int) -> int:
        """Two norms; inputs of four products, qkv (result and input of the attention), input of the activation."""
        return 2 * self.norm(rows) + rows * (self.size * (6 * self.width + 2 * self.hidden) + 4 * self.heads)

    def at_rows(self, rows: int, queries: int, *, copied: bool) -> int:
        """`Block.at_rows`; `copied`: the query rows are a copy, not a view."""
        asked = self.norm(queries) + queries * (self.size * (3 * self.width + 2 * self.hidden) + 4 * self.heads)
        return self.norm(rows) + 3 * rows * self.size * self.width + asked + copied * queries * self.size * self.width

    def entry(self, rows: int) -> int:
        """The stream before a block: all that is kept of a block that is computed again."""
        return rows * self.width * (self.size + self.wide)

    def entries(self, rows: int, layers: int) -> int:
        """The streams before `layers` blocks, the first of which has no residual yet."""
        return rows * self.width * self.wide + (layers - 1) * self.entry(rows)

    def gradients(self, rows: int) -> int:
        """The most that a block's backward pass holds beside what was kept: the stream's gradient and the MLP's."""
        return rows * self.size * (self.width + self.hidden)


def predict_memory(
    config: ModelConfig,
    *,
    pairs: int,
    global_batch: int = 0,
    world_size: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    masked: bool = True,
    contrast: bool = True,
    mask_ratio: float = MASK_RATIO,
    caption_tokens: int = CAPTION_TOKENS,
    checkpoint_activations: bool = False,
    shard: bool = False,
    fused: bool = True,
) -> Memory:
    """Memory of `farl.step.TrainStep` in a process.

    Args:
        pairs: image-text pairs that a process runs at once; fewer than its share of `global_batch` are micro-batches.
        global_batch: pairs of an update; 0: `pairs` of each process.
        dtype: of the towers: torch.bfloat16 or torch.float32. Weights are float32.
        masked: with the masked branch, if the model has one.
        contrast: False where --contrastive-weight is 0: neither captions nor clean images.
        caption_tokens: mean length of a caption, start and end token included.
        checkpoint_activations, shard: --save-memory recompute and shard; one process has nothing to share out.
        fused: what the Triton ops keep. False: the CPU's ops, which pad captions (all taken as equally long).

    Raises:
        ValueError: a number that is not positive, another dtype, or neither branch to train.
    """
    if min(pairs, world_size, caption_tokens) < 1 or global_batch < 0:
        raise ValueError(
            f"pairs {pairs}, world_size {world_size} and caption_tokens {caption_tokens} must be at least 1, "
            f"and global_batch {global_batch} at least 0"
        )
    if dtype not in (torch.bfloat16, torch.float32) or (dtype != torch.float32 and not fused):
        raise ValueError(f"dtype is {dtype}; use torch.float32, or torch.bfloat16 with the fused ops")
    mim = config.mim if masked else None
    if mim is None and not contrast:
        raise ValueError("neither captions nor a masked branch: there is nothing to train")
    share = max(pairs, -(-global_batch // world_size))
    vision, text, size = config.vision, config.text, dtype.itemsize
    tower = _Tower(vision.width, round(vision.width * vision.mlp_ratio), vision.heads, size, size)
    # The embeddings of captions are float32, and so the residual stream stays.
    words = _Tower(text.width, round(text.width * text.mlp_ratio), text.heads, size, 4)

    patches, most = vision.num_patches, mask_sizes(vision.grid, mask_ratio)[0]
    rows, streams = pairs * (patches + 1), int(contrast) + int(mim is not None)
    both = streams * rows
    stem = pairs * patches * 3 * vision.patch_size**2 * size + tower.norm(both)
    last = int(contrast) * tower.at_rows(rows, pairs, copied=False) + (tower.block(rows) if mim else 0)
    pooled = int(contrast) * (tower.norm(pairs) + pairs * vision.width * size)
    if checkpoint_activations:
        image = stem + tower.entries(both, vision.layers) + pooled
    else:
        image = stem + (vision.layers - 1) * tower.block(both) + last + pooled

    branch = asked = 0
    if mim is not None:
        asked = tower.at_rows(rows, pairs * most, copied=True)
        kept = mim.layers * tower.entry(rows)
        branch = kept if checkpoint_activations else (mim.layers - 1) * tower.block(rows) + asked
        # Index of the rows, the last norm, and the gradients that the token loss makes in its forward pass.
        branch += pairs * most * 8 + tower.norm(pairs * most) + pairs * most * vision.width * size
        branch += 4 * mim.vocab_size * (vision.width + 1)

    tokens, captions = pairs * caption_tokens, 0
    if contrast:
        captions = 8 * (tokens + pairs) + words.norm(pairs) + pairs * text.width * size
        if checkpoint_activations:
            # In bf16 positions and words enter the first block as stream and residual.
            captions += text.layers * words.entry(tokens) if size == 2 else words.entries(tokens, text.layers)
        else:
            captions += (text.layers - 1) * words.block(tokens) + words.at_rows(tokens, pairs, copied=True)
            if not fused:
                captions += _padded(words, tokens, pairs, text.layers)

    features = _features(config, pairs, share, world_size, size) if contrast else 0
    workspace = _workspace(config, pairs, share, world_size, size, most, contrast=contrast, masked=mim is not None)
    casts = 0
    if size == 2:
        # What is computed again casts its weights again, for as long as it takes.
        projections = int(contrast) * (vision.width + text.width) * config.embed_dim
        every = _numbers_cast(config, masked=mim is not None, contrast=contrast)
        casts = size * (projections if checkpoint_activations else every)
    batch = share * 3 * vision.image_size**2
    batch += int(contrast) * share * (8 * caption_tokens + 4)
    # Mask, positions and targets, and tokens of all patches where they are cached.
    batch += share * (patches + 12 * most + 4 * patches) if mim is not None else 0

    # What the gradients of the rows that nobody asks for take, before anything larger is let go.
    stream = rows * vision.width * size
    backward = (4 if mim else 3) * stream
    if checkpoint_activations:
        # The two streams part before the last block, where gradients of stream and residual become two tensors.
        in_trunk = tower.block(both) + tower.gradients(both) - branch - tower.entry(both) + (streams - 1) * 2 * stream
        in_last = last + tower.gradients(rows) + stream - branch
        candidates = [in_trunk] * (vision.layers > 1) + [in_last] + [asked + 5 * stream] * (mim is not None)
        backward = max(0, *candidates)
    shard = shard and world_size > 1
    state = _shared(config, world_size if shard else 1, masked=mim is not None, contrast=contrast)
    return Memory(
        weights=4 * state.all,
        gradients=4 * state.trained,
        moments=8 * state.trained,
        batch=batch,
        image=image,
        masked=branch,
        text=captions,
        features=features,
        casts=casts,
        workspace=workspace,
        backward=backward,
        held_gradients=(world_size > 1 and not shard) or pairs < share,
        gathered=4 * (state.root + 5 * state.block) if shard else 0,
        reduced=8 * state.root if shard else 0,
    )


def _padded(words: _Tower, tokens: int, pairs: int, layers: int) -> int:
    """What the CPU's attention keeps more of captions: packed rows beside padded ones, and sums over tokens."""
    block = tokens * (words.size * words.width + 16)
    last = tokens * (words.size * words.width + 4 * words.heads + 9) + pairs * 5 * words.heads
    return (layers - 1) * block + last


def _features(config: ModelConfig, pairs: int, share: int, world_size: int, size: int) -> int:
    wide = 4 if size < 4 else 0
    everybody = share * world_size * config.embed_dim * size if world_size > 1 else 0
    if pairs == share:
        # Of both towers: the features, their float32 copy and the normalised ones; then numbers of each pair.
        return 2 * pairs * config.embed_dim * (2 * size + wide) + 60 * pairs + everybody
    # Of both towers and all micro-batches: features, the leaves made of them, their gradients; normalised texts; and
    # what carries the gradient into a micro-batch.
    return (7 * share + 4 * pairs) * config.embed_dim * size + everybody


def _workspace(
    config: ModelConfig,
    pairs: int,
    share: int,
    world_size: int,
    size: int,
    most: int,
    *,
    contrast: bool,
    masked: bool,
) -> int:
    """Of the loss that takes more; with micro-batches the contrastive one runs beside no activations."""
    found = [0]
    if masked and config.mim is not None:
        head = config.mim.vocab_size * config.vision.width
        logits = min(CHUNK_BYTES, 4 * pairs * most * config.mim.vocab_size)
        found.append(logits + (head * (size + 4) if size == 2 else 0))
    if contrast and pairs == share:
        texts = share * world_size
        sums = 4 * config.embed_dim * (pairs + texts)
        found.append(min(CHUNK_BYTES, pairs * texts * size) + sums)
    return max(found)


class _Shared(NamedTuple):
    """Numbers in the first process's part of all parameters and of those that are trained; and whole, in what belongs
    to no block and in the largest block."""

    all: int
    trained: int
    root: int
    block: int


def _on_meta(config: ModelConfig, *, masked: bool, contrast: bool) -> FaRL:
    return without_storage(config if masked else replace(config, mim=None), contrast=contrast)


@functools.cache
def _shared(config: ModelConfig, world_size: int, *, masked: bool, contrast: bool) -> _Shared:
    groups = shared_groups(_on_meta(config, masked=masked, contrast=contrast))
    whole = groups.pop("whole")

    def part(trained: bool) -> int:
        shared = [p for group in groups.values() for p in group if p.requires_grad or not trained]
        return part_of(shared, world_size) + sum(p.numel() for p in whole if p.requires_grad or not trained)

    sizes = {name: sum(p.numel() for p in group) for name, group in groups.items()}
    return _Shared(part(False), part(True), sizes.pop(""), max(sizes.values(), default=0))


@functools.cache
def _numbers_cast(config: ModelConfig, *, masked: bool, contrast: bool) -> int:
    """Numbers of weights that products take in bf16, as often as they do."""
    model = _on_meta(config, masked=masked, contrast=contrast)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # Not cast, or not kept: what is looked up, the loss's own matrix, and the patches' (pixels want no gradient).
    uncast = ("embedding", "token_embedding.weight", "lm_head.weight", "conv1.weight")
    cast = sum(p.numel() for name, p in trained.items() if p.ndim > 1 and not name.endswith(uncast))
    if masked and contrast:
        # The last block of the image tower runs once for each stream.
        cast += sum(p.numel() for p in model.visual.transformer.last.parameters() if p.ndim > 1)
    return cast
