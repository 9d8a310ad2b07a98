"""Patch matrix, mask sampling and patch masking: what a masked ViT does before its first block."""

from __future__ import annotations

from farl_kernels.patch_masking.op import mask_patches, mask_positions, patchify, sample_block_masks

__all__ = ["mask_patches", "mask_positions", "patchify", "sample_block_masks"]
