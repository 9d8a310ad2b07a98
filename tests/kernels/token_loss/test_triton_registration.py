"""The Triton backend of the masked-token loss as PyTorch sees it: schema, fakes, compiler, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from farl_kernels.token_loss import custom_ops, masked_token_cross_entropy

pytest.importorskip("farl_kernels.token_loss.launchers")


def inputs(rows: int, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    g = torch.Generator().manual_seed(rows)
    leaves = [torch.randn(shape, generator=g).to(device, dtype) for shape in ((rows, 6), (40, 6), (40,))]
    targets = torch.randint(-1, 40, (rows,), generator=g).to(device)
    return [x.requires_grad_() for x in leaves], targets


def results(run: object, leaves: list[Tensor], targets: Tensor) -> list[Tensor]:
    loss, correct, count = run(*leaves, targets)
    return [loss, correct, count, *torch.autograd.grad(-2.5 * loss, leaves)]


def run(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return masked_token_cross_entropy(hidden, weight, bias, targets, backend="triton")


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False), (False, False, False)])
def test_opcheck(device: torch.device, kernel_dtype: torch.dtype, backend: str, needs: tuple[bool, bool, bool]) -> None:
    leaves, targets = inputs(7, device, kernel_dtype)
    arguments = (*(x.detach() for x in leaves), targets, -1, True, *needs, backend)
    torch.library.opcheck(custom_ops.forward, arguments)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_equals_eager(device: torch.device, compiler: str, dynamic: bool) -> None:
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend=compiler)
    for rows in (9, 14) if dynamic else (9,):
        leaves, targets = inputs(rows, device)
        got, wanted = results(compiled, leaves, targets), results(run, leaves, targets)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_compiled_with_half_the_gradients(device: torch.device) -> None:
    (hidden, weight, bias), targets = inputs(9, device)
    hidden.requires_grad_(False)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(hidden, weight, bias, targets)[0], (weight, bias))
    wanted = torch.autograd.grad(run(hidden, weight, bias, targets)[0], (weight, bias))
    assert all(a.equal(b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fakes(dtype: torch.dtype) -> None:
    with FakeTensorMode():
        leaves = [torch.empty(shape, dtype=dtype, requires_grad=True) for shape in ((5, 6), (40, 6), (40,))]
        targets = torch.zeros(5, dtype=torch.int64)
        needs = (True, False, True)
        made = custom_ops.forward(*leaves, targets, -1, True, *needs, "triton")
    assert [tuple(x.shape) for x in made] == [(), (), (), (5, 6), (0,), (40,)]
    kept = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    wanted = [torch.float32, torch.float32, torch.int64, kept, torch.float32, torch.float32]
    assert [x.dtype for x in made] == wanted


def test_second_derivative_is_refused(device: torch.device) -> None:
    leaves, targets = inputs(5, device)
    loss = run(*leaves, targets)[0]
    with pytest.raises(RuntimeError, match=r"^masked_token_cross_entropy"):
        torch.autograd.grad(loss, leaves, create_graph=True)


def test_float64_is_refused(device: torch.device) -> None:
    leaves, targets = inputs(5, device, torch.float64)
    with pytest.raises(
        ValueError, match=r"^masked_token_cross_entropy: backend 'triton' cannot run this call: .*float64"
    ):
        run(*leaves, targets)
    assert masked_token_cross_entropy(*leaves, targets)[0].dtype == torch.float64


def test_autocast(device: torch.device) -> None:
    leaves, targets = inputs(5, device)
    with torch.autocast(device.type, dtype=torch.float16):
        got = results(run, leaves, targets)
    half = leaves[0].detach().half().requires_grad_()
    wanted = results(run, [half, *leaves[1:]], targets)
    assert got[0].equal(wanted[0]) and got[4].equal(wanted[4])
    assert got[3].dtype == torch.float32 and got[3].half().equal(wanted[3])
