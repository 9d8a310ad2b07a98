"""AdamW's parameter groups, the learning-rate schedule, and the guard against non-finite updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def parameter_groups(
    model: nn.Module, weight_decay: float, *, no_decay: Callable[[str, Tensor], bool] | None = None
) -> list[dict[str, object]]:
    """Two AdamW groups: matrices decay; vectors, scalars and what `no_decay(name, parameter)` names do not."""
    decayed: list[Tensor] = []
    kept: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        spared = parameter.ndim < 2 or (no_decay is not None and no_decay(name, parameter))
        (kept if spared else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def warmup_cosine(step: int, *, steps: int, warmup: int, peak: float, start: float, final: float) -> float:
    """Learning rate of the update that follows `step` completed ones.

    Linear from `start` to `peak` over `warmup` steps, then a half cosine from `peak` down to `final` at `steps`.
    """
    if step < warmup:
        return start + (peak - start) * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return final + 0.5 * (peak - final) * (1.0 + math.cos(math.pi * progress))


class LearningRate:
    """The rate of all groups of `optimizer`, a 0-d float32 tensor beside the parameters.

    A recorded update so reads the rate of each step; a number of the host would be that of the recording for good.
    `optimizer.state_dict()` goes on giving a plain number, whatever the device. Load a state before, not after.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._value = torch.zeros((), dtype=torch.float32, device=device)
        self.set(float(optimizer.param_groups[0]["lr"]))
        for group in optimizer.param_groups:
            group["lr"] = self._value
        optimizer.register_state_dict_post_hook(self._as_number)

    def set(self, rate: float) -> None:
        """The rate of the updates that follow. Waits for nothing."""
        self._rate = rate
        self._value.fill_(rate)

    def _as_number(self, _: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        for group in state["param_groups"]:
            group["lr"] = self._rate


class FiniteGuard:
    """Stops all updates from the first non-finite loss or gradient on, without asking the host.

    `tripped` is a flag on the device that a fused optimizer takes as its `found_inf`: once 1, that update and every
    later one leave weights and moments as they are. The host reads it when it reads the metrics. Updates are counted on
    the device as well, from `start_step` on.
    """

    def __init__(self, device: torch.device, start_step: int = 0) -> None:
        self.tripped = torch.zeros((), dtype=torch.float32, device=device)
        self._step = torch.full((), start_step, dtype=torch.int64, device=device)
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self._own_loss_bad = torch.zeros((), dtype=torch.bool, device=device)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Make a fused `optimizer` heed the flag. Raises ValueError where the optimizer is not fused."""
        if not optimizer.defaults.get("fused"):
            raise ValueError("FiniteGuard needs an optimizer made with fused=True: only those read found_inf")
        optimizer.found_inf = self.tripped  # type: ignore[attr-defined]
        optimizer.grad_scale = None  # type: ignore[attr-defined]

    def check(self, own_loss: Tensor, shared: Iterable[Tensor]) -> None:
        """Called once an update: trip if any of `shared` (the same on every rank: reduced loss, gradient norm) is not
        finite. `own_loss` is this rank's own, kept apart to name the rank at fault.
        """
        bad = torch.stack([value.detach().float() for value in shared]).isfinite().all().logical_not()
        first = bad.logical_and(self.tripped == 0)
        # Not masked_fill_, which asks the host for the value of a tensor.
        self._first_bad.copy_(torch.where(first, self._step, self._first_bad))
        self._own_loss_bad |= first & own_loss.detach().isfinite().logical_not()
        self.tripped.masked_fill_(bad, 1.0)
        self._step += 1

    def state(self) -> Tensor:
        """float64 [3] on the device, for `read`."""
        return torch.stack([self.tripped.double(), self._first_bad.double(), self._own_loss_bad.double()])

    @staticmethod
    def read(state: list[float]) -> tuple[int, bool] | None:
        """From `state().tolist()`: (the step that went wrong, whether this rank's own loss did), or None."""
        tripped, first_bad, own_loss_bad = state
        return (int(first_bad), bool(own_loss_bad)) if tripped else None
