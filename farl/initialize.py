"""What a run starts from: visual tokens, model and optimizer, new or from a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from farl.config import TrainConfig
from farl.evaluation.features import spread_positions
from farl.evaluation.pair_reader import read_batches
from farl.model import MODELS, FaRL, ModelConfig, load_pretrained
from farl.tokens import PatchCodebook, VisualTokenizer, build_tokenizer
from farl_engine.data import CpuDecoder, ShardIndex
from farl_engine.distributed import World, broadcast_object, say
from farl_engine.optim import parameter_groups

# Images that the codebook is fitted on: 128,000 patches for 512 codes at the sizes of farl-tiny.
CODEBOOK_IMAGES = 2_000
# Tables and single vectors that weight decay would only pull to zero; the logit scale and biases have no second axis.
UNDECAYED = ("positional_embedding", "class_embedding", "mask_token")


def visual_tokenizer(
    config: TrainConfig, index: ShardIndex, world: World, saved: dict[str, Any] | None
) -> VisualTokenizer | None:
    """Targets of the masked branch: of the checkpoint, from a file, or fitted by rank 0 on this run's own data.

    None where the masked branch is off.
    """
    if config.mim_weight == 0:
        return None
    if config.visual_tokens != "codebook":
        return build_tokenizer(config.visual_tokens, grid=named_sizes(config).vision.grid, device=world.device)
    state = saved["visual_tokens"] if saved is not None else None
    if state is None:
        sizes = named_sizes(config)
        assert sizes.mim is not None
        if world.is_main:
            say(world, f"fitting {sizes.mim.vocab_size} visual tokens on the run's own patches")
            decoder = CpuDecoder(sizes.vision.image_size)
            with read_batches(index, [spread_positions(len(index), CODEBOOK_IMAGES)], decoder) as batches:
                images = next(batches).images
            fitted = PatchCodebook.fit(
                images, patch_size=sizes.vision.patch_size, vocab_size=sizes.mim.vocab_size, seed=config.seed
            )
            state = fitted.state_dict()
        state = broadcast_object(world, state)
    return PatchCodebook.from_state_dict(state).to(world.device)


def build_model(config: TrainConfig, tokenizer: VisualTokenizer | None, saved: dict[str, Any] | None) -> FaRL:
    """The model of the checkpoint, of --init, or a new one drawn from --seed; the same on every rank.

    Raises:
        ValueError: --init holds other sizes than --model.
    """
    if saved is not None:
        model = FaRL(ModelConfig.from_dict(saved["model_config"]))
        model.load_state_dict(saved["model"])
        return model
    sizes = with_tokens(named_sizes(config), tokenizer)
    torch.manual_seed(config.seed)
    if not config.init:
        return FaRL(sizes)
    given = load_pretrained(config.init)
    if (given.config.vision, given.config.text, given.config.embed_dim) != (sizes.vision, sizes.text, sizes.embed_dim):
        raise ValueError(f"--init {config.init} holds other sizes than --model {config.model}: name the model it holds")
    model = FaRL(replace(given.config, mim=sizes.mim))
    fresh = model.state_dict()
    # The masked branch stays as drawn where the file has none, or has one for another set of visual tokens.
    kept = {
        name: value for name, value in given.state_dict().items() if fresh.get(name, value[:0]).shape == value.shape
    }
    model.load_state_dict(fresh | kept)
    return model


def build_optimizer(config: TrainConfig, model: FaRL, saved: dict[str, Any] | None) -> torch.optim.AdamW:
    """AdamW that heeds the loop's non-finite flag, with the moments of the checkpoint if there is one."""
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.weight_decay, no_decay=lambda name, _: name.endswith(UNDECAYED)),
        lr=config.lr,
        betas=(0.9, config.beta2),
        eps=1e-6,
        fused=True,
    )
    if saved is not None:
        optimizer.load_state_dict(saved["optimizer"])
    return optimizer


def named_sizes(config: TrainConfig) -> ModelConfig:
    if config.model not in MODELS:
        raise ValueError(f"--model is {config.model!r}; use one of {', '.join(MODELS)}")
    return MODELS[config.model]


def with_tokens(sizes: ModelConfig, tokenizer: VisualTokenizer | None) -> ModelConfig:
    """`sizes` with a masked branch for `tokenizer`'s vocabulary, or without one."""
    if tokenizer is None:
        return replace(sizes, mim=None)
    assert sizes.mim is not None
    return replace(sizes, mim=replace(sizes.mim, vocab_size=tokenizer.vocab_size))
