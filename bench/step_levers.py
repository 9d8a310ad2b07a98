"""What each lever of the training step is worth: the step with the lever taken away, timed in turns with the whole one.

    python -m bench.step_levers

On a CPU, in seconds of CPU time on one thread, which other work on the machine disturbs less than the clock. The
predictions beside are by FLOPs alone (`farl.flops`): what a lever saves in memory traffic, they do not know.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from bench.interleaved import Ratio
from bench.step_training import CAPTION_TOKENS, SMALL, GivenTokens, fresh, synthetic
from farl.flops import eliminated_flops, training_flops
from farl.masking import mask_sizes
from farl.model import FaRL, PackedText
from farl.model.blocks import Block, Packing, Stream, TakeRows
from farl.model.mim import MaskedVisionTower
from farl.step import TextParts, TrainStep
from farl_engine.distributed import World

PAIRS, ROUNDS = 16, 5


def whole_block(self: Block, stream: Stream, take: TakeRows, packing: Packing | None = None) -> Stream:
    """In place of `Block.at_rows`: all rows, of which some are then taken."""
    return self(stream, causal=packing is not None, packing=packing).rows(take)


def two_passes(self: MaskedVisionTower, images: Tensor, mask: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """In place of `forward_masked`: clean and masked images one after the other."""
    return self(images), self.forward_masked_alone(images, mask, positions)


def steps() -> dict[str, tuple[Callable[[], object], float]]:
    """The step and its variants, and the FLOP of each relative to the step's."""
    batch, tokens = synthetic(SMALL, PAIRS)
    assert SMALL.mim is not None
    source = GivenTokens(tokens, SMALL.mim.vocab_size)
    masked, _ = mask_sizes(SMALL.vision.grid)
    needed = training_flops(SMALL, masked=masked, caption_tokens=CAPTION_TOKENS)
    more = eliminated_flops(SMALL, masked=masked, caption_tokens=CAPTION_TOKENS)
    rows = sum(flop for name, flop in more.items() if name.startswith("last"))

    def step(model: FaRL | None = None, *, contrastive_weight: float = 1.0, engine: str = "fused") -> TrainStep:
        return TrainStep(
            model or fresh(SMALL),
            World(rank=0, size=1, device=torch.device("cpu"), control=None),
            source,
            mim_weight=1.0,
            contrastive_weight=contrastive_weight,
            mask_ratio=75 / 196,
            seed=0,
            bf16=False,
            engine=engine,
        )

    length = SMALL.text.context_length
    words = torch.randint(1, 1000, (PAIRS * length,))
    padded = PackedText(words, torch.arange(0, PAIRS * length + 1, length, dtype=torch.int32), length)
    alone = fresh(SMALL)
    alone.train_masked_branch_alone()
    mim_alone = training_flops(SMALL, masked=masked, contrast=False)
    whole, plain, masked_alone = step(), step(engine="eager"), step(alone, contrastive_weight=0.0)

    def changed(patches: contextlib.AbstractContextManager[object]) -> None:
        with patches:
            whole(batch)

    def with_padding() -> None:
        text = batch.text
        try:
            batch.text = TextParts((padded,))
            whole(batch)
        finally:
            batch.text = text

    return {
        "the step": (lambda: whole(batch), 1.0),
        "captions padded to 77 tokens": (with_padding, 1 + more["captions without padding"] / needed),
        "last blocks in full": (
            lambda: changed(mock.patch.object(Block, "at_rows", whole_block)),
            1 + rows / needed,
        ),
        "clean and masked images apart": (
            lambda: changed(mock.patch.object(MaskedVisionTower, "forward_masked", two_passes)),
            1 + more["patches embedded once for both streams"] / needed,
        ),
        "reference ops (--engine eager)": (lambda: plain(batch), 1.0),
        "masked branch alone (--contrastive-weight 0)": (lambda: masked_alone(batch), mim_alone / needed),
    }


def main() -> None:
    torch.set_num_threads(1)
    variants = steps()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(ROUNDS + 1):
        for name, (run, _) in variants.items():
            begun = time.process_time()
            run()
            if turn:  # the first one warms up
                seconds[name].append(time.process_time() - begun)
    for name, (_, flops) in variants.items():
        ratio = Ratio.of(seconds[name], seconds["the step"])
        print(f"{name:46} {min(seconds[name]):.2f} s, {ratio} of the step, by FLOPs {flops:.2f}")


if __name__ == "__main__":
    main()
