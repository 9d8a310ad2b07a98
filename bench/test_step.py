"""A whole training step of FaRL: forward, backward, clipping and AdamW, on a synthetic batch already on the device.

Visual tokens are given, as from a token cache, or made in the step by DALL-E's encoder with random weights. The peer is
open_clip's model and loss with BEiT-style masked image modelling, eager and compiled.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.step_contest import Suite, each_contender, run
from bench.step_training import CAPTION_TOKENS, COMPILED_ENCODER, CONTENDERS, COUNTED, PEER, SMALL, Case, truth
from bench.timing import CUDA
from farl.memory import fits, predict_memory
from farl.model import MODELS

SUITE = Suite("whole step", CONTENDERS, truth, "pairs_per_second", COUNTED, parted=True)
# The most important model first: a GPU may be lent for minutes. Each batch is this one, or halves of it until it fits,
# and the half of that.
BATCHES = {"farl-b16": 1024, "farl-l16": 384, "farl-s16": 2048}
BESIDE = ["farl", "farl, one CUDA graph", PEER]


def cases(capacity: float) -> dict[Case, list[str]]:
    """Cases with their contenders on a GPU of `capacity` bytes, batches as `farl.memory` predicts that they fit."""
    found: dict[Case, list[str]] = {}
    for model, pairs in BATCHES.items():
        case = Case(model, MODELS[model], pairs, "bfloat16")
        while case.pairs > 2 and not fits(
            predict_memory(case.config, pairs=case.pairs, caption_tokens=CAPTION_TOKENS), capacity
        ):
            case = replace(case, pairs=case.pairs // 2)
        if found:
            # Compilation takes minutes, and its gain does not depend on the batch much.
            found[case] = [*BESIDE, f"{PEER}, torch.compile"]
        else:
            found[case] = [name for name in CONTENDERS if name != COMPILED_ENCODER]
            found[replace(case, online=True)] = ["farl", COMPILED_ENCODER, "farl, one CUDA graph"]
        found[replace(case, pairs=case.pairs // 2)] = BESIDE
    return found


def cases_on_a_cpu() -> dict[Case, list[str]]:
    """The step of `bench.step_training.SMALL` in both precisions, and one of another size."""
    small, names = "small FaRL (192 x 12, 112 px)", ["farl", PEER, f"{PEER}, torch.compile"]
    return {
        # Each compilation takes about a minute: ours, which is no peer, is told once.
        Case(small, SMALL, 64, "float32"): [*names, "farl, torch.compile"],
        Case(small, SMALL, 64, "bfloat16"): names,
        Case("farl-tiny", MODELS["farl-tiny"], 64, "float32"): names,
    }


CASES = cases(torch.cuda.get_device_properties(0).total_memory) if CUDA else cases_on_a_cpu()


@each_contender(CASES)
def test_step(benchmark: Any, request: pytest.FixtureRequest, case: Case, name: str) -> None:
    run(SUITE, benchmark, request, case, name)
