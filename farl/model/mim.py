"""The image tower with FaRL's branch of masked image modelling (Zheng et al. 2022)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from farl.model.blocks import Block, LayerNorm, Stream, take_first, take_indexed
from farl.model.config import ModelConfig
from farl.model.vision import VisionTower, init_weights, make_transformer
from farl_engine.profiler import part
from farl_kernels.patch_masking import mask_patches
from farl_kernels.token_loss import masked_token_cross_entropy


class MaskedVisionTower(VisionTower):
    """`VisionTower` that can also run each image a second time with masked patches, in the same pass."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        assert config.mim is not None
        width = config.vision.width
        self.lm_transformer = make_transformer(config, config.mim.layers)
        self.ln_lm = LayerNorm(width, config.layer_norm_cast)
        self.lm_head = nn.Linear(width, config.mim.vocab_size)
        self.mask_token = nn.Parameter(width**-0.5 * torch.randn(width))
        self.lm_transformer.apply(init_weights)
        init_weights(self.lm_head)

    def forward_masked(self, images: Tensor, mask: Tensor, masked_positions: Tensor) -> tuple[Tensor, Tensor]:
        """Features [n, embed_dim] of the clean images, and hidden rows [n*K, C] of the masked ones after `ln_lm`.

        The clean half of the batch ends at the class token, the masked half at the masked patches: only those rows
        are computed in the last block that each passes.

        Args:
            images: as in `VisionTower.forward`.
            mask: bool [n, P], True = masked.
            masked_positions: int32 or int64 [n, K], the masked patches, padded with -1; padded rows of the result
                hold no meaning and want a target that the loss ignores.
        """
        self._check_mask(images, mask, masked_positions)
        stream = self.transformer.all_but_last(self._embed_masked(images, mask, "fork"))
        clean, masked = self.transformer.run(_last_block, self.transformer.last, stream)
        return self.pool(clean), self._hidden(masked, mask, masked_positions)

    def forward_masked_alone(self, images: Tensor, mask: Tensor, masked_positions: Tensor) -> Tensor:
        """The hidden rows of `forward_masked` without its clean half: half the work where nobody wants features."""
        self._check_mask(images, mask, masked_positions)
        stream = self.transformer.all_but_last(self._embed_masked(images, mask, "mask"))
        return self._hidden(self.transformer.run(self.transformer.last, stream), mask, masked_positions)

    def _embed_masked(self, images: Tensor, mask: Tensor, mode: Literal["fork", "mask"]) -> Stream:
        return self.start(
            mask_patches(
                self.embed_patches(images),
                mask,
                mask_token=self.mask_token,
                class_token=self.class_embedding,
                position_embedding=self.positional_embedding,
                mode=mode,
            )
        )

    def _hidden(self, masked: Stream, mask: Tensor, masked_positions: Tensor) -> Tensor:
        """Rows [n*K, C] after `ln_lm` from the stream [n, N, C] after the trunk's last block."""
        with part("masked blocks"):
            masked = self.lm_transformer.all_but_last(masked)
            # Padding (-1) falls on the class token's row.
            tokens = mask.shape[1] + 1
            first = torch.arange(0, len(mask) * tokens, tokens, device=mask.device)
            take = take_indexed(first[:, None] + (masked_positions + 1))
            masked = self.lm_transformer.run(self.lm_transformer.last.at_rows, masked, take)
            return self.ln_lm(masked)[0].flatten(0, 1)

    def token_loss(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sum of the cross-entropies of `hidden` [R, C] with the visual tokens `targets` (int64, R in all, -1 is
        ignored), number of right predictions, and number of targets: three 0-d tensors."""
        return masked_token_cross_entropy(
            hidden, self.lm_head.weight, self.lm_head.bias, targets.flatten(), reduction="sum"
        )

    def _check_mask(self, images: Tensor, mask: Tensor, masked_positions: Tensor) -> None:
        wanted = [len(images), self.config.num_patches]
        if mask.dtype != torch.bool or list(mask.shape) != wanted:
            raise ValueError(f"mask must be bool {wanted}, not {mask.dtype} {list(mask.shape)}")
        if masked_positions.ndim != 2 or len(masked_positions) != len(images) or masked_positions.is_floating_point():
            raise ValueError(
                f"masked_positions must be int32 [{len(images)}, K], "
                f"not {masked_positions.dtype} {list(masked_positions.shape)}"
            )


def _last_block(block: Block, stream: Stream) -> tuple[Stream, Stream]:
    """Class-token rows [n, C] of the clean half, everything [n, N, C] of the masked half."""
    clean, masked = stream.halves()
    return block.at_rows(clean, take_first), block(masked)
