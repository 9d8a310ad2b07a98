"""A model shared out over gloo ranks does what the plain one does, and no rank has all of it."""

from __future__ import annotations

import contextlib
import io
import math
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from farl_engine import distributed, loop
from farl_engine.checkpoint import CheckpointError, CheckpointStore
from farl_engine.distributed import World, gather_objects
from farl_engine.loop import Run, Schedule
from farl_engine.metrics import Progress
from farl_engine.optim import FiniteGuard, LearningRate, parameter_groups
from farl_engine.saver import Saver
from farl_engine.sharding import (
    average_gradients,
    clip_grad_norm,
    gathered,
    is_sharded,
    load_optimizer,
    shard,
    unsharded,
)

ROWS = 12
CHECKS: dict[str, Callable[[World, Path], None]] = {}


def check(fn: Callable[[World, Path], None]) -> Callable[[World, Path], None]:
    CHECKS[fn.__name__] = fn
    return fn


class Block(nn.Module):
    """Hands its bias on for the next one to add, as the blocks of the model do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5))
        self.bias = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = x if bias is None else x + bias
        return torch.tanh(x @ self.weight), self.bias


class Toy(nn.Module):
    """Rows that 2 and 3 ranks do not divide, fewer rows than 3 ranks, a scalar, and a frozen matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(3, 5)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.leave = nn.Parameter(torch.randn(2, 5))
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.frozen = nn.Parameter(torch.randn(4, 2), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x, bias = self.enter(x), None
        for block in self.blocks:
            x, bias = block(x, bias)
        assert bias is not None
        return (x + bias) @ self.leave.t() * self.scale

    def encode(self, x: Tensor) -> Tensor:
        return self.blocks[0](self.enter(x))[0] @ self.leave.t()


def plain() -> Toy:
    torch.manual_seed(0)
    return Toy().double()


def shared_out(world: World) -> Toy:
    model = plain()
    shard(model, list(model.blocks), keep=lambda _, p: p.ndim < 2, world=world)
    return model


def loss_of(model: Toy, step: int, world: World | None) -> Tensor:
    """The mean over a batch: a rank's part of it, or all."""
    g = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, 3, generator=g, dtype=torch.float64)
    return model(x if world is None else x.chunk(world.size)[world.rank]).square().mean()


def train(model: Toy, world: World | None, steps: range, optimizer: torch.optim.Optimizer, clip: float = 0.5) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    for step in steps:
        loss_of(model, step, world).backward()
        if world is not None:
            average_gradients(parameters)
        clip_grad_norm(parameters, clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def adamw(model: Toy) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameter_groups(model, 0.1), lr=0.01, fused=True)


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def assert_same(one: Any, other: Any, atol: float = 0.0) -> None:
    if isinstance(one, Tensor):
        torch.testing.assert_close(one, other, rtol=0.0, atol=atol)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key], atol)
    elif isinstance(one, list | tuple):
        for left, right in zip(one, other, strict=True):
            assert_same(left, right, atol)
    else:
        assert one == other


@check
def gradients_and_their_norm_are_those_of_the_whole_batch(world: World, _: Path) -> None:
    one, parts = plain(), shared_out(world)
    assert is_sharded(parts) and not is_sharded(one)
    loss_of(one, 0, None).backward()
    loss_of(parts, 0, world).backward()
    average_gradients(parts.parameters())
    for (name, want), got in zip(one.named_parameters(), parts.parameters(), strict=True):
        assert isinstance(got, DTensor) == (want.ndim == 2), name
        assert (want.grad is None) == (got.grad is None) == (name == "frozen")
        if want.grad is not None:
            assert got.grad is not None
            torch.testing.assert_close(whole(got.grad), want.grad, rtol=0.0, atol=1e-10)
    want_norm, norm = (clip_grad_norm(list(model.parameters()), 0.01) for model in (one, parts))
    assert type(norm) is Tensor and math.isclose(norm, want_norm, rel_tol=1e-12)
    assert len(set(gather_objects(world, norm.item()))) == 1
    for want, got in zip(one.parameters(), parts.parameters(), strict=True):
        if want.grad is not None and got.grad is not None:
            torch.testing.assert_close(whole(got.grad), want.grad, rtol=0.0, atol=1e-12)


@check
def each_rank_has_its_rows_of_matrices(world: World, _: Path) -> None:
    model = shared_out(world)
    local = {name: p.to_local() for name, p in model.named_parameters() if isinstance(p, DTensor)}
    assert local.keys() == {"enter.weight", "leave", "frozen", *(f"blocks.{n}.weight" for n in range(3))}
    rows = [sum(given) for given in zip(*gather_objects(world, [len(x) for x in local.values()]), strict=True)]
    assert rows == [len(p) for p in model.parameters() if isinstance(p, DTensor)]


@check
def a_checkpoint_is_that_of_a_plain_model_and_goes_on_to_the_bit(world: World, folder: Path) -> None:
    one, parts = plain(), shared_out(world)
    optimizers = adamw(one), adamw(parts)
    train(one, None, range(3), optimizers[0])
    train(parts, world, range(3), optimizers[1])
    state = gathered({"model": parts.state_dict(), "optimizer": optimizers[1].state_dict(), "step": 3})
    store = CheckpointStore(folder)
    if world.is_main:
        assert_same(state, {"model": one.state_dict(), "optimizer": optimizers[0].state_dict(), "step": 3}, atol=1e-9)
        store.save(3, state)
    else:
        assert state["model"]["leave"] is None and state["model"]["scale"] is None and state["step"] == 3
    dist.barrier()
    saved = store.load()
    again = plain()
    again.load_state_dict(saved["model"])
    shard(again, list(again.blocks), keep=lambda _, p: p.ndim < 2, world=world)
    resumed = adamw(again)
    load_optimizer(resumed, saved["optimizer"])
    train(parts, world, range(3, 6), optimizers[1])
    train(again, world, range(3, 6), resumed)
    assert_same(gathered(again.state_dict()), gathered(parts.state_dict()))
    assert_same(gathered(resumed.state_dict()), gathered(optimizers[1].state_dict()))


@check
def a_tripped_guard_leaves_everything_as_it_is(world: World, _: Path) -> None:
    model = shared_out(world)
    optimizer, guard = adamw(model), FiniteGuard(world.device)
    guard.attach(optimizer)
    rate = LearningRate(optimizer, world.device)
    rate.set(0.01)
    train(model, world, range(2), optimizer)
    before = gathered({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = loss_of(model, 2, world)
    # One rank's own gradient alone.
    (loss * (math.nan if world.rank == world.size - 1 else 1.0)).backward()
    average_gradients(parameters)
    guard.check(loss, (clip_grad_norm(parameters, 0.5),))
    optimizer.step()
    assert guard.tripped.item() == 1.0
    assert_same(gathered({"model": model.state_dict(), "optimizer": optimizer.state_dict()}), before)


@check
def ranks_may_use_the_whole_model_unequally_between_steps(world: World, _: Path) -> None:
    one, parts = plain(), shared_out(world)
    optimizers = adamw(one), adamw(parts)
    for step in range(3):
        train(one, None, range(step, step + 1), optimizers[0])
        train(parts, world, range(step, step + 1), optimizers[1])
        with unsharded(parts), torch.no_grad():
            x = torch.ones(1, 3, dtype=torch.float64)
            for _time in range(world.rank):
                torch.testing.assert_close(parts.encode(x), one.encode(x), rtol=0.0, atol=1e-9)
        assert all(isinstance(p, DTensor) for p in parts.parameters() if p.ndim == 2)


@check
def a_parameter_that_a_block_hands_on_gathers_no_hooks(world: World, _: Path) -> None:
    model = shared_out(world)
    train(model, world, range(3), adamw(model))
    assert not any(block.bias._backward_hooks for block in model.blocks)


@check
def values_that_stay_whole_are_rank_0s(world: World, _: Path) -> None:
    model = plain()
    with torch.no_grad():
        model.scale.add_(world.rank)
    shard(model, list(model.blocks), keep=lambda _, p: p.ndim < 2, world=world)
    assert model.scale.item() == 0.5


class Steps:
    """In place of a loader: step k gives k."""

    bad_samples: ClassVar[dict[str, int]] = {}
    error = None

    def __iter__(self) -> Iterator[int]:
        return iter(range(100))

    def check_bad(self) -> None:
        pass

    def stage_times(self) -> dict[str, float]:
        seconds = {"read": 0.0, "decode": 0.0, "text": 0.0, "device_decode": 0.0, "wait_for_batch": 0.0}
        return seconds | {"threads": 2, "queue_depth": 3.0, "mean_queue_depth": 2.5}


def run_of(model: Toy, world: World, folder: Path, *, nan_at: int = -1, steps: int = 8, **changes: Any) -> Run:
    optimizer = adamw(model)
    parameters = list(model.parameters())

    def forward_backward(step: int) -> dict[str, Tensor]:
        loss = loss_of(model, step, world) * (math.nan if step == nan_at and world.rank == 1 else 1.0)
        loss.backward()
        average_gradients(parameters)
        return {"loss": loss.detach() / world.size}

    settings: dict[str, Any] = {"log_every": 1, "eval_every": 0, "save_every": 0, "save_minutes": 0.0, "clip_norm": 0.5}
    return Run(
        world=world,
        model=model,
        optimizer=optimizer,
        loader=Steps(),  # type: ignore[arg-type]
        forward_backward=forward_backward,  # type: ignore[arg-type]
        after_update=dict,
        snapshot=lambda step: {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()},
        evaluate=None,
        store=CheckpointStore(folder / "checkpoints", keep_last=0),
        log=None,
        progress=Progress(start=0, total=steps, enabled=False),
        schedule=Schedule(steps=steps, stop_at=steps, learning_rate=lambda _: 0.01, **(settings | changes)),
        global_batch=ROWS,
        flops_per_sample=1.0,
        start_step=0,
    )


@check
def all_save_together_at_steps_and_when_rank_0s_clock_asks(world: World, folder: Path) -> None:
    # Step 8 is both: saved once, which rank 0 alone knows.
    run = run_of(shared_out(world), world, folder, save_every=4)
    assert loop.train(run) == (8, None)
    dist.barrier()
    assert run.store.steps() == [4, 8]
    # A clock that always asks: at once before the first step, then all agree a step later and save in the next.
    run = run_of(shared_out(world), world, folder / "clock", save_minutes=1e-9)
    loop.train(run)
    dist.barrier()
    assert run.store.steps() == [1, 3, 5, 7, 8]


@check
def the_last_good_state_is_saved_before_a_loss_that_is_not_finite(world: World, folder: Path) -> None:
    run = run_of(shared_out(world), world, folder, nan_at=4, log_every=3)
    with pytest.raises(loop.NonFiniteError, match="the loss of rank 1 was not finite in step 5"):
        loop.train(run)
    stopped_before = run_of(shared_out(world), world, folder / "before", steps=4)
    loop.train(stopped_before)
    dist.barrier()
    assert_same(run.store.load(4), stopped_before.store.load(4))


@check
def a_checkpoint_that_cannot_be_written_ends_all_ranks(world: World, folder: Path) -> None:
    run = run_of(shared_out(world), world, folder, save_every=2)
    dist.barrier()
    (folder / "checkpoints").touch()
    with pytest.raises(CheckpointError, match="the checkpoint of step"):
        loop.train(run)


@check
def a_rank_that_is_left_alone_says_that_it_cannot_save(world: World, folder: Path) -> None:
    run = run_of(shared_out(world), world, folder)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        Saver(run, FiniteGuard(world.device), []).save_alone(5)
    assert "the state after step 5 is not saved" in said.getvalue() and "there is no checkpoint" in said.getvalue()
    assert run.store.steps() == []


def _ranks(rank: int, port: int, size: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    world = distributed.start("cpu", timeout_seconds=30)
    for name, run in CHECKS.items():
        (folder / name).mkdir(exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(world, folder / name)
    distributed.finish(world)


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_shared_out_model(size: int, tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    mp.spawn(_ranks, (port, size, tmp_path), nprocs=size)


def test_plain_parameters_are_clipped_as_by_torch() -> None:
    one, other = plain(), plain()
    for model in (one, other):
        loss_of(model, 0, None).backward()
    want = nn.utils.clip_grad_norm_(other.parameters(), 0.1, foreach=True)
    assert torch.equal(clip_grad_norm(list(one.parameters()), 0.1), want)
    clipped = [[p.grad for p in model.parameters() if p.grad is not None] for model in (one, other)]
    assert_same(clipped[0], clipped[1])
    before = [p.grad.clone() for p in one.parameters() if p.grad is not None]
    clip_grad_norm(list(one.parameters()), 0.0)
    assert_same([p.grad for p in one.parameters() if p.grad is not None], before)
