"""`PatchCodebook`: visual tokens without any download, by k-means over the patches of the run's own images."""

from __future__ import annotations

import errno
import random
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from farl.tokens.kmeans import kmeans, nearest
from farl.tokens.patch_features import COLOUR_COPIES, FeatureLayout, patch_features

# Of the features in the module `patch_features`: a codebook fitted on others would give wrong tokens.
FEATURE_VERSION = 1
PATCHES_PER_CODE = 128
LLOYD_ITERATIONS = 10


class PatchCodebook:
    """Tokens of image patches: the nearest of `vocab_size` centroids in mean colour and structure (`patch_features`).

    A token can be looked at: `decode` draws the mean of the training patches that have it. Fitting and calls are exact
    integer arithmetic: the same images give the same codebook and tokens on every device.

    Attributes:
        vocab_size: number of codes.
        patch_size: side of a patch in pixels, that of the image tower.
        token_image_size: None: tokens come from the images that the model sees.
    """

    token_image_size: int | None = None

    def __init__(self, centroids: torch.Tensor, pictures: torch.Tensor) -> None:
        """`centroids` int16 [V, F] as in `state_dict`; `pictures` uint8 [V, p, p, 3], the patch that a code draws."""
        layout = FeatureLayout(pictures.shape[1])
        if pictures.ndim != 4 or centroids.shape != (len(pictures), layout.structure_size + 3):
            raise ValueError(
                f"centroids, pictures: shapes {tuple(centroids.shape)} and {tuple(pictures.shape)} do not fit together"
            )
        self._layout = layout
        self._centroids = centroids
        self._pictures = pictures
        structure, colour = centroids.to(torch.float32).split([layout.structure_size, 3], dim=1)
        self._weights = torch.cat([structure, colour.repeat(1, COLOUR_COPIES)], dim=1)

    @property
    def vocab_size(self) -> int:
        return len(self._pictures)

    @property
    def patch_size(self) -> int:
        return self._layout.patch_size

    @classmethod
    def fit(
        cls,
        images: torch.Tensor,
        patch_size: int,
        vocab_size: int,
        seed: int = 0,
        *,
        patches_per_code: int = PATCHES_PER_CODE,
        iterations: int = LLOYD_ITERATIONS,
    ) -> PatchCodebook:
        """Fit the codes on patches spread evenly over `images`; deterministic.

        Args:
            images: uint8 [N, H, W, 3]; H and W multiples of `patch_size`.
            vocab_size: number of codes; at most the number of patches.
            patches_per_code: as many patches a code are used, or all that there are.
            iterations: Lloyd iterations.

        Raises:
            ValueError: an argument of the wrong shape, dtype or range, or fewer patches than codes.
        """
        layout = FeatureLayout(patch_size)
        tiles = _tiles(images, patch_size)
        batch, rows, columns = tiles.shape[:3]
        total = batch * rows * columns
        if not 1 <= vocab_size <= total:
            raise ValueError(f"vocab_size: wanted 1..{total}, the number of patches in images, got {vocab_size}")
        chosen = _spread(total, min(total, patches_per_code * vocab_size), seed).to(images.device)
        patches = tiles[chosen // (rows * columns), chosen // columns % rows, chosen % columns]
        features = torch.cat([patch_features(part, layout) for part in patches.split(8192)])
        weights = kmeans(features, vocab_size, iterations=iterations, seed=seed)
        centroids = weights[:, : layout.structure_size + 3].to(torch.int16)
        return cls(centroids, _mean_pictures(patches, nearest(features, weights)[0], weights, layout))

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens of all patches, or of those at `positions`; no host sync.

        Args:
            images: uint8 [B, H, W, 3] on this codebook's device; H and W multiples of `patch_size`.
            positions: int32 [B, K] patch indices, padded with -1, as `sample_block_masks` gives them.

        Returns:
            int64 [B, P] with P = (H / p) (W / p), row by row; or int64 [B, K], -1 where `positions` is.

        Raises:
            ValueError: an argument of the wrong shape, dtype or device.
        """
        tiles = _tiles(images, self.patch_size)
        if images.device != self._weights.device:
            raise ValueError(f"images: wanted on {self._weights.device} as the codebook, got {images.device}")
        batch, rows, columns = tiles.shape[:3]
        if positions is None:
            return self._tokens(tiles.flatten(0, 2)).view(batch, rows * columns)
        if positions.ndim != 2 or len(positions) != batch:
            raise ValueError(f"positions: wanted int32 [{batch}, K], got {positions.dtype} {tuple(positions.shape)}")
        index = positions.long().clamp(min=0)
        sample = torch.arange(batch, device=images.device)[:, None]
        tokens = self._tokens(tiles[sample, index // columns, index % columns].flatten(0, 1)).view(positions.shape)
        return tokens.masked_fill(positions < 0, -1)

    def _tokens(self, patches: torch.Tensor) -> torch.Tensor:
        parts = [nearest(patch_features(part, self._layout), self._weights)[0] for part in patches.split(8192)]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=patches.device)

    def decode(self, tokens: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """int64 [B, P] -> uint8 images [B, rows * p, columns * p, 3].

        Args:
            grid: (rows, columns) of patches; None takes a square.

        Raises:
            ValueError: P patches do not make the grid, or a token is not in 0..vocab_size - 1.
        """
        side = round(tokens.shape[-1] ** 0.5)
        rows, columns = grid or (side, side)
        if tokens.ndim != 2 or rows * columns != tokens.shape[1]:
            raise ValueError(f"tokens: wanted [B, {rows * columns}] for {rows} x {columns}, got {tuple(tokens.shape)}")
        if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= self.vocab_size):
            raise ValueError(f"tokens: wanted 0..{self.vocab_size - 1}, got {int(tokens.min())}..{int(tokens.max())}")
        patches = self._pictures[tokens.to(self._pictures.device)]
        return patches.unflatten(1, (rows, columns)).transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def to(self, device: torch.device | str) -> PatchCodebook:
        """A codebook on `device`."""
        return PatchCodebook(self._centroids.to(device), self._pictures.to(device))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Plain CPU tensors: `centroids` int16, `pictures` uint8, `feature_version` int64."""
        version = torch.tensor(FEATURE_VERSION)
        return {"centroids": self._centroids.cpu(), "pictures": self._pictures.cpu(), "feature_version": version}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, torch.Tensor]) -> PatchCodebook:
        """Rebuild from `state_dict`.

        Raises:
            ValueError: an entry is missing, or the codebook was fitted on other features than this version's.
        """
        wanted = {"centroids", "pictures", "feature_version"}
        if set(state) != wanted:
            raise ValueError(f"state: wanted the entries {sorted(wanted)}, got {sorted(state)}")
        version = int(state["feature_version"])
        if version != FEATURE_VERSION:
            raise ValueError(
                f"state: feature version {version}, this code computes {FEATURE_VERSION}; fit a new codebook"
            )
        return cls(state["centroids"], state["pictures"])

    def save(self, path: str | Path) -> None:
        """Write `state_dict` as a .safetensors file; OSError where that cannot be."""
        if not Path(path).parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "no such folder", str(Path(path).parent))
        save_file(self.state_dict(), path)
        # It is written for its owner alone, but those who train are often others.
        Path(path).chmod(0o644)

    @classmethod
    def from_file(cls, path: str | Path) -> PatchCodebook:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is missing or not a codebook.
        """
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file")
        try:
            return cls.from_state_dict(load_file(path))
        except Exception as error:  # safetensors has its own exception type, which is no ValueError
            raise ValueError(f"{path}: not a codebook ({error}); make one with `python -m farl.tokens fit`") from None


def _tiles(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> a view [B, rows, columns, p, p, 3]."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"images: wanted uint8 [B, H, W, 3], got {images.dtype} {tuple(images.shape)}")
    height, width = images.shape[1:3]
    if height % patch_size or width % patch_size or not height or not width:
        raise ValueError(f"images: {height} x {width} pixels are not multiples of patch_size {patch_size}")
    return images.unflatten(2, (-1, patch_size)).unflatten(1, (-1, patch_size)).transpose(2, 3)


def _spread(total: int, count: int, seed: int) -> torch.Tensor:
    """`count` different indices below `total`, ascending: one at random of each of `count` equal stretches."""
    rng = random.Random(f"spread {seed}")
    edges = [i * total // count for i in range(count + 1)]
    return torch.tensor([low + int(rng.random() * (high - low)) for low, high in pairwise(edges)])


def _mean_pictures(
    patches: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, layout: FeatureLayout
) -> torch.Tensor:
    """uint8 [V, p, p, 3]: the mean of the patches of each code, which has the least squared error in pixels.

    A code without a patch (there are fewer different patches than codes) takes that of the code nearest to it.
    """
    count = len(weights)
    members = torch.bincount(index, minlength=count)
    sums = torch.zeros(count, patches[0].numel(), dtype=torch.int64, device=patches.device)
    for part, codes in zip(patches.split(8192), index.split(8192), strict=True):
        sums.index_add_(0, codes, part.flatten(1).long())
    means = (sums.double() / members.clamp(min=1)[:, None]).round().to(torch.uint8)
    used = members.nonzero()[:, 0]
    nearest_used = used[nearest(weights, weights[used])[0]]
    return means[nearest_used].unflatten(1, (layout.patch_size, layout.patch_size, 3))
