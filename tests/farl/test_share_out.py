"""The model shared out over gloo ranks has the gradients of one process, in each way that a step is computed."""

from __future__ import annotations

import os
import socket
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.tensor import DTensor

from farl.initialize import share_out
from farl.model import MODELS, FaRL, MimConfig, ModelConfig
from farl.pretrain import averaging
from farl.step import TrainStep, pack_parts
from farl_engine import distributed
from farl_engine.data import Batch
from farl_engine.distributed import World

PAIRS = 12
MICRO = MODELS["farl-micro"]
# Deep enough that each stack has blocks that are shared out by themselves; 14 tokens are no multiple of 3 or 4.
DEEP = replace(
    MICRO,
    vision=replace(MICRO.vision, layers=3),
    text=replace(MICRO.text, layers=3),
    mim=MimConfig(layers=2, vocab_size=14),
)
SETTINGS: dict[str, dict[str, Any]] = {
    "all at once": {},
    "micro-batches": {"parts": 2},
    "computed again": {"recompute": True},
    "micro-batches computed again": {"parts": 2, "recompute": True},
    "plain ops": {"engine": "eager"},
    "contrast alone": {"mim": False},
    "masked branch alone": {"contrastive_weight": 0.0},
}
ALONE = World(rank=0, size=1, device=torch.device("cpu"), control=None)


class Tokens:
    """Stands for a visual tokenizer: the batch brings its tokens."""

    vocab_size = 14
    token_image_size = None

    def __call__(self, images: Tensor, positions: Tensor | None = None) -> Tensor:
        raise AssertionError


def batch(rows: slice, parts: int) -> Batch:
    g = torch.Generator().manual_seed(0)
    captions = [f"a face of {'a very old ' * (i % 3)}person number {i}" for i in range(PAIRS)][rows]
    ids = torch.arange(PAIRS)[rows]
    return Batch(
        step=0,
        ids=ids,
        used_ids=ids,
        views=torch.zeros_like(ids),
        images=torch.randint(0, 256, (PAIRS, 32, 32, 3), dtype=torch.uint8, generator=g)[rows],
        token_images=None,
        captions=captions,
        text=pack_parts(captions, -(-len(captions) // parts)),
        visual_tokens=torch.randint(0, 14, (PAIRS, 16), dtype=torch.int32, generator=g)[rows],
    )


def built(config: ModelConfig, *, recompute: bool = False, mim: bool = True, contrastive_weight: float = 1.0) -> FaRL:
    torch.manual_seed(0)
    model = FaRL(config if mim else replace(config, mim=None)).double()
    model.checkpoint_activations = recompute
    if not contrastive_weight:
        model.train_masked_branch_alone()
    return model


def step_of(model: FaRL, world: World, *, mim: bool = True, **options: Any) -> TrainStep:
    tokens = Tokens() if mim else None
    return TrainStep(model, world, tokens, mim_weight=0.7, mask_ratio=6 / 16, seed=1, bf16=False, **options)


def gradients(world: World, parts: int = 1, recompute: bool = False, **options: Any) -> dict[str, Tensor | None]:
    """Of two steps' sum, so that the second one runs on what the first one left behind."""
    kinds = {name: value for name, value in options.items() if name != "engine"}
    model = built(DEEP, recompute=recompute, **kinds)
    if world.size > 1:
        share_out(model, world)
    step = step_of(model, world, **options)
    share = PAIRS // world.size
    rows = slice(world.rank * share, (world.rank + 1) * share)
    found: dict[str, Tensor | None] = {}
    for _ in range(2):
        run = averaging(step, model) if world.size > 1 else step
        run(batch(rows, parts))
        for name, parameter in model.named_parameters():
            grad = parameter.grad
            whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
            before = found.get(name)
            found[name] = whole if before is None or whole is None else before + whole
            parameter.grad = None
            assert isinstance(parameter, DTensor) == (world.size > 1 and is_shared(name, parameter)), name
    return found


def is_shared(name: str, parameter: Tensor) -> bool:
    return parameter.ndim > 1 and not name.endswith("positional_embedding")


def _ranks(rank: int, port: int, size: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    world = distributed.start("cpu", timeout_seconds=60)
    for setting, options in SETTINGS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = gradients(world, **options)
        want = gradients(ALONE, **options | {"parts": 1, "recompute": False})
        assert got.keys() == want.keys()
        for name, gradient in want.items():
            other = got[name]
            assert (gradient is None) == (other is None), f"{setting}: {name}"
            if gradient is not None and other is not None:
                assert (other - gradient).abs().max() <= 1e-10, f"{setting}: {name}"
    distributed.finish(world)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_gradients_are_those_of_one_process(size: int) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    mp.spawn(_ranks, (port, size), nprocs=size)
