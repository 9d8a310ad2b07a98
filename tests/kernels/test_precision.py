from __future__ import annotations

import pytest
import torch

from farl_kernels.precision import accumulation_dtype, autocast_dtype, without_autocast

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_dtype_and_its_end(dtype):
    a = torch.ones(2, 2)
    assert autocast_dtype(CPU) is None
    with torch.autocast("cpu", dtype):
        assert autocast_dtype(CPU) == dtype
        assert (a @ a).dtype == dtype
        with without_autocast(CPU):
            assert autocast_dtype(CPU) is None
            assert (a @ a).dtype == torch.float32
        assert autocast_dtype(CPU) == dtype


def test_devices_without_autocast_are_left_alone():
    with torch.autocast("cpu", torch.bfloat16), without_autocast(META):
        assert autocast_dtype(META) is None
        assert autocast_dtype(CPU) == torch.bfloat16


def test_sums_are_at_least_float32():
    wanted = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float64: torch.float64}
    assert {dtype: accumulation_dtype(dtype) for dtype in wanted} == wanted
