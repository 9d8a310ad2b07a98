"""Neck and head that turn patch features into dense maps: BEiT's feature pyramid and UPerNet (Xiao et al. 2018).

Parameters of the head are named as in transformers' `UperNetHead` (after mmsegmentation's UPerHead).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from farl.downstream.backbone import Features

POOL_SCALES = (1, 2, 3, 6)


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone()
        dist.all_reduce(gradient)
        return gradient


class BatchNorm(nn.SyncBatchNorm):
    """BatchNorm2d over the images of all processes of the default group; on a CPU too, unlike torch's."""

    def __init__(self, channels: int, momentum: float = 0.1) -> None:
        super().__init__(channels, momentum=momentum)
        self.rate = momentum

    def forward(self, input: Tensor) -> Tensor:
        together = self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if together and input.device.type == "cpu":
            return self._over_processes(input)
        if together:
            return super().forward(input)
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.rate, self.eps
        )

    def _over_processes(self, input: Tensor) -> Tensor:
        x = input.double()
        own = torch.cat([x.sum((0, 2, 3)), x.square().sum((0, 2, 3)), x.new_tensor([x.numel() / x.shape[1]])])
        total = _SumOverProcesses.apply(own)
        (sums, squares), count = total[:-1].chunk(2), total[-1]
        mean = sums / count
        variance = (squares / count - mean.square()).clamp(min=0)
        assert self.num_batches_tracked is not None and self.running_mean is not None and self.running_var is not None
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean.to(self.running_mean), self.rate)
            self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var), self.rate)
        scale = (variance + self.eps).rsqrt() * self.weight
        return (x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]).to(input.dtype)


class ConvNormRelu(nn.Module):
    """Convolution without bias that keeps the size, BatchNorm, ReLU."""

    def __init__(self, channels_in: int, channels: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, kernel, padding=kernel // 2, bias=False)
        self.batch_norm = BatchNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.batch_norm(self.conv(x)))


class Neck(nn.Module):
    """Four maps of equal size to a pyramid, as in BEiT (`beit/semantic_segmentation/backbone/beit.py`) and FaRL.

    Patches of 12 pixels and more: x4 (two transposed convolutions), x2 (one), as it is, half (max-pooling). Smaller
    patches: x2, as it is, half, a quarter. So the finest level of a ViT with patches of 16 or 8 has a stride of 4.
    """

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()

        def double() -> nn.Module:
            return nn.ConvTranspose2d(width, width, 2, stride=2)

        # Sizes are rounded up, so that a grid of one row has a half too; even ones are as in BEiT.
        half, quarter = nn.MaxPool2d(2, ceil_mode=True), nn.MaxPool2d(4, ceil_mode=True)
        if patch_size >= 12:
            levels = [nn.Sequential(double(), BatchNorm(width), nn.GELU(), double()), double(), nn.Identity(), half]
        else:
            levels = [double(), nn.Identity(), half, quarter]
        self.levels = nn.ModuleList(levels)
        self.stride = patch_size / 4 if patch_size >= 12 else patch_size / 2

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps [B, C, h, w] each, coarsest last; ValueError for another number than 4."""
        if len(maps) != len(self.levels):
            raise ValueError(f"the neck takes the maps of {len(self.levels)} blocks, not {len(maps)}")
        return [level(x) for level, x in zip(self.levels, maps, strict=True)]


class PyramidPooling(nn.ModuleList):
    """Means over 1 x 1, 2 x 2, 3 x 3 and 6 x 6 cells, each convolved and resized to the map (PSPNet)."""

    def __init__(self, channels_in: int, channels: int, scales: Sequence[int]) -> None:
        super().__init__(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvNormRelu(channels_in, channels, 1)) for scale in scales
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        return [_resize(stage(x), x) for stage in self]


class UPerHead(nn.Module):
    """UPerNet: pyramid pooling on the coarsest map, top-down sums, and one fused map at the finest size.

    Args:
        channels_in: of the maps, finest first. channels: inside. outputs: of the last convolution.
        dropout: chance of a whole channel before the last convolution, in training.
    """

    def __init__(
        self,
        channels_in: Sequence[int],
        channels: int,
        outputs: int,
        *,
        pool_scales: Sequence[int] = POOL_SCALES,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        *finer, coarsest = channels_in
        self.psp_modules = PyramidPooling(coarsest, channels, pool_scales)
        self.bottleneck = ConvNormRelu(coarsest + len(pool_scales) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvNormRelu(width, channels, 1) for width in finer)
        self.fpn_convs = nn.ModuleList(ConvNormRelu(channels, channels, 3) for _ in finer)
        self.fpn_bottleneck = ConvNormRelu(len(channels_in) * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, outputs, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps [B, C_i, h_i, w_i], finest first, to [B, outputs, h_0, w_0]."""
        *finer, coarsest = maps
        top = self.bottleneck(torch.cat([coarsest, *self.psp_modules(coarsest)], 1))
        levels = [top]
        for convolution, x in zip(reversed(self.lateral_convs), reversed(finer), strict=True):
            lateral = convolution(x)
            levels.append(lateral + _resize(levels[-1], lateral))
        smooth = [convolution(x) for convolution, x in zip(self.fpn_convs, reversed(levels[1:]), strict=True)]
        fused = torch.cat([_resize(x, smooth[0]) for x in [*smooth, top]], 1)
        return self.classifier(self.dropout(self.fpn_bottleneck(fused)))


class DenseHead(nn.Module):
    """`Features` to maps of `outputs` channels: the neck, then the head. The stride in pixels is `stride`.

    Args:
        width, patch_size: of the backbone, whose four chosen blocks come in.
        channels: inside the head; FaRL's is 768.
    """

    def __init__(self, width: int, patch_size: int, outputs: int, *, channels: int = 768, dropout: float = 0.1) -> None:
        super().__init__()
        self.neck = Neck(width, patch_size)
        self.head = UPerHead([width] * 4, channels, outputs, dropout=dropout)
        self.stride = self.neck.stride

    def forward(self, features: Features) -> Tensor:
        """Outputs [B, outputs, H / stride, W / stride]."""
        return self.head(self.neck(features.maps))


def _resize(x: Tensor, like: Tensor) -> Tensor:
    if x.shape[2:] == like.shape[2:]:
        return x
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)
