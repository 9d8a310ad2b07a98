"""Losses with the signatures of open_clip's ``ClipLoss`` and ``SigLipLoss`` (2 - 4), to put in their place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from farl_kernels.contrastive.exchange import GatheredFeatures, Ranks
from farl_kernels.contrastive.op import contrastive_loss, local_features


class _Loss(nn.Module):
    def __init__(self, rank: int, world_size: int, precision: str | None, backend: str | None) -> None:
        super().__init__()
        name = type(self).__name__
        if not 0 <= rank < world_size:
            raise ValueError(f"{name}: rank is {rank}, want a number from 0 to {world_size - 1} (world_size - 1)")
        self.rank = rank
        self.world_size = world_size
        self.precision = precision
        self.backend = backend

    def _mean(self, image: Tensor, text: Tensor, scale: Tensor, **settings: Any) -> Tensor:
        """This rank's mean; a `world_size` of 1 is this process by itself, also where there are others."""
        given: Tensor | GatheredFeatures = text
        if self.world_size == 1:
            given = local_features(text, self.precision)
        elif (there := Ranks()).world_size != self.world_size or there.rank != self.rank:
            raise ValueError(
                f"{type(self).__name__}: rank {self.rank} of world_size {self.world_size}, "
                f"want rank {there.rank} of {there.world_size}, those of torch.distributed's default group"
            )
        loss = contrastive_loss(image, given, scale, precision=self.precision, backend=self.backend, **settings)
        assert isinstance(loss, Tensor)
        return loss


class ClipLoss(_Loss):
    """open_clip's ``ClipLoss``: the same values and parameter gradients, without the logits.

    Args:
        local_loss: True returns the mean over this rank's pairs, False over all ranks'. Gradients are the same.
        gather_with_grad: with several ranks only True, because without it the features' gradients are 1/W of the
            global loss's or, with `local_loss`, wrong.
        cache_labels: taken and not needed.
        rank, world_size: those of the default process group; a `world_size` of 1 leaves other processes alone.
        use_horovod: only False.
        precision, backend: as in :func:`farl_kernels.contrastive_loss`. Autocast does not round the features, as it
            does in open_clip; ``precision="bf16"`` does.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        precision: str | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(rank, world_size, precision, backend)
        if use_horovod:
            raise ValueError("ClipLoss: use_horovod is True, want False: ranks talk through torch.distributed")
        if world_size > 1 and not gather_with_grad:
            raise ValueError(
                f"ClipLoss: gather_with_grad is False with world_size {world_size}, want True: without it the "
                "gradients are not those of the global loss"
            )
        self.local_loss = local_loss

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Loss 0-d, or with `output_dict` ``{"contrastive_loss": loss}``. The softmax does not see `logit_bias`."""
        loss = self._mean(image_features, text_features, logit_scale)
        if self.world_size > 1 and not self.local_loss:
            with torch.no_grad():
                everybody = Ranks().sum(loss.detach()) / self.world_size
            loss = loss + (everybody - loss.detach())
        if logit_bias is not None:
            loss = loss + 0.0 * logit_bias  # a gradient of zero, as DDP expects one from each parameter
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(_Loss):
    """open_clip's ``SigLipLoss``: the same values and parameter gradients, without the logits.

    Args:
        cache_labels: taken and not needed.
        rank, world_size: as in :class:`ClipLoss`.
        dist_impl, chunk_size: taken and not needed: texts are gathered once, and the logits never stored.
        precision, backend: as in :class:`ClipLoss`.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int | None = None,
        *,
        precision: str | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(rank, world_size, precision, backend)
        if dist_impl not in (None, "bidir", "shift", "reduce", "gather"):
            raise ValueError(f"SigLipLoss: dist_impl is {dist_impl!r}, want None, 'bidir', 'shift', 'reduce', 'gather'")

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Loss 0-d, or with `output_dict` ``{"contrastive_loss": loss}``."""
        loss = self._mean(image_features, text_features, logit_scale, kind="sigmoid", logit_bias=logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss
