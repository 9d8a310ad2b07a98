"""Random changes of colour that FaRL trains its face tasks with: gray, gamma, box blur; no change of hue, no flip."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from farl.downstream.draws import Draws

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def augment_colors(images: Tensor, draws: Draws, *, gray: float = 0.1, blur: float = 0.01) -> Tensor:
    """Gray with the given chance; then one of square root, nothing and square equally; then a box blur.

    Args:
        images: float [B, 3, H, W] in 0..1.
        draws: of B samples.
        gray: chance of a gray image.
        blur: greatest width of the box as a share of the mean side; the width is uniform and rounded down to pixels.
    """
    height, width = images.shape[2:]
    is_gray = draws.chance(gray)
    power = torch.tensor([0.5, 1.0, 2.0])[draws.integers(0, 3)]
    widths = (draws.uniform(0, blur) * (height + width) / 2).floor()

    weights = images.new_tensor(LUMA).view(1, 3, 1, 1)
    is_gray, power = (x.to(images.device).view(-1, 1, 1, 1) for x in (is_gray, power))
    images = torch.where(is_gray, (images * weights).sum(1, keepdim=True), images)
    images = images.clamp(0, 1) ** power.to(images.dtype)
    return box_blur(images, widths)


def box_blur(images: Tensor, widths: Tensor) -> Tensor:
    """Mean over a box around each pixel, of its own width for each image; 0 and 1 leave it as it is.

    The box lies symmetrically about the pixel: at an even width, pixels at both ends count half. (OpenCV's box of an
    even width moves the picture by half a pixel against its labels.) Borders are mirrored.

    Args:
        images: float [B, C, H, W].
        widths: float [B] pixels, on the CPU.
    """
    reach = int(widths.max()) // 2 if len(widths) else 0
    if reach == 0:
        return images
    offsets = torch.arange(-reach, reach + 1).abs()
    kernel = ((widths.clamp(min=1)[:, None] + 1) / 2 - offsets).clamp(0, 1)
    kernel = (kernel / kernel.sum(1, keepdim=True)).to(images)
    count, channels, height, width = images.shape
    kernel = kernel.repeat_interleave(channels, 0)
    flat = F.pad(images.reshape(1, count * channels, height, width), (reach,) * 4, mode="reflect")
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=count * channels)
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=count * channels)
    return flat.view(images.shape)
