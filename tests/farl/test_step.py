"""One training step: the accumulated gradient is the gradient, and each figure is what it says."""

from __future__ import annotations

import copy
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from farl.config import TrainConfig
from farl.initialize import build_model, build_optimizer
from farl.model import MODELS, FaRL
from farl.step import TrainStep, clamp_logit_scale, pack_parts
from farl_engine.data import Batch
from farl_engine.distributed import World

N = 12
UNUSED_ALONE = {"visual.ln_post.weight", "visual.ln_post.bias", "visual.proj"}


class MeanTokens:
    """A stand-in tokenizer: the mean of a patch's pixels, in 16 levels."""

    vocab_size = 16
    token_image_size = None

    def __call__(self, images: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        patches = images.float().unfold(1, 8, 8).unfold(2, 8, 8).mean((3, 4, 5))
        tokens = (patches / 16).long().clamp(max=15).flatten(1)
        if positions is None:
            return tokens
        return tokens.gather(1, positions.long().clamp(min=0)).masked_fill(positions < 0, -1)


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    words = ["a face", "a smiling woman with glasses", "an old man", "a child in a red hat outdoors"]
    captions = [f"{words[i % 4]} number {i}" for i in range(N)]
    return Batch(
        step=0,
        ids=torch.arange(N) * 7,
        used_ids=torch.arange(N) * 7,
        views=torch.zeros(N, dtype=torch.int64),
        images=torch.randint(0, 256, (N, 32, 32, 3), dtype=torch.uint8, generator=generator),
        token_images=None,
        captions=captions,
        text=pack_parts(captions, 0),
    )


@pytest.fixture
def model() -> FaRL:
    torch.manual_seed(0)
    return FaRL(MODELS["farl-micro"]).double()


ALONE = World(rank=0, size=1, device=torch.device("cpu"), control=None)


def step_of(
    model: FaRL,
    world: World = ALONE,
    network: DistributedDataParallel | None = None,
    *,
    mim: bool = True,
    mim_weight: float = 0.7,
    bf16: bool = False,
    **options: Any,
) -> TrainStep:
    return TrainStep(
        network or model,
        world,
        MeanTokens() if mim else None,
        mim_weight=mim_weight,
        mask_ratio=6 / 16,
        seed=1,
        bf16=bf16,
        **options,
    )


def gradients(model: FaRL) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("micro_batch", [1, 5, 6, 11])
def test_accumulated_gradients_are_those_of_the_whole_batch(micro_batch: int, model: FaRL, batch: Batch) -> None:
    whole, parts = model, copy.deepcopy(model)
    figures = step_of(whole, contrastive_weight=1.3)(batch)
    batch.text = pack_parts(batch.captions, micro_batch)
    assert sum(len(part) for part in batch.text.parts) == N and len(batch.text.parts) == -(-N // micro_batch)
    accumulated = step_of(parts, contrastive_weight=1.3)(batch)
    for name in figures:
        assert torch.allclose(accumulated[name].double(), figures[name].double(), atol=1e-12), name
    wanted, got = gradients(whole), gradients(parts)
    assert wanted.keys() == got.keys() == dict(model.named_parameters()).keys()
    for name in wanted:
        assert (got[name] - wanted[name]).abs().max() <= 1e-10, name


def test_losses_and_gradients_are_those_of_the_definition(model: FaRL, batch: Batch) -> None:
    step = step_of(model, contrastive_weight=1.3)
    figures = step(batch)
    masks = step.sample_masks(batch)
    output = model(batch.images, batch.text.parts[0], mask=masks.mask, masked_positions=masks.positions)
    image = F.normalize(output.image_features, dim=1)
    text = F.normalize(output.text_features, dim=1)
    logits = output.logit_scale * image @ text.T
    labels = torch.arange(N)
    contrast = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    assert output.mim_hidden is not None
    head = model.visual.lm_head
    mim = F.cross_entropy(head(output.mim_hidden), masks.targets.flatten(), ignore_index=-1)
    assert torch.allclose(figures["loss_contrastive"], contrast, atol=1e-10)
    assert torch.allclose(figures["loss_mim"], mim, atol=1e-10)
    loss = 1.3 * contrast + 0.7 * mim
    assert torch.allclose(figures["loss"], loss, atol=1e-10)
    wanted = torch.autograd.grad(loss, list(model.parameters()))
    for (name, parameter), gradient in zip(model.named_parameters(), wanted, strict=True):
        # The number of masked patches is divided by in fp32.
        assert parameter.grad is not None and (parameter.grad - gradient).norm() <= 1e-7 * gradient.norm() + 1e-12, name
    accuracy = (logits.argmax(1) == labels).double().mean()
    assert torch.allclose(figures["accuracy_image_to_text"].double(), accuracy)


def test_masks_depend_on_sample_and_view_alone(model: FaRL, batch: Batch) -> None:
    step = step_of(model)
    masks = step.sample_masks(batch)
    shuffled = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    other = copy.copy(batch)
    other.ids, other.images = batch.ids[shuffled], batch.images[shuffled]
    assert torch.equal(step.sample_masks(other).mask, masks.mask[shuffled])
    later = copy.copy(batch)
    later.views = batch.views + 1
    assert not torch.equal(step.sample_masks(later).mask, masks.mask)
    assert torch.equal(masks.mask.sum(1), (masks.positions >= 0).sum(1))
    assert torch.equal(masks.targets >= 0, masks.positions >= 0)


def test_tokens_that_come_with_the_batch_are_the_targets(model: FaRL, batch: Batch) -> None:
    step = step_of(model)
    online = step.sample_masks(batch)
    kept = copy.copy(batch)
    kept.visual_tokens = MeanTokens()(batch.images).to(torch.int32)
    kept.images = torch.zeros_like(batch.images)
    masks = step.sample_masks(kept)
    assert torch.equal(masks.targets, online.targets) and masks.targets.dtype == torch.int64
    assert torch.equal(masks.share, online.share)
    # Two samples were bad when the tokens were made: the mean is over the others.
    kept.visual_tokens[[3, 7]] = -1
    masks = step.sample_masks(kept)
    wanted = online.targets.clone()
    wanted[[3, 7]] = -1
    assert torch.equal(masks.targets, wanted) and torch.equal(masks.mask, online.mask)
    assert float(masks.share) == pytest.approx(1 / int((wanted >= 0).sum()))


def test_contrast_alone_has_no_masked_branch(batch: Batch) -> None:
    from dataclasses import replace

    model = FaRL(replace(MODELS["farl-micro"], mim=None))
    figures = step_of(model, mim=False)(batch)
    assert figures["loss_mim"] == 0 and torch.equal(figures["loss"], figures["loss_contrastive"])
    assert "accuracy_mim" not in figures
    assert gradients(model).keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("micro_batch", [0, 5])
def test_the_masked_branch_alone_has_its_part_of_the_joint_gradient(
    micro_batch: int, model: FaRL, batch: Batch
) -> None:
    batch.text = pack_parts(batch.captions, micro_batch)
    both, contrast, alone = model, copy.deepcopy(model), copy.deepcopy(model)
    joint = step_of(both, contrastive_weight=1.3)(batch)
    step_of(contrast, mim_weight=0.0, contrastive_weight=1.3)(batch)
    alone.train_masked_branch_alone()
    called: list[str] = []
    alone.transformer.register_forward_pre_hook(lambda *_: called.append("text"))
    alone.visual.ln_post.register_forward_pre_hook(lambda *_: called.append("clean"))
    alone.token_embedding.register_forward_pre_hook(lambda *_: called.append("text"))
    figures = step_of(alone, contrastive_weight=0.0)(batch)
    assert called == []
    assert figures["loss_contrastive"] == 0 and "accuracy_image_to_text" not in figures
    for name in ("loss_mim", "accuracy_mim"):
        assert torch.allclose(figures[name].double(), joint[name].double(), atol=1e-12), name
    assert torch.allclose(figures["loss"], 0.7 * joint["loss_mim"], atol=1e-12)
    assert torch.allclose(joint["loss"], 1.3 * joint["loss_contrastive"] + 0.7 * joint["loss_mim"], atol=1e-12)
    whole, part, got = gradients(both), gradients(contrast), gradients(alone)
    for name, gradient in whole.items():
        wanted = gradient - part[name]
        if name in got:
            assert (got[name] - wanted).abs().max() <= 1e-10 and wanted.abs().max() > 0, name
        else:
            assert wanted.abs().max() <= 1e-10, name
    assert got.keys() == {name for name in whole if name.startswith("visual.") and name not in UNUSED_ALONE}


def test_updates_of_the_masked_branch_alone_leave_the_text_tower(batch: Batch) -> None:
    config = TrainConfig(run_dir="", data="", model="farl-micro", contrastive_weight=0.0, weight_decay=0.5)
    model = build_model(config, MeanTokens(), None)
    optimizer, step = build_optimizer(config, model, None), step_of(model, contrastive_weight=0.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = []
    for _ in range(4):
        losses.append(step(batch)["loss"].item())
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if name.startswith("visual.") and name not in UNUSED_ALONE}
    assert losses[-1] < losses[0]


def _half_a_batch(rank: int, port: int, options: dict[str, Any], model: FaRL, batch: Batch, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    rows = slice(6 * rank, 6 * rank + 6)
    half = copy.copy(batch)
    half.ids, half.views, half.images = batch.ids[rows], batch.views[rows], batch.images[rows]
    for micro_batch in MICRO_BATCHES[options.get("engine", "fused")]:
        half.text = pack_parts(batch.captions[rows], micro_batch)
        own = copy.deepcopy(model)
        world = World(rank=rank, size=2, device=torch.device("cpu"), control=None)
        step = step_of(own, world, DistributedDataParallel(own), **options)
        if "engine" in options:
            own.compile(backend="aot_eager")  # the same graphs, without minutes of a C++ compiler
        for _ in range(2):  # DDP looks for parameters that took no part at the start of the next pass
            own.zero_grad()
            figures = step(half)
        torch.save((figures, gradients(own)), folder / f"{micro_batch}-{rank}.pt")
    dist.destroy_process_group()


# Each graph takes seconds to trace.
MICRO_BATCHES = {"fused": (0, 4), "compile": (0,)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"contrastive_weight": 0.0}, {"engine": "compile"}], ids=["fused", "masked alone", "compile"]
)
def test_two_ranks_have_the_gradients_of_one(
    options: dict[str, Any], model: FaRL, batch: Batch, tmp_path: Path
) -> None:
    if "contrastive_weight" in options:
        model.train_masked_branch_alone()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    mp.spawn(_half_a_batch, args=(port, options, model, batch, tmp_path), nprocs=2)
    figures = step_of(model, **options | {"engine": "fused"})(batch)
    for micro_batch in MICRO_BATCHES[options.get("engine", "fused")]:
        ranks = [torch.load(tmp_path / f"{micro_batch}-{rank}.pt") for rank in range(2)]
        for figure, wanted in figures.items():
            assert torch.allclose(sum(shares[figure] for shares, _ in ranks), wanted, atol=1e-6), figure
        for _, got in ranks:
            assert got.keys() == gradients(model).keys()
            for parameter, wanted in gradients(model).items():
                assert (got[parameter] - wanted).abs().max() <= 1e-10, parameter


def test_bf16_gives_nearly_the_same_losses(batch: Batch) -> None:
    torch.manual_seed(0)
    model = FaRL(MODELS["farl-micro"])
    plain = step_of(model)(batch)
    model.zero_grad()
    low = step_of(model, bf16=True)(batch)
    assert torch.allclose(low["loss"].float(), plain["loss"].float(), rtol=0.02)
    assert not torch.equal(low["loss"], plain["loss"])
    assert all(gradient.dtype == torch.float32 for gradient in gradients(model).values())


def test_logit_scale_is_kept_between_one_and_a_hundred(model: FaRL) -> None:
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    assert float(clamp_logit_scale(model)["logit_scale"]) == pytest.approx(100.0)
    with torch.no_grad():
        model.logit_scale.fill_(-2.0)
    assert float(clamp_logit_scale(model)["logit_scale"]) == pytest.approx(1.0)
