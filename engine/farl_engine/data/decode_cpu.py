"""Encoded image bytes to a cropped, resized RGB picture on the CPU; its verdict on what is a bad image is the rule.

Path: 8-bit gray and YCbCr JPEGs that decode without a single warning go through simplejpeg; everything else, and
whatever simplejpeg refuses, through Pillow. The crop is cut out first and then resized by torch's uint8 kernels, which
are five times faster than Pillow's and nearly always equal to them: bicubic and antialiased, and for the token picture
Lanczos (Pillow's where torch, before 2.12, has none). They write straight into the output and run in the caller's
thread; nothing here starts others.

One stated result for each kind of image: EXIF (or XMP) orientation is applied; CMYK and YCCK by Pillow's conversion,
without colour profiles; gray is repeated to three channels; 16-bit gray is scaled to 8 bits; 16-bit colour keeps its
high bytes; transparency, palettes' included, is laid over white; of animations and multi-picture files the first
frame is taken.
"""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, MpoImagePlugin, TiffImagePlugin, WebPImagePlugin

from farl_engine.data.augment import CENTER, Plan, color_jitter
from farl_engine.data.bad_data import BadImage
from farl_engine.data.jpeg_structure import fills

MAX_PIXELS = 1 << 25

# Plugins beyond Pillow's basic set register themselves when imported; here, so that threads need not race for it.
_PLUGINS = (MpoImagePlugin, TiffImagePlugin, WebPImagePlugin)

# Pillow warns of odd metadata in words that differ from file to file, so a run over web images would print without
# end.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
# Sizes are judged by `max_pixels`.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# A JPEG is decoded at 1/2, 1/4 or 1/8 size where the crop then still has this many times the output's side.
_REDUCED_MARGIN = 1.25
_REDUCTIONS = (8, 4, 2)
_PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_MAGICS = (b"\xff\xd8", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"P5", b"P6", b"RIFF")
_ORIENTATION_TAG = 0x0112
# Where the segments ahead of the pixels do not line up, EXIF and XMP are looked for in this many bytes.
_METADATA_BYTES = 1 << 18
# Each scan of a JPEG passes over all of its pixels, and a few bytes may make one; encoders write about ten.
_MAX_SCANS = 100
# The frame header's marker says how a JPEG is coded.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL = frozenset({0xC0, 0xC1, 0xC9})
_ARITHMETIC = frozenset(range(0xC9, 0xD0)) - {0xCC}
_START_OF_SCAN = 0xDA

# A buffer a thread, because fresh memory costs a fifth of the decoding of a large JPEG; larger ones are not kept.
_BUFFER_BYTES = 1 << 23
_local = threading.local()

_BICUBIC = torch.ops.aten._upsample_bicubic2d_aa.out
_LANCZOS = torch.ops.aten._upsample_lanczos2d_aa.out if hasattr(torch.ops.aten, "_upsample_lanczos2d_aa") else None


class CpuDecoder:
    """Decodes, crops and resizes one image at a time. Stateless, so threads may share one.

    Args:
        image_size: side S of the output.
        token_size: side T of a second output from the same box (Lanczos), for tokenizers that see a smaller picture.
        max_pixels: images with more pixels are refused from their header, before decoding.
        reduce: decode JPEGs at 1/2, 1/4 or 1/8 size where the crop is large enough; False always decodes them fully.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self, image_size: int, token_size: int | None = None, max_pixels: int = MAX_PIXELS, *, reduce: bool = True
    ) -> None:
        for name, value in (("image_size", image_size), ("token_size", token_size), ("max_pixels", max_pixels)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.image_size = image_size
        self.token_size = token_size
        self.max_pixels = max_pixels
        self.reduce = reduce

    def decode(
        self, data: bytes, plan: Plan = CENTER, parameters: NDArray[np.float64] | Sequence[float] | None = None
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
        """The picture that `plan` cuts out of an encoded image.

        Args:
            data: the encoded image.
            plan: crop, flip and jitter.
            parameters: the sample's row of `plan.parameters(...)`; None takes the central crop.

        Returns:
            uint8 [S, S, 3], and uint8 [T, T, 3] of the same box and flip, or None without `token_size`.

        Raises:
            BadImage: with the cause.
        """
        image = np.empty((self.image_size, self.image_size, 3), np.uint8)
        tokens = None if self.token_size is None else np.empty((self.token_size, self.token_size, 3), np.uint8)
        self.decode_into(data, plan, parameters, image, tokens)
        return image, tokens

    def decode_into(
        self,
        data: bytes,
        plan: Plan,
        parameters: NDArray[np.float64] | Sequence[float] | None,
        image: NDArray[np.uint8],
        tokens: NDArray[np.uint8] | None,
    ) -> None:
        """As `decode`, but writes into the given arrays: uint8 [S, S, 3], and [T, T, 3] with a `token_size`.

        Where it raises BadImage, they are as before.
        """
        crop = self._crop(data, plan, parameters)
        factors, mirror = plan.jitter(parameters), plan.flips(parameters)
        _write(_resize_bicubic, crop, image, factors, mirror)
        if tokens is not None:
            _write(_resize_lanczos, crop, tokens, factors, mirror)

    def _crop(
        self, data: bytes, plan: Plan, parameters: NDArray[np.float64] | Sequence[float] | None
    ) -> NDArray[np.uint8]:
        """The box's pixels, uint8 [h, w, 3] contiguous, possibly at reduced size."""
        if not data:
            raise BadImage("empty", "0 bytes")
        if data[:2] == b"\xff\xd8":
            try:
                crop = self._crop_jpeg(data, plan, parameters)
            except ValueError as refusal:
                if isinstance(refusal, BadImage):
                    raise
                crop = None
            if crop is not None:
                return crop
        pixels, orientation = self._decode_pillow(data)
        pixels = _upright(pixels, orientation)
        return _cut(pixels, plan.box(parameters, pixels.shape[1], pixels.shape[0]))

    def _crop_jpeg(
        self, data: bytes, plan: Plan, parameters: NDArray[np.float64] | Sequence[float] | None
    ) -> NDArray[np.uint8] | None:
        """As `_crop`, for ordinary JPEGs; None for the others, ValueError at the slightest fault."""
        metadata_end, coding, single_scan = _read_markers(data)
        if not single_scan and (scans := data.count(b"\xff\xda")) > _MAX_SCANS:
            raise BadImage("corrupt", f"a JPEG of {scans} scans")
        *size, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        height, width = map(int, size)
        self._check_pixels(width, height)
        if coding not in _ARITHMETIC and not fills(data, width, height):
            raise BadImage("truncated", f"{len(data)} bytes cannot hold {width} x {height} pixels")
        if colorspace not in ("YCbCr", "Gray"):
            return None
        orientation = 1
        if data.find(b"Exif\0\0", 0, metadata_end) >= 0 or data.find(b"tiff:Orientation", 0, metadata_end) >= 0:
            orientation = _jpeg_orientation(data)
        if orientation != 1:
            pixels = _upright(_decode_jpeg(data, height, width), orientation)
            return _cut(pixels, plan.box(parameters, pixels.shape[1], pixels.shape[0]))
        box = plan.box(parameters, width, height)
        reduction = self._reduction(box)
        if reduction > 1:
            box = tuple(edge // reduction for edge in box)
        return _cut(_decode_jpeg(data, -(-height // reduction), -(-width // reduction)), box)

    def _reduction(self, box: tuple[int, int, int, int]) -> int:
        """How many times smaller the JPEG may be decoded: the box must fall on whole pixels and keep the margin."""
        x0, y0, x1, y1 = box
        needed = max(self.image_size, self.token_size or 0) * _REDUCED_MARGIN
        for reduction in _REDUCTIONS if self.reduce else ():
            if min(x1 - x0, y1 - y0) >= reduction * needed and not any(edge % reduction for edge in box):
                return reduction
        return 1

    def _check_pixels(self, width: int, height: int) -> None:
        if width * height > self.max_pixels:
            raise BadImage("too_many_pixels", f"{width} x {height} is more than {self.max_pixels} pixels")

    def _decode_pillow(self, data: bytes) -> tuple[NDArray[np.uint8], int]:
        """Pixels as stored, uint8 [H, W, 3], and the EXIF orientation."""
        try:
            with Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS) as image:
                self._check_pixels(*image.size)
                image.load()
                return _to_rgb(image), _orientation(image)
        except BadImage:
            raise
        except Image.DecompressionBombError as error:
            raise BadImage("too_many_pixels", str(error)) from None
        except Image.UnidentifiedImageError:
            if data.startswith(_MAGICS):
                raise BadImage("corrupt", "the start of an image, but no readable header") from None
            raise BadImage("not_an_image", f"starts with {data[:16]!r}") from None
        # Pillow's parsers raise nearly anything on hostile input: SyntaxError, struct.error, KeyError, EOFError, ...
        except Exception as error:
            cause = "truncated" if "truncated" in str(error).lower() else "corrupt"
            raise BadImage(cause, f"{type(error).__name__}: {error}") from None


def _read_markers(data: bytes) -> tuple[int, int, bool]:
    """Where a JPEG's metadata ends, its frame's marker (0 where none is found), and whether one scan is all it has."""
    position, frame, components = 2, 0, 0
    while position + 10 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == _START_OF_SCAN:
            return position, frame, frame in _SEQUENTIAL and data[position + 4] == components
        if marker in _FRAMES:
            frame, components = marker, data[position + 9]
        position += 2 + (data[position + 2] << 8 | data[position + 3])
    return _METADATA_BYTES, frame, False


def _decode_jpeg(data: bytes, height: int, width: int) -> NDArray[np.uint8]:
    """Pixels uint8 [height, width, 3], valid until this thread's next call; ValueError at the slightest fault.

    A size of 1/2, 1/4 or 1/8, rounded up, is met exactly by scaling so, and by no smaller scale.
    """
    buffer = None
    if height * width * 3 <= _BUFFER_BYTES:
        if not hasattr(_local, "buffer"):
            _local.buffer = np.empty(_BUFFER_BYTES, np.uint8)
        buffer = _local.buffer
    return simplejpeg.decode_jpeg(data, min_height=height, min_width=width, buffer=buffer)


def _jpeg_orientation(data: bytes) -> int:
    """EXIF orientation of an encoded JPEG; ValueError where Pillow does not even open it."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return _orientation(image)
    except Exception as error:
        raise ValueError(f"no readable header: {error}") from error


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8 (also from XMP, as Pillow reads it); 1 where it is absent or unreadable."""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """A view of [H, W, 3] pixels turned as EXIF says."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    # Rows run the other way in 3, 4, 7 and 8, columns in 2, 3, 6 and 7.
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _cut(pixels: NDArray[np.uint8], box: tuple[int, ...]) -> NDArray[np.uint8]:
    x0, y0, x1, y1 = box
    # A copy, not ascontiguousarray: torch takes neither the negative strides of 1-pixel sides nor read-only memory.
    return pixels[y0:y1, x0:x1].copy()


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Any mode that Pillow opens to uint8 [H, W, 3]."""
    if image.mode == "F":
        raise BadImage("unsupported", "floating-point pixels")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion saturates; mode I holds 16-bit values here, of PNG and PGM.
        gray = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return np.repeat(((gray + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return np.asarray(Image.alpha_composite(white, layer).convert("RGB"))
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _write(
    resize: Callable[[NDArray[np.uint8], NDArray[np.uint8]], None],
    crop: NDArray[np.uint8],
    out: NDArray[np.uint8],
    factors: tuple[float, float, float] | None,
    mirror: bool,
) -> None:
    """The resized, jittered and mirrored crop into `out`."""
    if factors is None and not mirror:
        return resize(crop, out)
    picture = np.empty_like(out)
    resize(crop, picture)
    if factors is not None:
        picture = color_jitter(picture, factors)
    # Channel by channel numpy's inner loop is a row; over whole pixels it is 3 bytes, four times slower.
    for channel in range(3):
        out[..., channel] = picture[:, ::-1, channel] if mirror else picture[..., channel]
    return None


def _resize_bicubic(pixels: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    _BICUBIC(_channels_last(pixels), list(out.shape[:2]), False, None, None, out=_channels_last(out))


def _resize_lanczos(pixels: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    if _LANCZOS is None:
        resized = Image.fromarray(pixels).resize((out.shape[1], out.shape[0]), Image.Resampling.LANCZOS)
        out[...] = np.asarray(resized)
    else:
        _LANCZOS(_channels_last(pixels), list(out.shape[:2]), False, None, None, out=_channels_last(out))


def _channels_last(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """[H, W, 3] as [1, 3, H, W] of the same memory, in the layout of torch's vectorised kernels."""
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]
