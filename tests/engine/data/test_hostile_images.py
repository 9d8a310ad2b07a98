"""Images made to hurt: header lies, decompression bombs, cut files. Each ends soon, in little memory, with a cause."""

from __future__ import annotations

import base64
import io
import itertools
import pickle
import struct
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from farl_engine.data import BadImage, CpuDecoder
from farl_engine.data.bad_data import CAUSES

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def verdict(data: bytes) -> str:
    """ "ok", or the cause; anything but BadImage fails the test, and so does a file that takes long."""
    start = time.thread_time()
    try:
        assert CpuDecoder(16, token_size=8).decode(data)[0].shape == (16, 16, 3)
        return "ok"
    except BadImage as error:
        assert error.cause in CAUSES and "\n" not in str(error)
        return error.cause
    finally:
        assert time.thread_time() - start < 3


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, pixels: bytes | None = None, before: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = zlib.compress(bytes(height * (3 * width + 1))) if pixels is None else pixels
    return b"\x89PNG\r\n\x1a\n" + header + before + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def tiff(width: int, height: int, *, samples: int = 1, compression: int = 1, data: bytes = bytes(64)) -> bytes:
    tags = {256: width, 257: height, 258: 8, 259: compression, 262: 1, 273: 256, 277: samples, 278: height}
    tags[279] = len(data)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return (b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)).ljust(256, b"\0") + data


def resized_header(jpeg: bytes, width: int, height: int) -> bytes:
    frame = min(place for marker in (b"\xff\xc0", b"\xff\xc2") if (place := jpeg.find(marker)) >= 0)
    return jpeg[: frame + 5] + struct.pack(">HH", height, width) + jpeg[frame + 9 :]


def test_headers_that_claim_too_much(encode):
    jpeg, gif, bmp = (
        encode(Image.new("P" if kind == "GIF" else "RGB", (64, 64)), kind) for kind in ("JPEG", "GIF", "BMP")
    )
    webp = bytearray(encode(Image.new("RGB", (64, 64)), "WEBP", lossless=True))
    webp[21:25] = (16383 | 16383 << 14).to_bytes(4, "little")
    frame = gif.index(b",")
    claims = {
        "png": png(60_000, 60_000, b""),
        "png 2^31": png(2**31 - 1, 2**31 - 1, b""),
        "jpeg": resized_header(jpeg, 65_500, 65_500),
        "gif screen": gif[:6] + struct.pack("<HH", 65_535, 65_535) + gif[10:],
        "gif frame": gif[: frame + 5] + struct.pack("<HH", 65_535, 65_535) + gif[frame + 9 :],
        "webp": bytes(webp),
        "bmp": bmp[:18] + struct.pack("<ii", 2**30, 2**30) + bmp[26:],
        "bmp upside down": bmp[:18] + struct.pack("<ii", 2**16, -(2**30)) + bmp[26:],
        "tiff": tiff(2**31, 2**31),
        "ppm": b"P6 999999 999999 255\n",
    }
    verdicts = {name: verdict(data) for name, data in claims.items()}
    assert verdicts == dict.fromkeys(claims, "too_many_pixels")


def test_sizes_within_the_cap_but_beyond_the_bytes(encode):
    jpeg, gif = encode(Image.new("RGB", (64, 64))), encode(Image.new("P", (64, 64)), "GIF")
    frame = gif.index(b",")
    assert verdict(resized_header(jpeg, 5_000, 5_000)) == "truncated"
    assert verdict(resized_header(encode(Image.new("RGB", (64, 64)), progressive=True), 5_000, 5_000)) == "truncated"
    assert verdict(png(5_000, 5_000, zlib.compress(b"x"))) == "truncated"
    assert verdict(gif[: frame + 5] + struct.pack("<HH", 5_000, 5_000) + gif[frame + 9 :]) == "truncated"
    assert verdict(tiff(5_000, 5_000)) in ("truncated", "corrupt")


def test_a_full_size_black_jpeg_is_no_lie(encode):
    # A bit a block is less than any encoder writes.
    for options in ({}, {"progressive": True}, {"subsampling": 0}, {"optimize": True}):
        assert verdict(encode(Image.new("RGB", (1500, 1400)), quality=1, **options)) == "ok"
        assert verdict(encode(Image.new("L", (1500, 1400)), quality=1, **options)) == "ok"


ZEROS = zlib.compress(bytes(100_000_000), 9)


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (png(64, 64, ZEROS), "ok"),
        (png(64, 64, before=chunk(b"zTXt", b"a\0\0" + ZEROS)), "corrupt"),
        (png(64, 64, before=chunk(b"iTXt", b"a\0\1\0\0\0" + ZEROS)), "corrupt"),
        (png(64, 64, before=chunk(b"iCCP", b"a\0\0" + ZEROS)), "corrupt"),
        (png(64, 64, before=chunk(b"tEXt", b"k\0v") * 5_000), "ok"),
        (tiff(64, 64, compression=8, data=ZEROS), "ok"),
        (tiff(64, 64, samples=65_535), "corrupt"),
    ],
    ids=["pixels", "zTXt", "iTXt", "iCCP", "chunks", "tiff", "tiff samples"],
)
def test_compressed_bombs_stay_packed(data, cause):
    tracemalloc.start()
    try:
        assert verdict(data) == cause
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()


def test_jpegs_of_very_many_scans_are_refused_undecoded(encode, picture, monkeypatch):
    jpeg = encode(picture(64, 64), progressive=True)
    last = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    assert verdict(jpeg[:-2] + last * 50 + jpeg[-2:]) == "ok"
    monkeypatch.setattr(simplejpeg, "decode_jpeg", None)
    monkeypatch.setattr(Image, "open", None)
    assert verdict(jpeg[:-2] + last * 100 + jpeg[-2:]) == "corrupt"


@pytest.mark.parametrize("format", ["JPEG", "progressive", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_cut_at_every_decile(encode, picture, format):
    image = picture(120, 90)
    data = encode(image, "JPEG", progressive=True) if format == "progressive" else encode(image, format)
    cuts = {tenth: verdict(data[: len(data) * tenth // 10]) for tenth in range(10)}
    assert cuts.pop(0) == "empty" and verdict(data) == "ok"
    assert set(cuts.values()) <= {"truncated", "corrupt"}, cuts
    if format not in ("WEBP", "TIFF"):
        # Those keep their directory or their decoder's word for it elsewhere.
        assert {cuts[tenth] for tenth in range(3, 10)} == {"truncated"}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(1_000_000),
        b"\xff" * 100_000,
        b"\xff\xd8" + b"\xff" * 100_000,
        b"\xff\xd8" + b"\xff\xe1\x00\x08Exif\0\0" * 10_000,
        b"\xff\xd8\xff\xd9",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"RIFF\xff\xff\xff\xffWEBPVP8X",
        b"P6 " + b"9" * 100_000,
        b"<!DOCTYPE html><html><head><title>404</title></head></html>",
        b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/tmp/x) run\n",
        b"%PDF-1.7\n",
        b"\x80\x04cos\nsystem\n(S'touch x'\ntR.",
    ],
    ids=lambda data: repr(data[:12]),
)
def test_what_is_no_image_has_a_cause(data):
    assert verdict(data) in ("empty", "not_an_image", "corrupt", "truncated")


def test_nothing_in_an_image_is_run(encode, tmp_path: Path):
    """Of Pillow's plugins only those that decode by themselves are asked: EPS would start Ghostscript."""
    marker = tmp_path / "run"

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (marker,)

    assert verdict(pickle.dumps(Evil())) == "not_an_image"
    assert verdict(encode(Image.new("RGB", (9, 9)), "EPS")) == "not_an_image"
    assert verdict(encode(Image.new("RGB", (9, 9)), comment=pickle.dumps(Evil()))) == "ok"
    assert not marker.exists()


# A gray ramp of 16 x 16 pixels, arithmetic-coded by libjpeg-turbo's cjpeg: sequential and progressive.
ARITHMETIC = [
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABsSFBcUERsXFhceHBsgKEIrKCUlKFE6PTBCYFVlZF9VXVtqeJmBanGQc1tdhbWGkJ6jq62rZ4C8ybqm"
    "x5moq6T/yQALCAAQABABAREA/8wABgAQEAX/2gAIAQEAAD8A+z1EzE5jviAu9KnglR4aK0gjqWRzyLQO0/3oBnGrZJe2iRa3m9z8qgnsgv/Z",
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABsSFBcUERsXFhceHBsgKEIrKCUlKFE6PTBCYFVlZF9VXVtqeJmBanGQc1tdhbWGkJ6jq62rZ4C8ybqm"
    "x5moq6T/ygALCAAQABABAREA/8wABAAQ/9oACAEBAAAAAfbHp//MAAQQBf/aAAgBAQABBQJEG3xe4/b/zAAEEAX/2gAIAQEABj8CiKhbvqd0/8wA"
    "BBAF/9oACAEBAAE/ITU+wVRl/9oACAEBAAAAELj/zAAEEAX/2gAIAQEAAT8Q1gj/APstAVxbOm+VwT19I/nk/9k=",
]


@pytest.mark.parametrize("text", ARITHMETIC, ids=["sequential", "progressive"])
def test_arithmetic_coding(text):
    ramp = np.arange(256).reshape(16, 16) % 17 * 15
    image, _ = CpuDecoder(16).decode(base64.b64decode(text))
    assert np.abs(image[..., 0].astype(int) - ramp).mean() < 10 and (image[..., 0] == image[..., 2]).all()


def test_sixteen_bit_colour_keeps_its_high_bytes():
    values = np.random.default_rng(0).integers(0, 65536, (8, 8, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.array_equal(CpuDecoder(8).decode(data)[0], values >> 8)


def test_ycck_and_cmyk_by_pillow(encode, picture):
    cmyk = picture(40, 40).convert("CMYK")
    data = encode(cmyk, "JPEG", quality=95)
    assert simplejpeg.decode_jpeg_header(data)[2] in ("CMYK", "YCCK")
    ink = CpuDecoder(40).decode(data)[0].astype(int)
    assert np.abs(ink - np.asarray(cmyk.convert("RGB"))).mean() < 6
    adobe = data.index(b"Adobe")
    ycck = bytearray(data)
    ycck[adobe + 11] = 2
    expected = Image.open(io.BytesIO(bytes(ycck))).convert("RGB")
    assert simplejpeg.decode_jpeg_header(bytes(ycck))[2] == "YCCK"
    assert np.array_equal(CpuDecoder(40).decode(bytes(ycck))[0], np.asarray(expected))


def test_an_animated_png_gives_its_first_frame(encode, picture):
    first = picture(40, 40, 1)
    data = encode(first, "PNG", save_all=True, append_images=[picture(40, 40, 2)])
    assert b"acTL" in data
    assert np.array_equal(CpuDecoder(40).decode(data)[0], np.asarray(first))


def test_orientation_behind_a_large_profile(encode, picture):
    """EXIF counts wherever it stands ahead of the pixels, also behind more profile than any fixed look-ahead."""
    exif = Image.Exif()
    exif[0x0112] = 3
    data = encode(picture(60, 40), exif=exif)
    start = data.index(b"\xff\xe1")
    profile = b"".join(b"\xff\xe2\xff\xff" + bytes([n]) * 65_533 for n in range(6))
    image = CpuDecoder(32).decode(data[:start] + profile + data[start:])[0]
    assert np.array_equal(image, CpuDecoder(32).decode(data)[0])
    upright = CpuDecoder(32).decode(encode(picture(60, 40)))[0]
    assert np.abs(image.astype(int) - upright[::-1, ::-1]).mean() < 3 < np.abs(image.astype(int) - upright).mean()


def test_a_word_in_the_pixels_is_no_metadata(encode, picture, monkeypatch):
    data = encode(picture(60, 40))
    monkeypatch.setattr(Image, "open", None)
    assert verdict(data + b"Exif\0\0tiff:Orientation") == "ok"


def test_any_start_of_a_jpeg_ends_soon(encode, picture):
    """Headers with one byte changed, each of the first 200: a picture or a cause, never another error."""
    data = encode(picture(30, 30))
    found = {
        verdict(data[:place] + bytes([value]) + data[place + 1 :])
        for place, value in itertools.product(range(200), (0, 0xFF))
    }
    assert "ok" in found and len(found) > 2
