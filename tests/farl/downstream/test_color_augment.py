"""Gray, gamma and box blur as the protocol has them."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageFilter

from farl.downstream.color_augment import augment_colors, box_blur
from farl.downstream.draws import Draws


def test_shares_of_gray_and_gamma() -> None:
    images = torch.tensor([0.25, 0.5, 0.75]).view(1, 3, 1, 1).expand(3000, 3, 2, 2)
    result = augment_colors(images, Draws((1, i) for i in range(3000)))[..., 0, 0]
    gray = (result[:, 0] == result[:, 1]) & (result[:, 1] == result[:, 2])
    assert 0.08 < gray.float().mean() < 0.12
    luma = 0.299 * 0.25 + 0.587 * 0.5 + 0.114 * 0.75
    for power in (0.5, 1.0, 2.0):
        plain = torch.isclose(result, torch.tensor([0.25, 0.5, 0.75]) ** power).all(1)
        greyed = torch.isclose(result, torch.full((3,), luma**power)).all(1)
        assert 0.30 < (plain | greyed).float().mean() < 0.37


def test_the_box_is_a_box_of_its_own_width_for_each_image() -> None:
    images = torch.rand(4, 3, 24, 24)
    blurred = box_blur(images, torch.tensor([0.0, 1.0, 3.0, 5.0]))
    torch.testing.assert_close(blurred[:2], images[:2])
    for image, result, radius in ((images[2], blurred[2], 1), (images[3], blurred[3], 2)):
        pixels = (image[0].numpy() * 255).astype(np.uint8)
        wanted = np.asarray(Image.fromarray(pixels).filter(ImageFilter.BoxBlur(radius)), np.float32) / 255
        inside = slice(radius, -radius)
        assert np.abs(result[0].numpy() - wanted)[inside, inside].max() < 0.01


def test_an_even_box_does_not_move_the_picture() -> None:
    ramp = torch.arange(20.0).expand(1, 1, 20, 20)
    torch.testing.assert_close(box_blur(ramp, torch.tensor([4.0]))[..., 3:-3], ramp[..., 3:-3])


def test_a_sample_is_changed_in_the_same_way_in_any_batch() -> None:
    images = torch.rand(6, 3, 300, 300)
    whole = augment_colors(images, Draws((7, i) for i in range(6)))
    part = augment_colors(images[4:], Draws((7, i) for i in range(4, 6)))
    torch.testing.assert_close(whole[4:], part)
    assert not torch.equal(whole, images)
