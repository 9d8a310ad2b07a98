from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from farl_engine.optim import FiniteGuard, LearningRate, parameter_groups, warmup_cosine


def test_matrices_decay_and_vectors_do_not() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Embedding(5, 4))
    model[0].weight.requires_grad_(True)
    groups = parameter_groups(model, 0.1, no_decay=lambda name, _: name.startswith("2."))
    assert groups[0]["weight_decay"] == 0.1 and groups[1]["weight_decay"] == 0.0
    assert [p is model[0].weight for p in groups[0]["params"]] == [True]  # type: ignore[union-attr]
    assert len(groups[1]["params"]) == 4  # type: ignore[arg-type]


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Linear(3, 4)
    model.weight.requires_grad_(False)
    groups = parameter_groups(model, 0.1)
    assert [len(group["params"]) for group in groups] == [0, 1]  # type: ignore[arg-type]


def test_schedule_rises_to_the_peak_and_falls_to_the_end() -> None:
    def rate(step: int) -> float:
        return warmup_cosine(step, steps=100, warmup=10, peak=1.0, start=0.0, final=0.1)

    assert rate(0) == pytest.approx(0.1)
    assert rate(9) == pytest.approx(1.0) and rate(10) == pytest.approx(1.0)
    assert rate(55) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 2)))
    assert rate(100) == pytest.approx(0.1) and rate(1000) == pytest.approx(0.1)
    values = [rate(step) for step in range(100)]
    assert values[:10] == sorted(values[:10]) and values[10:] == sorted(values[10:], reverse=True)


def test_schedule_without_warmup_starts_at_the_peak() -> None:
    assert warmup_cosine(0, steps=10, warmup=0, peak=1.0, start=0.0, final=0.0) == 1.0


def updated(gradient: float, guard_steps: list[float]) -> tuple[torch.Tensor, FiniteGuard, torch.optim.Optimizer]:
    weight = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0, fused=True)
    guard = FiniteGuard(torch.device("cpu"))
    guard.attach(optimizer)
    for loss in guard_steps:
        weight.grad = torch.full((4,), gradient)
        value = torch.tensor(loss)
        guard.check(value, (value, torch.tensor(1.0)))
        optimizer.step()
    return weight.detach(), guard, optimizer


def test_guard_lets_finite_updates_through() -> None:
    weight, guard, _ = updated(1.0, [2.0, 1.0])
    assert guard.read(guard.state().tolist()) is None
    assert torch.allclose(weight, torch.full((4,), 0.8), atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_guard_stops_that_update_and_all_later_ones(bad: float) -> None:
    weight, guard, optimizer = updated(1.0, [2.0, bad, 1.0, 1.0])
    assert guard.read(guard.state().tolist()) == (1, True)
    assert torch.allclose(weight, torch.full((4,), 0.9), atol=1e-5)
    (state,) = optimizer.state.values()
    assert state["step"] == 1
    assert torch.isfinite(state["exp_avg"]).all()


def test_guard_tells_another_ranks_loss_from_its_own() -> None:
    guard = FiniteGuard(torch.device("cpu"), 5)
    guard.check(torch.tensor(1.0), (torch.tensor(math.nan), torch.tensor(1.0)))
    assert guard.read(guard.state().tolist()) == (5, False)


def test_guard_refuses_an_optimizer_that_would_not_heed_it() -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))], fused=False)
    with pytest.raises(ValueError, match="fused=True"):
        FiniteGuard(torch.device("cpu")).attach(optimizer)


def test_learning_rate_is_that_of_all_groups_and_read_where_the_update_is_made() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.0), lr=1.0, fused=True)
    rate = LearningRate(optimizer, torch.device("cpu"))
    assert [group["lr"].item() for group in optimizer.param_groups] == [1.0, 1.0]
    for value in (0.25, 0.5):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        rate.set(value)
        optimizer.step()
        for old, new in zip(before, model.parameters(), strict=True):
            torch.testing.assert_close(old - new, torch.full_like(old, value))


def test_a_saved_optimizer_holds_plain_numbers_and_loads_anywhere(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizers = [torch.optim.AdamW(parameter_groups(model, 0.1), lr=1.0, fused=True) for _ in range(2)]
    LearningRate(optimizers[0], torch.device("cpu")).set(0.1)
    plain = optimizers[1].state_dict()
    torch.save(optimizers[0].state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    assert [group["lr"] for group in saved["param_groups"]] == [0.1, 0.1]
    assert [group.keys() for group in saved["param_groups"]] == [group.keys() for group in plain["param_groups"]]
    optimizers[1].load_state_dict(saved)
    assert [group["lr"] for group in optimizers[1].param_groups] == [0.1, 0.1]
