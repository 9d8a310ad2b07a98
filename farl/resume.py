"""The state of a run as a checkpoint holds it, and whether a command may go on from one."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch

from farl.config import TrainConfig
from farl.model import FaRL
from farl.tokens import PatchCodebook, VisualTokenizer
from farl_engine.data import ShardIndex

# Settings that decide which samples come when.
FIXED = ("global_batch", "seed")


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
        "train_config": asdict(config),
        "data": {"fingerprint": index.fingerprint, "samples": len(index)},
        "versions": {
            "farl-engine": version("farl-engine"),
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
    }


def check_resumable(saved: dict[str, Any], config: TrainConfig, index: ShardIndex) -> None:
    """Refuse a checkpoint that the command would not continue but change.

    `--allow-mismatch` lets other data, another global batch or another seed pass, but not other weights.

    Raises:
        ValueError: one line that names each difference.
    """
    before, now = saved["train_config"], asdict(config)
    # What the weights are and predict; no option lets others pass.
    weights = {"model": (before["model"], now["model"]), "visual tokens": (_tokens(before), _tokens(now))}
    pairs = dict(weights)
    if not config.allow_mismatch:
        pairs |= {name.replace("_", " "): (before[name], now[name]) for name in FIXED}
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


def _tokens(settings: dict[str, Any]) -> str:
    """The kind of visual tokens; a file of them may move."""
    return settings["visual_tokens"].partition(":")[0] if settings["mim_weight"] else "none (--mim-weight 0)"
