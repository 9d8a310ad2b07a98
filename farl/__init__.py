"""FaRL: general facial representation learning from images and captions, and the engine that trains it.

::

    import farl

    model = farl.load_pretrained("FaRL-Base-Patch16-LAIONFace20M-ep64.pth")
    image_features = model.encode_image(images)
    text_features = model.encode_text(farl.tokenize(["a photo of a smiling woman"]))

Importing this package does not import torch: a run installs its signal handlers first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from farl.model import FaRL, load_pretrained
    from farl.tokenizer import tokenize

__all__ = ["FaRL", "load_pretrained", "tokenize"]
__version__ = "0.1.0"

_HOME = {"FaRL": "farl.model", "load_pretrained": "farl.model", "tokenize": "farl.tokenizer"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'farl' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
