"""Patch matrices by Triton kernels: natively on a GPU, else in the interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from farl_kernels.launch import recorded_launches
from farl_kernels.patch_masking import custom_ops, launchers, patchify, reference

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def _bytes(device: torch.device, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)


def _call(images: Tensor, patch_size: int, dtype: torch.dtype, backend: str = "triton") -> Tensor:
    raw = images.dtype == torch.uint8
    return patchify(
        images, patch_size, mean=MEAN if raw else None, std=STD if raw else None, dtype=dtype, backend=backend
    )


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("rows", "columns", "patch"), [(2, 3, 16), (2, 3, 14), (1, 5, 8), (3, 2, 4), (2, 3, 5)])
def test_bytes(
    device: torch.device,
    kernel_dtype: torch.dtype,
    check_error: Callable[..., None],
    rows: int,
    columns: int,
    patch: int,
) -> None:
    images = _bytes(device, 2, rows * patch, columns * patch, 3)
    truth = _call(images, patch, torch.float64, "reference")
    found = _call(images, patch, kernel_dtype)
    assert found.is_contiguous()
    check_error(found, _call(images, patch, kernel_dtype, "reference"), truth, factor=2)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("rows", "columns", "patch"), [(2, 3, 16), (2, 3, 14), (1, 5, 8), (2, 3, 5)])
@pytest.mark.parametrize("source", [torch.float32, torch.float16])
def test_floats_and_their_gradient(
    device: torch.device, kernel_dtype: torch.dtype, source: torch.dtype, rows: int, columns: int, patch: int
) -> None:
    shape = 2, 3, rows * patch, columns * patch
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, source).requires_grad_()
    found, expected = _call(images, patch, kernel_dtype), _call(images, patch, kernel_dtype, "reference")
    assert torch.equal(found, expected) and found.is_contiguous()
    grad = torch.randn(found.shape).to(found)
    for incoming in (grad, grad.transpose(0, 1).contiguous().transpose(0, 1), grad[:1, :1, :1].expand_as(grad)):
        (a,) = torch.autograd.grad(found, images, incoming, retain_graph=True)
        (b,) = torch.autograd.grad(expected, images, incoming, retain_graph=True)
        assert a.dtype == source and torch.equal(a, b)


def test_any_layout(device: torch.device) -> None:
    base = _bytes(device, 2, 20, 40, 4)
    views = [
        base[:, 2:18, ::2, :3][:, :, :16],
        base.transpose(1, 2)[:, :32, :16, 1:],
        base[:1, :16, :16, :3].expand(3, -1, -1, -1),
        _bytes(device, 3 * 16 * 19 + 3)[3:].view(1, 16, 19, 3)[:, :, :16],
        _bytes(device, 2, 16, 40, 3)[:, :, 8:24],
        _bytes(device, 2, 3, 16, 16).permute(0, 2, 3, 1),
    ]
    for view in views:
        expected = _call(view.contiguous(), 8, torch.float32, "reference")
        torch.testing.assert_close(_call(view, 8, torch.float32), expected, rtol=1e-6, atol=1e-6)
        floats = view.permute(0, 3, 1, 2).float()
        assert torch.equal(_call(floats, 8, torch.float32), _call(floats, 8, torch.float32, "reference"))


def test_float_images_of_any_number_of_channels(device: torch.device) -> None:
    for channels in (1, 4):
        images = torch.randn(2, channels, 8, 12, device=device)
        assert torch.equal(_call(images, 4, torch.float32), _call(images, 4, torch.float32, "reference"))


@pytest.mark.parametrize("patch", [8, 14, 16])
def test_one_launch_of_wide_words(patch: int) -> None:
    """Bytes in rows go by the kernel that loads none twice, also where a batch is sliced."""
    images = torch.empty(4, 2 * patch, 3 * patch, 3, dtype=torch.uint8, device="meta")
    for view in (images, images[1:3], images[:, patch:]):
        with recorded_launches() as launches:
            launchers.patchify(view, patch, MEAN, STD, torch.float16)
        (only,) = launches
        assert "bytes" in only.kernel.__name__ and only.options["GROUP"] == (2 if patch == 14 else 8)


def test_empty_batch(device: torch.device) -> None:
    assert _call(_bytes(device, 0, 16, 16, 3), 8, torch.float32).shape == (0, 4, 192)
    images = torch.zeros(0, 3, 16, 16, device=device, requires_grad=True)
    _call(images, 8, torch.float32).sum().backward()
    assert images.grad is not None and images.grad.shape == images.shape


def test_refusals(device: torch.device) -> None:
    for images, dtype, reason in (
        (_bytes(device, 1, 8, 8, 1), torch.float32, "1 channels"),
        (_bytes(device, 1, 8, 8, 3), torch.float64, "float64"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.float64, device=device), torch.float32, "float64"),
    ):
        with pytest.raises(ValueError, match=f"patchify: backend 'triton' cannot run this call: .*{reason}"):
            patchify(images, 8, dtype=dtype, backend="triton")


def test_second_derivatives_are_refused(device: torch.device) -> None:
    images = torch.randn(1, 3, 8, 8, device=device, requires_grad=True)
    loss = _call(images, 8, torch.float32).pow(2).sum()
    with pytest.raises(RuntimeError, match="patchify: for gradients of gradients"):
        torch.autograd.grad(loss, images, create_graph=True)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_raw_ops(device: torch.device, backend: str) -> None:
    args = _bytes(device, 1, 8, 12, 3), 4, list(MEAN), list(STD), torch.float32, backend
    torch.library.opcheck(custom_ops.patchify_forward, args)
    torch.library.opcheck(
        custom_ops.patchify_forward, (torch.randn(1, 3, 4, 4, device=device), 4, [], [], torch.float32, backend)
    )
    grad = torch.randn(1, 6, 48, device=device)
    torch.library.opcheck(custom_ops.patchify_backward, (grad, [1, 3, 8, 12], 4, torch.float16, backend))


def test_the_plain_backward_is_the_gradient(device: torch.device) -> None:
    images = torch.randn(2, 3, 8, 12, dtype=torch.float64, device=device, requires_grad=True)
    patches = _call(images, 4, torch.float64, "reference")
    grad = torch.randn_like(patches)
    (expected,) = torch.autograd.grad(patches, images, grad)
    assert torch.equal(reference.unpatchify(grad, images.shape, 4, torch.float64), expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(device: torch.device, dynamic: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(_call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 3) if dynamic else (2,):
        images = torch.randn(batch, 3, 8, 12, device=device, requires_grad=True)
        found, expected = compiled(images, 4, torch.float32), _call(images, 4, torch.float32)
        assert torch.equal(found, expected)
        grad = torch.randn_like(found)
        assert torch.equal(*(torch.autograd.grad(x, images, grad)[0] for x in (found, expected)))
        raw = _bytes(device, batch, 8, 12, 3)
        assert torch.equal(compiled(raw, 4, torch.float32), _call(raw, 4, torch.float32))
