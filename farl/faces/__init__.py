"""Faces drawn from parameters: image, mask, landmarks, attributes and caption, all exact and all by (seed, index).

They let the whole of FaRL run where there are no photographs: `python -m farl.faces --out DIR` writes them as shards.
"""

from __future__ import annotations

from farl.faces.face import CLASSES, Face, draw
from farl.faces.shards import write_faces
from farl.faces.sheet import sample_sheet

__all__ = ["CLASSES", "Face", "draw", "sample_sheet", "write_faces"]
