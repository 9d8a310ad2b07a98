"""Text on the sheets that tasks draw."""

from __future__ import annotations

from PIL import ImageDraw, ImageFont


def fit(pen: ImageDraw.ImageDraw, text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """`text`, cut short with an ellipsis where it is wider than `width` pixels."""
    if pen.textlength(text, font) <= width:
        return text
    while text and pen.textlength(text + "…", font) > width:
        text = text[:-1]
    return text + "…"
