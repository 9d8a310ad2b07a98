"""A run that takes its visual tokens from a cache: whether the cache is the right one, and how exact it is."""

from __future__ import annotations

import shlex
from dataclasses import fields, replace
from typing import Any

from farl.config import TrainConfig
from farl.initialize import named_sizes
from farl.tokens import TokenCache
from farl.tokens.cache import StoredEncoder
from farl.tokens.make import measure_agreement
from farl.tokens.manifest import arithmetic_of, describe_plan, differences
from farl_engine.data import CropPlan, ShardIndex, choose_decoder
from farl_engine.distributed import World, say

# Options that the command which makes a cache must be given as the training is.
_ALSO_OF_TOKENIZE = ("shard_cache", "model", "crop_scale", "face_boxes", "seed", "decoder")


def open_token_cache(config: TrainConfig) -> TokenCache | None:
    """The cache that --visual-tokens names, if it is finished and of the model's sizes; None without one.

    Raises:
        ValueError: one line that says what is wrong with it and the fix.
    """
    kind, _, folder = config.visual_tokens.partition(":")
    if kind != "cache" or not config.mim_weight:
        return None
    cache = TokenCache(folder)
    vision = named_sizes(config).vision
    _refuse_others(cache, config, {"image size": str(vision.image_size), "patches": str(vision.num_patches)})
    return cache


def check_token_cache(
    config: TrainConfig, cache: TokenCache, index: ShardIndex, plan: CropPlan, decoder: Any, world: World
) -> None:
    """Whether a cache holds the tokens that this run would compute; the log says so, or how many of them are the same.

    Args:
        plan, decoder: those of the run.

    Raises:
        ValueError: it was made of other data, or with other crops: one line that names what differs, and the fix.
    """
    vision, kept = named_sizes(config).vision, cache.manifest
    tokenizer = cache.tokenizer(world.device)
    ours = replace(
        kept,
        fingerprint=index.fingerprint,
        samples=len(index),
        seed=config.seed,
        augmentation=describe_plan(plan),
        image_size=vision.image_size,
        patches=vision.num_patches,
        **arithmetic_of(decoder, tokenizer, world.device),
    )
    _refuse_others(cache, config, ours.contents())
    differs = differences(kept.arithmetic() | kept.versions, ours.arithmetic() | ours.versions)
    facts, views = kept.tokenizer, f"{kept.views} view{'s' * (kept.views > 1)} a sample"
    source = f"visual tokens of {cache.folder}: {facts['kind']} {facts['hash'][:12]}, {views}"
    if not differs and kept.is_reproducible:
        say(world, f"{source}, the same to the bit as computed here")
        return
    if not world.is_main:
        return
    if isinstance(tokenizer, StoredEncoder) and not tokenizer.usable(world.device):
        say(world, f"{source}; how many are the same here ({differs}) is not known without {tokenizer.path}")
        return
    rate = measure_agreement(
        cache,
        index,
        tokenizer,
        decoder=choose_decoder(config.decoder, vision.image_size, tokenizer.token_image_size, world.device),
        plan=plan,
        device=world.device,
        threads=config.threads,
    )
    say(world, f"{source}; {rate:.2%} are the same as computed here ({differs or 'same decoder and device'})")


def _refuse_others(cache: TokenCache, config: TrainConfig, ours: dict[str, str]) -> None:
    """Raises ValueError where the contents of a cache are not `ours`."""
    differs = differences(cache.manifest.contents(), ours)
    if not differs:
        return
    facts = cache.manifest.tokenizer
    tokenizer = f"dalle:{facts['file']}"
    if facts["kind"] == "codebook":
        # One for patches of another size would not fit.
        tokenizer = "codebook" if "patches" in differs else f"codebook:{cache.folder / facts['file']}"
    words = ["--data", config.data, "--out", "NEW", "--tokenizer", tokenizer, "--views", str(cache.manifest.views)]
    for option in fields(config):
        if option.name in _ALSO_OF_TOKENIZE and getattr(config, option.name) != option.default:
            words += [f"--{option.name.replace('_', '-')}", str(getattr(config, option.name))]
    raise ValueError(
        f"--visual-tokens {config.visual_tokens} is of another run: {differs}. Use the old settings, or make a new "
        f"cache: python -m farl.data tokenize {shlex.join(words)}"
    )
