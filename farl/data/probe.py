"""What one sample is: its caption, and its image's header or, with decoding, all of it."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

from PIL import Image

from farl_engine.data import BadImage, CpuDecoder, ShardIndex
from farl_engine.data.decode_cpu import MAX_PIXELS

# What the loader's decoder takes; Pillow's other plugins are slower, rarer and less safe.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "MPO")
# The verdict does not depend on the size of the output, the time does.
_DECODE_SIZE = 32


@dataclass(frozen=True)
class Facts:
    """Of one sample; where `cause` says why it is bad, the other fields mean nothing."""

    cause: str | None = None
    format: str = ""
    width: int = 0
    height: int = 0
    progressive: bool = False
    image_bytes: int = 0
    caption: str = ""
    utf8: bool = True


class Prober:
    """Call it with a sample's position to get its facts; threads may share one. It never raises for a bad sample."""

    def __init__(self, index: ShardIndex, *, decode: bool) -> None:
        self._index = index
        self._decode = decode
        self._decoder = CpuDecoder(_DECODE_SIZE)
        # The number of pixels is checked here; Pillow would warn of it on top.
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

    def __call__(self, i: int) -> Facts:
        try:
            image, raw_caption = self._index.read(i)
        except OSError:
            return Facts(cause="unreadable")
        if not raw_caption.strip():
            return Facts(cause="missing_caption")
        try:
            caption, utf8 = raw_caption.decode(), True
        except UnicodeDecodeError:
            caption, utf8 = raw_caption.decode(errors="replace"), False
        try:
            if self._decode:
                self._decoder.decode(image)
            width, height, kind, progressive = self._header(image)
        except BadImage as error:
            return Facts(cause=error.cause)
        return Facts(None, kind, width, height, progressive, len(image), caption.strip(), utf8)

    def _header(self, image: bytes) -> tuple[int, int, str, bool]:
        """Width, height, format and whether a JPEG is progressive. Raises BadImage."""
        try:
            with Image.open(io.BytesIO(image), formats=_FORMATS) as header:
                width, height = header.size
                facts = (width, height, (header.format or "").lower(), bool(header.info.get("progressive")))
        except Exception as error:  # Pillow's parsers raise nearly anything on hostile input
            self._decoder.decode(image)  # the decoder knows the cause
            raise BadImage("unsupported", str(error)) from None
        if width * height > MAX_PIXELS:
            raise BadImage("too_many_pixels", f"{width} x {height}")
        return facts
