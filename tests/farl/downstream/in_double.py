"""Run as a program it is `farl.finetune` with the network in float64 and without dropout, whose draws depend on the
number of processes: what is left of a difference is none of rounding."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from farl import cli
from farl.downstream import tuner
from farl.downstream.network import Network
from farl.finetune import main


class Double(Network):
    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.double()

    def forward(self, images: Tensor) -> Any:
        return super().forward(images.double())


if __name__ == "__main__":
    for layer in (nn.Dropout, nn.Dropout2d):
        layer.forward = lambda self, input: input
    tuner.Network = Double
    cli.run(main, "farl.finetune")
