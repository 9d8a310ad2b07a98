"""Starting and recording kernels, and the words in which they are refused."""

from __future__ import annotations

import pytest
import torch

from farl_kernels import launch


class Kernel:
    """Notes how it is started, as a jitted function would be."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[int, ...], tuple[object, ...], dict[str, object]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> object:
        return lambda *args, **options: self.calls.append((grid, args, options))


def test_launch(device: torch.device) -> None:
    kernel, x = Kernel(), torch.ones(3, device=device)
    launch.launch(kernel, (2, 1), x, 5, BLOCK=16, num_warps=2)
    assert kernel.calls == [((2, 1), (x, 5), {"BLOCK": 16, "num_warps": 2, "enable_fp_fusion": True})]


def test_empty_grids_start_nothing() -> None:
    kernel = Kernel()
    launch.launch(kernel, (4, 0), torch.ones(3))
    assert kernel.calls == []


def test_recorded_launches_start_nothing() -> None:
    kernel, x = Kernel(), torch.ones(3, device="meta")
    with launch.recorded_launches() as outer:
        launch.launch(kernel, (2,), x, None, BLOCK=16)
        with launch.recorded_launches() as inner:
            launch.launch(kernel, (0,), x)
    assert kernel.calls == []
    assert outer == [launch.Launch(kernel, (2,), (x, None), {"BLOCK": 16, "enable_fp_fusion": True})]
    assert [one.grid for one in inner] == [(0,)]


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.ones(1)
    assert "float64" in str(launch.refuses(cpu.double()))
    assert launch.refuses(cpu.to("meta")) is None
    monkeypatch.setattr(launch, "INTERPRETED", False)
    assert "TRITON_INTERPRET=1" in str(launch.refuses(cpu))
    monkeypatch.setattr(launch, "INTERPRETED", True)
    assert launch.refuses(cpu) is None and launch.refuses(cpu.half()) is None
    assert "bfloat16" in str(launch.refuses(cpu.bfloat16()))
    monkeypatch.setattr(launch, "HAS_TRITON", False)
    assert "not installed" in str(launch.refuses(cpu))
    assert launch.declines(cpu) is not None
