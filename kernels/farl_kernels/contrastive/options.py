"""The settings of one contrastive loss, checked once."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("softmax", "sigmoid")
DUPLICATES = ("negative", "mask", "multi_positive")
REDUCTIONS = ("mean", "sum", "none")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


@dataclass(frozen=True)
class Options:
    """What is computed: see :func:`farl_kernels.contrastive_loss` for the meaning of each field."""

    kind: str = "softmax"
    label_smoothing: float = 0.0
    duplicates: str = "negative"
    deterministic: bool = False
    chunk_bytes: int | None = None
    metrics: bool = False

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        check_choice("duplicates", self.duplicates, DUPLICATES)
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1); got {self.label_smoothing}")
        if self.label_smoothing and self.kind == "sigmoid":
            raise ValueError("label_smoothing is for kind='softmax' only; got kind='sigmoid'")
        if self.chunk_bytes is not None and self.chunk_bytes < 1:
            raise ValueError(f"chunk_bytes must be a positive number of bytes; got {self.chunk_bytes}")

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
