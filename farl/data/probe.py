"""What one sample is: its caption, and its image's header or, with decoding, all of it."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

from PIL import Image

from farl.tokenizer import CONTEXT_LENGTH, ClipTokenizer
from farl_engine.data import BadImage, CpuDecoder, ShardIndex
from farl_engine.data.decode_cpu import MAX_PIXELS
from farl_engine.data.jpeg_structure import plain_jpeg_size
from farl_engine.data.samples import decode_caption

# What the loader's decoder takes; Pillow's other plugins are slower, rarer and less safe.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "MPO")
# The verdict does not depend on the size of the output, the time does.
_DECODE_SIZE = 32
_ORIENTATION_TAG = 0x0112
# A book in a .txt need not be counted to its end.
MAX_TOKENS = 1000


@dataclass(frozen=True)
class Facts:
    """Of one sample; where `cause` says why it is bad, the other fields mean nothing.

    Attributes:
        width, height: of the upright image, pixels.
        mode: Pillow's name of the pixels' kind: "RGB", "L" (gray), "CMYK", ...
        rotated: whether EXIF turns or mirrors the image.
        decoded_by: who decodes it on a GPU machine: "hardware" (the JPEG engine, for baseline JPEGs), "gpu" (other
            JPEGs that go to DALI) or "cpu".
        tokens: CLIP's, with start and end token, uncut up to `MAX_TOKENS`.
    """

    cause: str | None = None
    message: str = ""
    format: str = ""
    width: int = 0
    height: int = 0
    mode: str = ""
    progressive: bool = False
    rotated: bool = False
    decoded_by: str = "cpu"
    image_bytes: int = 0
    caption: str = ""
    utf8: bool = True
    tokens: int = 0

    @property
    def traits(self) -> list[str]:
        """Of "progressive", "gray", "cmyk", "rotated" (by EXIF), "not_utf8" and "cut" (more than 77 tokens)."""
        found = {
            "progressive": self.progressive,
            "gray": self.mode in ("1", "L", "LA", "I", "I;16", "I;16B"),
            "cmyk": self.mode == "CMYK",
            "rotated": self.rotated,
            "not_utf8": not self.utf8,
            "cut": self.tokens > CONTEXT_LENGTH,
        }
        return [trait for trait, present in found.items() if present]


class Prober:
    """Call it with a sample's position to get its facts; threads may share one. It never raises for a bad sample."""

    def __init__(self, index: ShardIndex, *, decode: bool) -> None:
        self._index = index
        self._decode = decode
        self._decoder = CpuDecoder(_DECODE_SIZE)
        self._tokenizer = ClipTokenizer()
        # The number of pixels is checked here; Pillow would warn of it on top.
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

    def __call__(self, i: int) -> Facts:
        try:
            image, raw_caption = self._index.read(i)
        except OSError as error:
            return Facts("unreadable", str(error))
        caption, repaired = decode_caption(raw_caption)
        if not caption:
            return Facts("missing_caption", "a caption of blanks")
        try:
            if self._decode:
                self._decoder.decode(image)
            width, height, mode, kind, progressive, rotated = self._header(image)
        except BadImage as error:
            return Facts(error.cause, str(error))
        decoded_by = "cpu"
        if plain_jpeg_size(image) is not None:
            decoded_by = "gpu" if progressive else "hardware"
        return Facts(
            format=kind,
            width=width,
            height=height,
            mode=mode,
            progressive=progressive,
            rotated=rotated,
            decoded_by=decoded_by,
            image_bytes=len(image),
            caption=caption,
            utf8=not repaired,
            tokens=len(self._tokenizer.encode(caption, MAX_TOKENS)),
        )

    def _header(self, image: bytes) -> tuple[int, int, str, str, bool, bool]:
        """Width, height, mode, format, whether a JPEG is progressive, and whether EXIF turns it. Raises BadImage."""
        try:
            with Image.open(io.BytesIO(image), formats=_FORMATS) as header:
                width, height = header.size
                if width * height > MAX_PIXELS:
                    raise BadImage("too_many_pixels", f"{width:,} x {height:,} pixels")
                orientation = _orientation(header)
                if orientation >= 5:
                    width, height = height, width
                kind, progressive = (header.format or "").lower(), bool(header.info.get("progressive"))
                return width, height, header.mode, kind, progressive, orientation > 1
        except BadImage:
            raise
        except Exception as error:  # Pillow's parsers raise nearly anything on hostile input
            self._decoder.decode(image)  # the decoder knows the cause
            raise BadImage("unsupported", str(error)) from None


def _orientation(header: Image.Image) -> int:
    """EXIF orientation 1..8; 1 where it is absent or unreadable, as for the decoder."""
    try:
        orientation = header.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1
