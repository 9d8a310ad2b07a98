"""The state of a run as a checkpoint holds it, and whether a command may go on from one."""

from __future__ import annotations

import platform
from dataclasses import asdict
from functools import lru_cache
from importlib.metadata import version
from typing import Any

import torch

from farl.config import TrainConfig
from farl.model import FaRL
from farl.shards import describe_mix
from farl.tokens import DalleEncoder, PatchCodebook, TokenCache, VisualTokenizer
from farl.tokens.cache import StoredEncoder
from farl.tokens.manifest import state_hash, tokenizer_hash
from farl_engine.data import ShardIndex

# Settings that decide which samples come when.
FIXED = ("global_batch", "seed")
_NO_TOKENS = "none (--mim-weight 0)"


def snapshot(
    step: int,
    config: TrainConfig,
    model: FaRL,
    optimizer: torch.optim.Optimizer,
    tokenizer: VisualTokenizer | None,
    index: ShardIndex,
) -> dict[str, Any]:
    """Everything that the run needs to go on after `step` updates, as nested dicts of tensors and plain values.

    Samples, crops and masks are functions of (seed, step), so there is no state of the loader or of a random generator.
    """
    return {
        "step": step,
        "samples": step * config.global_batch,
        "model": model.state_dict(),
        "model_config": model.config.to_dict(),
        "optimizer": optimizer.state_dict(),
        "visual_tokens": tokenizer.state_dict() if isinstance(tokenizer, PatchCodebook) else None,
        "visual_tokens_kind": _kind(tokenizer),
        "visual_tokens_hash": _encoder_hash(tokenizer),
        "train_config": asdict(config),
        "data": {"fingerprint": index.fingerprint, "samples": len(index)},
        "versions": {
            "farl-engine": version("farl-engine"),
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
    }


def check_resumable(
    saved: dict[str, Any], config: TrainConfig, index: ShardIndex, cache: TokenCache | None = None
) -> None:
    """Refuse a checkpoint that the command would not continue but change.

    Tokens may come from a cache before and be computed now, or the other way round, if they are the same tokens.
    `--allow-mismatch` lets other data, another global batch or another seed pass, but not other weights.

    Raises:
        ValueError: one line that names each difference.
    """
    before, now = saved["train_config"], asdict(config)
    # What the weights are and predict; no option lets others pass.
    weights = {
        "model": (before["model"], now["model"]),
        "visual tokens": (_tokens_before(saved, cache), _tokens_now(config, cache)),
        "contrastive loss": (_contrast(before), _contrast(now)),
    }
    pairs = dict(weights)
    if not config.allow_mismatch:
        pairs |= {name.replace("_", " "): (before[name], now[name]) for name in FIXED}
        pairs["mix of sources"] = (describe_mix(before["data"]), describe_mix(now["data"]))
        pairs["data fingerprint"] = (saved["data"]["fingerprint"][:12], index.fingerprint[:12])
    differences = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if differences:
        what = "; ".join(f"{name} was {old}, is {new}" for name, (old, new) in differences.items())
        advice = "" if differences.keys() & weights.keys() else ", or --allow-mismatch"
        raise ValueError(
            f"the checkpoint in {config.run_dir} belongs to another run: {what}. "
            f"Use another --run-dir, or the old settings{advice}"
        )
    if saved["step"] > config.steps:
        raise ValueError(
            f"the checkpoint in {config.run_dir} is after step {saved['step']}, past --steps {config.steps}: "
            "raise it, or use another --run-dir"
        )


def check_same_encoder(saved: dict[str, Any], config: TrainConfig, tokenizer: VisualTokenizer | None) -> None:
    """Refuse an encoder with other weights than the run was begun with; its file may move, and be read by a cache.

    Raises:
        ValueError: one line that names both.
    """
    before, now = saved.get("visual_tokens_hash"), _encoder_hash(tokenizer)
    if before and now and before != now:
        raise ValueError(
            f"the checkpoint in {config.run_dir} belongs to another run: visual tokens was dalle {before[:12]}, "
            f"is dalle {now[:12]}. Use another --run-dir, or the old --visual-tokens"
        )


@lru_cache(maxsize=1)
def _encoder_hash(tokenizer: VisualTokenizer | None) -> str | None:
    """Of the weights of a dVAE encoder, which a checkpoint does not hold; they never change, and hashing takes long."""
    if isinstance(tokenizer, StoredEncoder):
        return tokenizer.weights_hash
    return tokenizer_hash(tokenizer) if isinstance(tokenizer, DalleEncoder) else None


def _kind(tokenizer: VisualTokenizer | None) -> str | None:
    if tokenizer is None:
        return None
    return "codebook" if isinstance(tokenizer, PatchCodebook) else "dalle"


def _contrast(settings: dict[str, Any]) -> str:
    # Runs from before the option all had the loss.
    return "on" if settings.get("contrastive_weight", 1.0) else "off (--contrastive-weight 0)"


def _tokens_before(saved: dict[str, Any], cache: TokenCache | None) -> str:
    """The kind of visual tokens; a file of them may move. Beside a cache's codebook, which one it was."""
    settings = saved["train_config"]
    if not settings["mim_weight"]:
        return _NO_TOKENS
    kind = saved.get("visual_tokens_kind") or settings["visual_tokens"].partition(":")[0]
    if cache is not None and saved.get("visual_tokens") is not None:
        return f"{kind} {state_hash(saved['visual_tokens'])[:12]}"
    return kind


def _tokens_now(config: TrainConfig, cache: TokenCache | None) -> str:
    if not config.mim_weight:
        return _NO_TOKENS
    if cache is None:
        return config.visual_tokens.partition(":")[0]
    facts = cache.manifest.tokenizer
    return f"codebook {facts['hash'][:12]}" if facts["kind"] == "codebook" else facts["kind"]
