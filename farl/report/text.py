"""Captions on pictures: broken into lines by their drawn width, in any script that an installed font has."""

from __future__ import annotations

import unicodedata
from functools import cache
from itertools import groupby

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

# Fonts with scripts that DejaVu Sans lacks, the first installed of each kind is taken.
_KINDS = (
    ("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei",
     "WenQuanYi Zen Hei", "Droid Sans Fallback", "PingFang SC", "Hiragino Sans", "Microsoft YaHei", "Arial Unicode MS"),
    ("Noto Sans CJK KR", "Noto Sans KR", "NanumGothic", "Apple SD Gothic Neo", "Malgun Gothic"),
    ("Noto Sans Devanagari", "Lohit Devanagari", "Mangal", "Kohinoor Devanagari"),
    ("Noto Sans Thai", "Garuda", "Thonburi", "Leelawadee UI"),
    ("Noto Emoji", "Symbola", "Segoe UI Symbol"),
)  # fmt: skip
_POINTS_PER_INCH = 72.0


@cache
def families() -> list[str]:
    """DejaVu Sans and, for other scripts, what is installed."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *(found for kind in _KINDS if (found := next(filter(installed.__contains__, kind), None)))]


@cache
def _fonts() -> list[FT2Font]:
    found = []
    for name in families():
        font = FT2Font(font_manager.findfont(name))
        font.set_size(10.0, 72)
        found.append(font)
    return found


@cache
def _advance(character: str) -> float | None:
    """Width at one point of size, in points; None if no font has the character."""
    for font in _fonts():
        if font.get_char_index(ord(character)):
            return font.load_char(ord(character)).linearHoriAdvance / 65536 / 10.0
    return None


@cache
def _stand_in(character: str) -> str:
    """What to draw for a run of characters like this one that no font has; empty for one that can be drawn."""
    if _advance(character) is not None:
        return ""
    if not character.isalpha():
        return "□"
    script = unicodedata.name(character, "?").split()[0]
    return f"[{script if script == 'CJK' else script.capitalize()}]"


def fitted(text: str, size: float, width: float, lines: int) -> str:
    """`text` in at most `lines` lines, with an ellipsis where it is cut.

    Control characters become blanks. Letters that no installed font has are named by their script, such as [CJK], and
    other such characters become a box.

    Args:
        size: of the font, points. width: of a line, inches.
    """
    room = width * _POINTS_PER_INCH / size
    clean = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    clean = "".join(stand_in or "".join(run) for stand_in, run in groupby(clean, _stand_in))
    found: list[str] = []
    rest = clean
    while rest and len(found) < lines:
        last = len(found) == lines - 1
        line, rest = _first_line(rest, room)
        if last and rest:
            line = _first_line(f"{line} {rest}", room - (_advance("…") or 1.0), anywhere=True)[0].rstrip() + "…"
        found.append(line)
    return "\n".join(found)


def _first_line(text: str, room: float, *, anywhere: bool = False) -> tuple[str, str]:
    """What fits into `room` (in units of the font's size) and the rest; breaks at a blank where there is one."""
    used = 0.0
    for i, character in enumerate(text):
        used += _advance(character) or 0.0
        if used > room:
            blank = text.rfind(" ", 0, i + 1)
            if anywhere or blank <= 0:
                return text[: max(i, 1)], text[max(i, 1) :]
            return text[:blank], text[blank + 1 :]
    return text, ""
