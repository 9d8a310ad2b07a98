"""One look for all pictures: colours, fonts, and figures that need no display."""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from farl.report.text import families

INK = "#1f2430"
MUTED = "#7a8090"
FAINT = "#e4e6ec"
PAPER = "#ffffff"
BLUE = "#3565c9"
ORANGE = "#d9722b"
GREEN = "#2b9a66"
RED = "#cf4848"
VIOLET = "#7d55c7"

_RC = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,  # a caption may hold dollar signs
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
}


@contextlib.contextmanager
def look() -> Iterator[None]:
    """Our settings of matplotlib inside, the caller's again outside."""
    with mpl.rc_context(_RC | {"font.family": families()}):
        yield


def save(figure: Figure, path: str | Path, *, dpi: int = 110) -> Path:
    """Write a PNG under a temporary name first, so that a page never shows half a picture."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".png")
    os.close(handle)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # a caption in a script the font lacks
            figure.savefig(name, dpi=dpi, metadata={"Software": None})
        Path(name).chmod(0o644)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)
    return path


def frame(axes: Axes, color: str, width: float) -> None:
    """A picture's axes: no ticks, a frame around it."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set(visible=True, color=color, linewidth=width)
