"""The contrastive loss as a module."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from farl_kernels.checks import check_choice
from farl_kernels.contrastive.exchange import GatheredFeatures
from farl_kernels.contrastive.op import contrastive_loss
from farl_kernels.contrastive.options import OP, REDUCTIONS, Options


class ContrastiveLoss(nn.Module):
    """:func:`contrastive_loss` with its settings kept, called as ``loss(image_features, text_features, logit_scale)``.

    For the signatures of open_clip's ``ClipLoss`` and ``SigLipLoss`` see ``open_clip.py``.
    """

    def __init__(
        self,
        *,
        group: dist.ProcessGroup | None = None,
        kind: str = "softmax",
        label_smoothing: float = 0.0,
        duplicates: str = "negative",
        precision: str | None = None,
        deterministic: bool = False,
        chunk_bytes: int | None = None,
        reduction: str = "mean",
        return_metrics: bool = False,
        return_lse: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_choice(OP, "reduction", reduction, REDUCTIONS)
        Options(kind, label_smoothing, duplicates, deterministic, chunk_bytes, return_metrics, precision, return_lse)
        self.group = group
        self.kind = kind
        self.label_smoothing = label_smoothing
        self.duplicates = duplicates
        self.precision = precision
        self.deterministic = deterministic
        self.chunk_bytes = chunk_bytes
        self.reduction = reduction
        self.return_metrics = return_metrics
        self.return_lse = return_lse
        self.backend = backend

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor | GatheredFeatures,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        return contrastive_loss(
            image_features,
            text_features,
            logit_scale,
            group=self.group,
            kind=self.kind,
            logit_bias=logit_bias,
            label_smoothing=self.label_smoothing,
            ids=ids,
            duplicates=self.duplicates,
            precision=self.precision,
            deterministic=self.deterministic,
            chunk_bytes=self.chunk_bytes,
            reduction=self.reduction,
            return_metrics=self.return_metrics,
            return_lse=self.return_lse,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}, deterministic={self.deterministic}, reduction={self.reduction!r}"
