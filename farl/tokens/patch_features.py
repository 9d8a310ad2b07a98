"""Features of patches for `PatchCodebook`, as small integers in float32.

A patch becomes its mean colour and its structure: the pixels less the mean of their channel, divided by the square root
of the patch's contrast. Plain pixels would spend nearly all codes on shades of smooth skin and background; a full
normalisation would make the noise of a flat patch as important as an eye. The square root lies between the two.

Patches above 15 pixels a side are first averaged down to a side of 8 or more.

Every entry is a whole number of magnitude at most 256, and products of two feature vectors stay below 2^23. So the
GEMM of features and centroids, and with it the token, is exact in fp32, TF32 and bf16 with fp32 sums: equal on every
device, for any number of threads, any batch and any order of summation. The steps before the rounding are single
operations that IEEE 754 rounds correctly, on integers that fp32 or float64 hold exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Colour step: half a grey level. A difference d of the mean colour counts as COLOUR_COPIES * (COLOUR_GAIN d)^2.
COLOUR_GAIN = 2.0
COLOUR_COPIES = 18
# Structure: STRUCTURE_GAIN * (pixel - mean) / sqrt(contrast), contrast = root mean square of (pixel - mean) in 0..255.
STRUCTURE_GAIN = 8.0
# Below this contrast a patch is noise of the camera or of JPEG: it is no longer amplified.
LEAST_CONTRAST = 2.0
_STRUCTURE_LIMIT = 127
_STRUCTURE_BUDGET = 1 << 22


@dataclass(frozen=True)
class FeatureLayout:
    """Sizes of the features of `patch_size` x `patch_size` RGB patches.

    Raises:
        ValueError: a patch size without an exact integer form (63 px and up, or a large prime).
    """

    patch_size: int

    def __post_init__(self) -> None:
        if self.patch_size < 1 or self.side > 32 or self.pool > 4:
            raise ValueError(
                f"patch_size: wanted 1..32 or an even size up to 60 pixels for a patch codebook, got {self.patch_size}"
            )

    @property
    def pool(self) -> int:
        """Pixels that are averaged along each axis: the largest divisor that leaves a side of at least 8."""
        return max((f for f in range(1, self.patch_size // 8 + 1) if self.patch_size % f == 0), default=1)

    @property
    def side(self) -> int:
        return self.patch_size // self.pool

    @property
    def structure_size(self) -> int:
        return 3 * self.side**2

    @property
    def size(self) -> int:
        """Columns of the feature matrix."""
        return self.structure_size + 3 * COLOUR_COPIES

    @property
    def structure_limit(self) -> int:
        """Largest magnitude of a structure entry, so that a product of two structures stays within the budget."""
        return min(_STRUCTURE_LIMIT, int((_STRUCTURE_BUDGET / self.structure_size) ** 0.5))


def patch_features(patches: torch.Tensor, layout: FeatureLayout) -> torch.Tensor:
    """uint8 [N, p, p, 3] -> float32 [N, layout.size] of whole numbers: structure, then copies of the mean colour."""
    side, pool = layout.side, layout.pool
    pixels = patches.unflatten(2, (side, pool)).unflatten(1, (side, pool)).permute(0, 5, 1, 3, 2, 4)
    values = pixels.reshape(len(patches), 3, side * side, pool * pool).to(torch.float32)
    values = values.sum(-1) if pool > 1 else values.squeeze(-1)  # [N, 3, side^2], 0 .. 255 pool^2

    count = side * side
    totals = values.sum(-1)
    # count^2 times the sum over all entries of (value - mean)^2, exact in float64.
    squares = (values * values).sum((1, 2), dtype=torch.float64)
    spread = count**2 * squares - count * (totals.double() ** 2).sum(1)
    scale = count * pool * pool
    contrast = (spread / (3 * count)).sqrt() / scale
    gain = STRUCTURE_GAIN * (layout.structure_limit / _STRUCTURE_LIMIT) / contrast.clamp(min=LEAST_CONTRAST).sqrt()
    gain = (gain / scale).to(torch.float32)[:, None, None]
    structure = (values * count).sub_(totals[:, :, None]).mul_(gain).round_()
    structure.clamp_(-layout.structure_limit, layout.structure_limit)

    colour = ((totals / scale - 127.5) * COLOUR_GAIN).round_()
    return torch.cat([structure.flatten(1), colour.repeat(1, COLOUR_COPIES)], dim=1)
