from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from farl_kernels.patch_masking import patchify

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def _images(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("height", "width", "patch"), [(32, 32, 8), (28, 42, 14), (16, 48, 16), (6, 4, 1)])
def test_product_with_conv_weight_is_the_patch_convolution(height: int, width: int, patch: int) -> None:
    images = torch.randn(3, 3, height, width, dtype=torch.float64)
    weight = torch.randn(5, 3, patch, patch, dtype=torch.float64)
    expected = F.conv2d(images, weight, stride=patch).flatten(2).transpose(1, 2)
    patches = patchify(images, patch, dtype=torch.float64)
    torch.testing.assert_close(patches @ weight.flatten(1).T, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_bytes_are_normalised_as_by_to_tensor_and_normalize(dtype: torch.dtype) -> None:
    images = _images(2, 32, 48, 3)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    mean, std = (torch.tensor(v, dtype=compute)[:, None, None] for v in (MEAN, STD))
    normalised = (images.permute(0, 3, 1, 2).to(compute) / 255 - mean) / std
    expected = patchify(normalised, 16, dtype=dtype)
    found = patchify(images, 16, mean=MEAN, std=STD, dtype=dtype)
    assert found.dtype == dtype and found.shape == (2, 6, 768) and found.is_contiguous()
    assert torch.equal(found, expected)


def test_no_mean_and_std_scales_to_one() -> None:
    found = patchify(torch.full((1, 4, 4, 3), 255, dtype=torch.uint8), 2, dtype=torch.float32)
    assert torch.equal(found, torch.ones(1, 4, 12))


def test_sliced_flipped_and_expanded_images() -> None:
    base = _images(2, 20, 40, 4)
    for view in (
        base[:, 2:18, ::2, :3][:, :, :16],
        base.transpose(1, 2)[:, :32, :16, 1:],
        base[:1, :16, :16].expand(3, -1, -1, -1),
    ):
        kwargs = {"dtype": torch.float32}
        assert torch.equal(patchify(view, 8, **kwargs), patchify(view.contiguous(), 8, **kwargs))
    assert torch.equal(base, _images(2, 20, 40, 4)), "the images are left as they are"


def test_gradients_of_float_images() -> None:
    images = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: patchify(x, 2, dtype=torch.float64), images)
    assert torch.autograd.gradgradcheck(lambda x: patchify(x, 2, dtype=torch.float64) ** 2, images)


@pytest.mark.parametrize(
    ("images", "change", "name"),
    [
        (torch.zeros(3, 8, 8), {}, "images"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int32), {}, "images"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), {}, "images"),
        (torch.zeros(1, 3, 8, 9), {}, "images"),
        (torch.zeros(1, 3, 8, 8), {"mean": MEAN}, "mean or std"),
        (torch.zeros(1, 8, 8, 3, dtype=torch.uint8), {"mean": (0.5,)}, "mean"),
        (torch.zeros(1, 8, 8, 3, dtype=torch.uint8), {"std": (0.5, 0.0, 0.5)}, "std"),
        (torch.zeros(1, 3, 8, 8), {"patch_size": 0}, "patch_size"),
        (torch.zeros(1, 3, 8, 8), {"dtype": torch.int32}, "dtype"),
        (torch.zeros(1, 3, 8, 8), {"backend": "nonsense"}, "backend"),
    ],
)
def test_wrong_arguments_are_named(images: torch.Tensor, change: dict, name: str) -> None:
    with pytest.raises(ValueError, match=f"^patchify: {name} "):
        patchify(images, **({"patch_size": 4, "dtype": torch.float32} | change))


@pytest.mark.slow
def test_compiles_without_a_graph_break() -> None:
    images = _images(2, 16, 16, 3)
    call = lambda x: patchify(x, 8, mean=MEAN, std=STD, dtype=torch.float32)
    assert torch.equal(torch.compile(call, fullgraph=True, backend="eager")(images), call(images))
