"""The engines of a training step: each computes the same losses, by the means that its name says."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch._dynamo.utils import counters

import farl.step
from farl.model import MODELS, FaRL
from farl.step import TrainStep
from farl.tokens import DalleEncoder
from farl_engine.data import Batch
from farl_engine.distributed import World
from farl_kernels import dispatch
from tests.support.steps import Brightness, coloured_batch

PAIRS = 8
WORDS = ["a face", "a smiling woman with glasses", "an old man", "a child in a red hat outdoors"]


def batch(step: int) -> Batch:
    """The captions differ in total length."""
    return coloured_batch(
        step, PAIRS, lambda kinds: [f"{WORDS[kind]} number {number}" for number, kind in enumerate(kinds)]
    )


def training(engine: str) -> tuple[FaRL, TrainStep]:
    torch.manual_seed(0)
    model = FaRL(MODELS["farl-micro"])
    world = World(rank=0, size=1, device=torch.device("cpu"), control=None)
    options = {"mim_weight": 1.0, "mask_ratio": 6 / 16, "seed": 1, "bf16": False}
    return model, TrainStep(model, world, Brightness(), engine=engine, **options)


@cache
def losses(engine: str, steps: int) -> torch.Tensor:
    """[steps, 2]: contrastive and masked-token loss of a run."""
    model, step = training(engine)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6, fused=True)
    curve = []
    for number in range(steps):
        figures = step(batch(number))
        optimizer.step()
        optimizer.zero_grad()
        curve.append([figures["loss_contrastive"].item(), figures["loss_mim"].item()])
    return torch.tensor(curve)


@pytest.mark.parametrize("steps", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_eager_learns_the_same(steps: int) -> None:
    torch.testing.assert_close(losses("eager", steps), losses("fused", steps), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compile_learns_the_same_with_one_graph_for_all_lengths() -> None:
    torch._dynamo.reset()
    counters.clear()
    curve = losses("compile", 100)
    torch.testing.assert_close(curve, losses("fused", 100), rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert (curve[-5:].mean(0) < curve[:5].mean(0) - 0.3).all()


def test_eager_takes_the_reference_of_each_op_and_fused_the_fastest() -> None:
    forced = []
    for engine in ("fused", "eager"):
        model, step = training(engine)
        model.register_forward_pre_hook(lambda *_: forced.append(dispatch._forced))
        step(batch(0))
    assert forced == [None, "reference"] and dispatch._forced is None


def test_text_is_sent_before_the_image_tower_runs_and_its_gradient_comes_after(monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    gather = farl.step.gather_features
    monkeypatch.setattr(farl.step, "gather_features", lambda text: (events.append("sent"), gather(text))[1])
    model, step = training("fused")
    model.visual.transformer.block(0).register_forward_pre_hook(lambda *_: events.append("image"))
    model.visual.conv1.weight.register_hook(lambda grad: events.append("image gradient"))
    model.text_projection.register_hook(lambda grad: events.append("text gradient"))
    step(batch(0))
    assert events == ["sent", "image", "image gradient", "text gradient"]


@pytest.mark.parametrize("engine", ["fused", "compile"])
def test_the_compiled_engine_compiles_the_encoder_too(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *args, **kwargs: compiled.append(self))
    model = FaRL(MODELS["farl-micro"])
    encoder = DalleEncoder(16, hidden=8, token_image_size=32)
    world = World(rank=0, size=1, device=torch.device("cpu"), control=None)
    TrainStep(model, world, encoder, mim_weight=1.0, mask_ratio=0.4, seed=1, bf16=False, engine=engine)
    # The model, and the encoder's input and four groups.
    assert len(compiled) == (6 if engine == "compile" else 0)
