"""Encoded image bytes to a cropped, resized RGB picture on the CPU; its verdict on what is a bad image is the rule.

Path: 8-bit gray and YCbCr JPEGs that decode without a single warning go through simplejpeg; everything else, and
whatever simplejpeg refuses, through Pillow. The crop is cut out first and then resized, bicubic and antialiased, by
torch's uint8 kernel (equal to Pillow's bicubic up to 1/255, several times faster); the token picture by Pillow's
Lanczos.

One stated result for each kind of image: EXIF (or XMP) orientation is applied; CMYK and YCCK by Pillow's conversion,
without colour profiles; gray is repeated to three channels; 16-bit gray is scaled to 8 bits; 16-bit colour keeps its
high bytes; transparency, palettes' included, is laid over white; of animations and multi-picture files the first
frame is taken.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, MpoImagePlugin, TiffImagePlugin, WebPImagePlugin

from farl_engine.data.augment import CENTER, CropPlan, color_jitter
from farl_engine.data.bad_data import BadImage

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
# EXIF and XMP are APP1 segments, at most 64 KiB each, ahead of the pixels.
_METADATA_BYTES = 1 << 18


class CpuDecoder:
    """Decodes, crops and resizes one image at a time. Stateless, so threads may share one.

    Args:
        image_size: side S of the output.
        token_size: side T of a second output from the same box (Lanczos), for tokenizers that see a smaller picture.
        max_pixels: images with more pixels are refused from their header, before decoding.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, image_size: int, token_size: int | None = None, max_pixels: int = MAX_PIXELS) -> None:
        for name, value in (("image_size", image_size), ("token_size", token_size), ("max_pixels", max_pixels)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.image_size = image_size
        self.token_size = token_size
        self.max_pixels = max_pixels

    def decode(
        self, data: bytes, plan: CropPlan = CENTER, parameters: NDArray[np.float64] | Sequence[float] | None = None
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
        crop = self._crop(data, plan, parameters)
        image = _resize_bicubic(crop, self.image_size)
        tokens = None if self.token_size is None else _resize_lanczos(crop, self.token_size)
        factors = plan.jitter(parameters)
        if factors is not None:
            image = color_jitter(image, factors)
            tokens = None if tokens is None else color_jitter(tokens, factors)
        if plan.flips(parameters):
            image = image[:, ::-1].copy()
            tokens = None if tokens is None else tokens[:, ::-1].copy()
        return image, tokens

    def _crop(
        self, data: bytes, plan: CropPlan, parameters: NDArray[np.float64] | Sequence[float] | None
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
        self, data: bytes, plan: CropPlan, parameters: NDArray[np.float64] | Sequence[float] | None
    ) -> NDArray[np.uint8] | None:
        """As `_crop`, for ordinary JPEGs; None for the others, ValueError at the slightest fault."""
        *size, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        height, width = map(int, size)
        self._check_pixels(width, height)
        if colorspace not in ("YCbCr", "Gray"):
            return None
        orientation = 1
        if data.find(b"Exif\0\0", 0, _METADATA_BYTES) >= 0 or data.find(b"tiff:Orientation", 0, _METADATA_BYTES) >= 0:
            orientation = _jpeg_orientation(data)
        if orientation != 1:
            pixels = _upright(simplejpeg.decode_jpeg(data), orientation)
            return _cut(pixels, plan.box(parameters, pixels.shape[1], pixels.shape[0]))
        box = plan.box(parameters, width, height)
        reduction = self._reduction(box)
        if reduction > 1:
            # These two minima are met exactly by scaling with 1 / reduction, and by no smaller scale.
            pixels = simplejpeg.decode_jpeg(data, min_height=-(-height // reduction), min_width=-(-width // reduction))
            box = tuple(edge // reduction for edge in box)
        else:
            pixels = simplejpeg.decode_jpeg(data)
        return _cut(pixels, box)

    def _reduction(self, box: tuple[int, int, int, int]) -> int:
        """How many times smaller the JPEG may be decoded: the box must fall on whole pixels and keep the margin."""
        x0, y0, x1, y1 = box
        needed = max(self.image_size, self.token_size or 0) * _REDUCED_MARGIN
        for reduction in _REDUCTIONS:
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


def _resize_bicubic(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    # Channels-last strides keep torch on its vectorised kernel and make the result contiguous again.
    batch = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(batch, (size, size), mode="bicubic", antialias=True)
    return resized.permute(0, 2, 3, 1)[0].contiguous().numpy()


def _resize_lanczos(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.LANCZOS))
