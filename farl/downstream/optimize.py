"""Learning rates, the optimizer, and the average of the weights."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from farl.downstream.network import Network
from farl.downstream.task import TuneSettings


def learning_rate_factor(step: int, settings: TuneSettings, *, steps: int, steps_per_epoch: int) -> float:
    """What the base rates are multiplied by in the update that follows `step` completed ones."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    if settings.schedule == "cosine":
        progress = (step - settings.warmup) / max(1, steps - settings.warmup)
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 0.1 ** sum(step >= milestone * steps_per_epoch for milestone in settings.milestones)


def make_optimizer(network: Network, settings: TuneSettings) -> torch.optim.AdamW:
    """AdamW (betas 0.9 and 0.999) over the layers of the backbone and the head; everything decays, as in FaRL."""
    groups = network.backbone.parameter_groups(settings.lr_backbone, settings.layer_decay)
    groups.append({"params": list(network.head.parameters()), "lr": settings.lr_head, "name": "head"})
    for group in groups:
        group["base_lr"] = group["lr"]
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay, fused=True)


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


class WeightAverage:
    """The exponential moving average of a network's weights and statistics: `average = d * average + (1 - d) * now`.

    d is `decay`, but (1 + n) / (10 + n) in the n-th update (from 1) while that is less (as TensorFlow's
    ExponentialMovingAverage has it), so that a run of some hundred steps does not keep its random start. FaRL has the
    constant; from update 8,990 on they are the same at 0.999.

    Attributes:
        network: the averaged one, in evaluation mode; frozen parameters are shared with the original.
    """

    def __init__(self, network: Network, decay: float) -> None:
        frozen = {id(parameter): parameter for parameter in network.parameters() if not parameter.requires_grad}
        self.network: Network = copy.deepcopy(network, frozen).eval().requires_grad_(False)
        self._decay = decay

    @torch.no_grad()
    def update(self, network: Network, step: int) -> None:
        """Take in the weights after update number `step`, counted from 1."""
        decay = min(self._decay, (1 + step) / (10 + step))
        averages, values = [], []
        for average, value in zip(_state(self.network), _state(network), strict=True):
            if average.is_floating_point() and average is not value:
                averages.append(average)
                values.append(value)
            elif average is not value:
                average.copy_(value)
        torch._foreach_lerp_(averages, values, 1 - decay)


def _state(network: nn.Module) -> list[torch.Tensor]:
    return [*network.parameters(), *network.buffers()]
