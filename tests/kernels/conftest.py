"""What the tests of kernels share: the device, the error bound and poisoned memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

# Bfloat16 products are wrong in the interpreter, so they are tested on a GPU only.
KERNEL_DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU with the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=KERNEL_DTYPES, ids=str)
def kernel_dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nobody has written yet is NaN (or the largest integer)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


def _check_error(
    got: Tensor | None, same_dtype: Tensor | None, truth: Tensor | None, *, factor: float, name: str = "result"
) -> None:
    """Assert that `got` is at most `factor` times as far from the float64 `truth` as PyTorch in the same dtype is.

    Errors are the largest over the tensor; what is added for luck is a few units in the last place of the largest
    value, so that a result that PyTorch happens to hit exactly is no trap.
    """
    assert got is not None and same_dtype is not None and truth is not None, name
    assert got.shape == truth.shape and got.dtype == same_dtype.dtype, (name, got.shape, got.dtype)
    assert torch.isfinite(got).all(), f"{name} is not finite"
    if got.numel() == 0:
        return
    error = (got.double() - truth).abs().max().item()
    allowed = (same_dtype.double() - truth).abs().max().item()
    unit = torch.finfo(got.dtype).eps * truth.abs().max().item()
    assert error <= factor * allowed + 2 * unit, f"{name}: error {error:.3g}, PyTorch's {allowed:.3g}, unit {unit:.3g}"


@pytest.fixture
def check_error() -> Callable[..., None]:
    """``check_error(got, same_dtype, truth, factor=2, name="out")``: factor 2 for outputs, 3 for gradients."""
    return _check_error
