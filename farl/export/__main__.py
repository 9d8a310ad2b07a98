"""``python -m farl.export CHECKPOINT OUT --format FORMAT``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from farl import cli

if TYPE_CHECKING:
    from collections.abc import Sequence

PROG = "farl.export"


@dataclass(frozen=True)
class Options:
    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")]
    """Training checkpoint, folder of a run (its latest checkpoint), or released weights (CLIP or FaRL layout)."""
    out: Annotated[Positional[str], arg(metavar="OUT")]
    """A file (.pt or .safetensors) for openai-clip, a folder for the others."""
    format: Literal["openai-clip", "open-clip", "timm", "transformers"]
    """The layout to write. timm takes the image tower alone."""
    drop_mim: bool = False
    """Leave the masked-image branch out of an openai-clip file; OpenAI's own strict loader needs that."""
    activation: Literal["auto", "quick_gelu", "gelu"] = "auto"
    """Activation of the MLPs; auto takes what the checkpoint says, else QuickGELU."""
    vision_heads: int = 0
    """Attention heads of the image tower; 0 takes what the checkpoint says, else those of the named model of that
    width, else width / 64."""
    text_heads: int = 0
    """Attention heads of the text tower; 0 as above."""


def main(argv: Sequence[str] | None = None) -> int | None:
    options = cli.parse(Options, argv, prog=PROG, description="Write trained weights in the layout of another library.")
    # Imported late: --help should not wait for torch.
    from farl.export.files import export_model
    from farl.model.weights import load_pretrained

    model = load_pretrained(
        options.checkpoint,
        activation=None if options.activation == "auto" else options.activation,
        vision_heads=options.vision_heads or None,
        text_heads=options.text_heads or None,
    )
    for path in export_model(model, options.out, options.format, drop_mim=options.drop_mim):
        print(path)
    return None


if __name__ == "__main__":
    cli.run(main, PROG)
