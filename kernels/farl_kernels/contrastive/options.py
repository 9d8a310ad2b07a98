"""The settings of one contrastive loss, checked once."""

from __future__ import annotations

from dataclasses import dataclass

from farl_kernels.checks import check_choice

OP = "contrastive_loss"  # the name that error messages begin with
KINDS = ("softmax", "sigmoid")
DUPLICATES = ("negative", "mask", "multi_positive")
REDUCTIONS = ("mean", "sum", "none")
PRECISIONS = ("bf16", "tf32", "fp32")


@dataclass(frozen=True)
class Options:
    """What is computed: see :func:`farl_kernels.contrastive_loss` for the meaning of each field."""

    kind: str = "softmax"
    label_smoothing: float = 0.0
    duplicates: str = "negative"
    deterministic: bool = False
    chunk_bytes: int | None = None
    metrics: bool = False
    precision: str | None = None
    lse: bool = False

    def __post_init__(self) -> None:
        check_choice(OP, "kind", self.kind, KINDS)
        check_choice(OP, "duplicates", self.duplicates, DUPLICATES)
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"{OP}: label_smoothing is {self.label_smoothing}, want a number in [0, 1)")
        if self.label_smoothing and self.kind == "sigmoid":
            raise ValueError(f"{OP}: label_smoothing is {self.label_smoothing}, want 0 with kind='sigmoid'")
        if self.precision is not None:
            check_choice(OP, "precision", self.precision, PRECISIONS)
        if self.lse and self.kind == "sigmoid":
            raise ValueError(f"{OP}: return_lse is True, want False with kind='sigmoid', which has no log-sum-exps")
        if self.chunk_bytes is not None and self.chunk_bytes < 1:
            raise ValueError(f"{OP}: chunk_bytes is {self.chunk_bytes}, want a positive number of bytes")

    @property
    def softmax(self) -> bool:
        return self.kind == "softmax"

    @property
    def compares_ids(self) -> bool:
        """Whether the tile looks at which items share an id."""
        return self.duplicates != "negative"

    @property
    def sums_same(self) -> bool:
        """Whether the softmax target has weight on other items of the same id (see ``targets.py``)."""
        return self.softmax and (
            self.duplicates == "multi_positive" or (self.duplicates == "mask" and self.label_smoothing > 0)
        )
