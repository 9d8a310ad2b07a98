"""Every kind of image has one stated result; made-up images here, public odd ones from FARL_DATA where it is set."""

from __future__ import annotations

import csv
import io
import os
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image, ImageOps

from farl_engine.data import CENTER, BadImage, CpuDecoder, CropPlan, decode_cpu
from farl_engine.data.bad_data import CAUSES


def reference(image: Image.Image, size: int) -> np.ndarray:
    """The central square by Pillow alone."""
    image = image.convert("RGB")
    box = CENTER.box(None, *image.size)
    return np.asarray(image.crop(box).resize((size, size), Image.Resampling.BICUBIC)).astype(int)


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference in 1/255."""
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


@pytest.mark.parametrize("size", [(64, 64), (250, 250), (90, 170), (300, 33), (33, 33)])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 40}])
def test_jpeg_equals_pillow(encode, picture, size, options):
    data = encode(picture(*size), **options)
    image, tokens = CpuDecoder(48).decode(data)
    assert image.shape == (48, 48, 3) and image.dtype == np.uint8 and image.flags.c_contiguous and tokens is None
    # Decoders differ in chroma upsampling by a rounding; the resize kernels by 1.
    assert distance(image, reference(Image.open(io.BytesIO(data)), 48)) < 0.5


@pytest.mark.parametrize(
    ("format", "mode", "options"),
    [
        ("PNG", "RGB", {}),
        ("PNG", "L", {}),
        ("PNG", "1", {}),
        ("PNG", "P", {}),
        ("WEBP", "RGB", {"lossless": True}),
        ("BMP", "RGB", {}),
        ("GIF", "P", {}),
        ("TIFF", "RGB", {}),
        ("TIFF", "CMYK", {}),
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
    ],
)
def test_formats_and_modes(encode, picture, format, mode, options):
    source = picture(60, 50).convert(mode)
    data = encode(source, format, **options)
    image, _ = CpuDecoder(32).decode(data)
    assert distance(image, reference(Image.open(io.BytesIO(data)), 32)) < 0.5
    assert distance(image, reference(source, 32)) < 6


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(encode, picture, format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(80, 50), format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    image, tokens = CpuDecoder(32, token_size=20).decode(data)
    assert distance(image, reference(upright, 32)) < 0.5
    assert distance(tokens, np.asarray(Image.fromarray(image).resize((20, 20)))) < 4
    # The box counts in upright coordinates.
    plan = CropPlan(scale=(0.3, 0.3), flip=0.0)
    row = plan.parameters(0, [1], [0])[0]
    box = plan.box(row, *upright.size)
    expected = upright.convert("RGB").crop(box).resize((32, 32), Image.Resampling.BICUBIC)
    assert distance(CpuDecoder(32).decode(data, plan, row)[0], np.asarray(expected)) < 0.5


def test_orientation_from_xmp_and_broken_exif(encode, picture):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = encode(picture(80, 50), xmp=xmp)
    upright = picture(80, 50).transpose(Image.Transpose.ROTATE_270)
    assert distance(CpuDecoder(32).decode(data)[0], reference(upright, 32)) < 6
    broken = encode(picture(80, 50), exif=b"Exif\0\0MM\0*\xff\xff\xff\xffgarbage")
    assert distance(CpuDecoder(32).decode(broken)[0], reference(picture(80, 50), 32)) < 6


def test_sixteen_bit_gray_is_scaled_not_saturated(encode):
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    for format in ("PNG", "TIFF", "PPM"):
        data = encode(Image.fromarray(values.astype(np.uint16)), format)
        image, _ = CpuDecoder(64).decode(data)
        assert np.array_equal(image[..., 0], image[..., 2])
        assert np.abs(image[..., 0] - values / 257).max() <= 0.51


def test_transparency_is_laid_over_white(encode, picture):
    for format in ("PNG", "WEBP"):
        layer = picture(40, 40).convert("RGBA")
        layer.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 40).astype(np.uint8), (40, 1))))
        image, _ = CpuDecoder(40).decode(encode(layer, format, **({"lossless": True} if format == "WEBP" else {})))
        alpha = np.asarray(layer)[..., 3:] / 255
        expected = np.asarray(layer)[..., :3] * alpha + 255 * (1 - alpha)
        assert np.abs(image - expected).max() <= 1.5
    gray = encode(Image.fromarray(np.full((9, 9, 2), (0, 0), np.uint8), "LA"), "PNG")
    assert (CpuDecoder(8).decode(gray)[0] == 255).all()
    palette = picture(20, 20).quantize(4)
    data = encode(palette, "PNG", transparency=bytes([0, 0, 0, 0]))
    assert (CpuDecoder(8).decode(data)[0] == 255).all()
    color_key = Image.new("RGB", (8, 8), (10, 20, 30))
    assert (CpuDecoder(8).decode(encode(color_key, "PNG", transparency=(10, 20, 30)))[0] == 255).all()


@pytest.mark.parametrize("format", ["GIF", "WEBP", "TIFF", "MPO"])
def test_of_several_pictures_the_first_counts(encode, picture, format):
    options = {"lossless": True} if format == "WEBP" else {}
    first = picture(40, 40, 1)
    data = encode(first, format, save_all=True, append_images=[picture(40, 40, 2)], **options)
    assert distance(CpuDecoder(32).decode(data)[0], reference(first, 32)) < 8


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (1000, 3)])
def test_tiny_and_thin_images(encode, picture, size):
    for format in ("JPEG", "PNG"):
        data = encode(picture(*size), format, **({"exif": _orientation_3()} if format == "JPEG" else {}))
        for plan in (CENTER, CropPlan()):
            row = plan.parameters(0, [0], [0])[0]
            assert CpuDecoder(16, token_size=8).decode(data, plan, row)[0].shape == (16, 16, 3)


def _orientation_3() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 3
    return exif


def bad(data: bytes, **options: int) -> str:
    with pytest.raises(BadImage) as caught:
        CpuDecoder(16, **options).decode(data)
    assert caught.value.cause in CAUSES and "\n" not in str(caught.value)
    return caught.value.cause


def test_bad_files_by_cause(encode, picture):
    jpeg, png = encode(picture(200, 200)), encode(picture(200, 200), "PNG")
    assert bad(b"") == "empty"
    assert bad(b"<!DOCTYPE html><html>404</html>" * 20) == "not_an_image"
    assert bad(b"\0" * 500) == "not_an_image"
    assert bad(b"x") == "not_an_image"
    assert bad(jpeg[: len(jpeg) // 2]) == "truncated"
    assert bad(jpeg[:-40]) == "truncated"
    assert bad(png[: len(png) // 2]) == "truncated"
    assert bad(jpeg[:4]) in ("corrupt", "truncated")
    assert bad(png[:12] + b"\xff" * 40) == "corrupt"
    assert bad(encode(Image.new("F", (9, 9)), "TIFF")) == "unsupported"


def test_an_image_under_a_wrong_name_is_an_image(encode, picture):
    # The bytes decide, not the member's extension.
    assert distance(CpuDecoder(32).decode(encode(picture(50, 50), "PNG"))[0], reference(picture(50, 50), 32)) < 0.5


def test_too_many_pixels_are_refused_before_decoding(encode, monkeypatch):
    jpeg = encode(Image.new("RGB", (400, 300)))
    png = encode(Image.new("RGB", (400, 300)), "PNG")
    assert CpuDecoder(16, max_pixels=120_000).decode(jpeg)[0].shape == (16, 16, 3)

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(simplejpeg, "decode_jpeg", never)
    monkeypatch.setattr(Image.Image, "load", never)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", never)
    for data in (jpeg, png):
        assert bad(data, max_pixels=119_999) == "too_many_pixels"


def test_a_decompression_bomb_is_refused():
    # A PNG of 60,000 x 60,000 pixels, all header.
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))
    assert bad(data, max_pixels=2**40) == bad(data) == "too_many_pixels"


def test_a_jpeg_that_pillow_does_not_open_is_bad_and_no_crash(encode, picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = bytearray(encode(picture(40, 40), exif=exif))
    size = data.index(b"\xff\xc0") + 5
    data[size : size + 4] = struct.pack(">HH", 60_000, 60_000)
    # Too large for Pillow itself, whatever the decoder's own cap; the orientation is read by Pillow.
    # The bytes behind it are as many as such a picture would need.
    assert bad(bytes(data) + bytes(8 << 20), max_pixels=2**40) == "too_many_pixels"


@pytest.mark.parametrize("side", [520, 1100])
def test_reduced_jpegs_are_near_the_full_decode(encode, picture, side, monkeypatch):
    rng = np.random.default_rng(0)
    detail = Image.fromarray(rng.integers(0, 256, (side // 4, side // 4 + 9, 3), dtype=np.uint8))
    image = Image.blend(picture(side, side + 36), detail.resize((side, side + 36), Image.Resampling.BICUBIC), 0.3)
    data = encode(image, quality=90)
    plan = CropPlan(scale=(0.95, 1.0))
    decoded_sizes = []
    whole = simplejpeg.decode_jpeg

    def spy(*args: object, **kwargs: object) -> np.ndarray:
        pixels = whole(*args, **kwargs)
        decoded_sizes.append(pixels.shape[0])
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", spy)
    for row in plan.parameters(0, np.arange(6), np.zeros(6, np.int64)):
        reduced, tokens = CpuDecoder(112, token_size=64).decode(data, plan, row)
        box = plan.box(row, *image.size)
        expected = Image.open(io.BytesIO(data)).crop(box).resize((112, 112), Image.Resampling.BICUBIC)
        expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if plan.flips(row) else expected
        assert distance(reduced, np.asarray(expected)) < 2
        small = expected.resize((64, 64), Image.Resampling.LANCZOS)
        assert distance(tokens, np.asarray(small)) < 3
    # Sides around 510 allow a half at most (the grid), those around 1,090 an eighth less the margin: a quarter.
    assert set(decoded_sizes) <= {-(-(side + 36) // 2), -(-(side + 36) // 4)}


def test_flip_mirrors_both_outputs(encode, picture):
    data = encode(picture(64, 64), "PNG")
    row = np.zeros(23)
    plain = CpuDecoder(32, token_size=16).decode(data, CropPlan(flip=0.0), row)
    flipped = CpuDecoder(32, token_size=16).decode(data, CropPlan(flip=1.0), row)
    for a, b in zip(plain, flipped, strict=True):
        assert np.array_equal(a[:, ::-1], b) and not np.array_equal(a, b)


@pytest.mark.parametrize("kernel", ["torch", "pillow"])
def test_tokens_are_lanczos_of_the_box(encode, picture, kernel, monkeypatch):
    if kernel == "pillow":
        monkeypatch.setattr(decode_cpu, "_LANCZOS", None)
    elif decode_cpu._LANCZOS is None:
        pytest.skip("this torch has no Lanczos")
    source = picture(100, 90)
    plan = CropPlan(scale=(0.5, 0.5), flip=0.0)
    row = plan.parameters(0, [4], [0])[0]
    _, tokens = CpuDecoder(32, token_size=24).decode(encode(source, "PNG"), plan, row)
    box = plan.box(row, 100, 90)
    expected = np.asarray(source.crop(box).resize((24, 24), Image.Resampling.LANCZOS))
    if kernel == "pillow":
        assert np.array_equal(tokens, expected)
    else:
        # The same filter, of 16-bit weights where Pillow's have 22.
        assert np.abs(tokens.astype(int) - expected).max() <= 1 and distance(tokens, expected) < 0.02


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (5, 9), (64, 64), (63, 130)])
@pytest.mark.parametrize("side", [1, 2, 16, 33])
def test_written_in_place(encode, picture, size, side):
    data = encode(picture(*size), "PNG")
    for flip in (0.0, 1.0):
        plan = CropPlan(scale=(1.0, 1.0), flip=flip)
        row = np.zeros(23)
        batch, token_batch = np.full((3, side, side, 3), 99, np.uint8), np.full((3, 5, 5, 3), 99, np.uint8)
        CpuDecoder(side, token_size=5).decode_into(data, plan, row, batch[1], token_batch[1])
        x0, y0, x1, y1 = plan.box(row, *size)
        crop = torch.from_numpy(np.array(Image.open(io.BytesIO(data)))[y0:y1, x0:x1]).permute(2, 0, 1)[None]
        expected = torch.nn.functional.interpolate(crop, (side, side), mode="bicubic", antialias=True)[0]
        expected = expected.flip(2) if flip else expected
        assert np.array_equal(batch[1], expected.permute(1, 2, 0)) and (batch[[0, 2]] == 99).all()
        assert (token_batch[[0, 2]] == 99).all() and not (token_batch[1] == 99).all()


def test_outputs_stay_as_they_are_when_the_image_is_bad(encode, picture):
    image, tokens = np.full((16, 16, 3), 7, np.uint8), np.full((8, 8, 3), 7, np.uint8)
    jpeg = encode(picture(80, 80))
    for data in (b"", jpeg[: len(jpeg) // 2], b"<html>"):
        with pytest.raises(BadImage):
            CpuDecoder(16, token_size=8).decode_into(data, CENTER, None, image, tokens)
    assert (image == 7).all() and (tokens == 7).all()


def test_threads_share_a_decoder(encode, picture):
    data = [encode(picture(60 + i, 50), format) for i in range(4) for format in ("JPEG", "PNG", "GIF", "TIFF", "WEBP")]
    # Large enough to be in the hands of several threads at once.
    data += [encode(picture(500, 400 + i, i)) for i in range(4)]
    decoder = CpuDecoder(32)
    expected = [decoder.decode(item)[0] for item in data]
    wrong = []

    def work() -> None:
        for item, want in zip(data * 5, expected * 5, strict=True):
            if not np.array_equal(decoder.decode(item)[0], want):
                wrong.append(len(item))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_random_damage_gives_a_picture_or_a_cause(encode, picture):
    rng = np.random.default_rng(0)
    for format in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"):
        data = encode(picture(40, 40), format)
        for _ in range(40):
            damaged = bytearray(data)
            for position in rng.integers(0, min(len(data), 400), 4):
                damaged[position] = rng.integers(256)
            try:
                assert CpuDecoder(16).decode(bytes(damaged))[0].shape == (16, 16, 3)
            except BadImage as error:
                assert error.cause in CAUSES


# What each of the 58 public odd images must give: those that are not named here give a picture.
BAD_ODD_IMAGES = {
    "pillow/broken.png": "corrupt",
    "pillow/broken_data_stream.png": "corrupt",
    "pillow/png_decompression_dos.png": "corrupt",
    "pillow/truncated_end_chunk.png": "truncated",
    "pillow/truncated_image.png": "truncated",
    "pillow/truncated_jpeg.jpg": "truncated",
    "pillow/ultrahdr.jpg": "truncated",
    "pillow/unknown_compression_method.png": "corrupt",
}


@pytest.mark.skipif(not os.environ.get("FARL_DATA"), reason="FARL_DATA names no folder of photographs")
def test_odd_images():
    folder = Path(os.environ["FARL_DATA"]) / "odd_images"
    with (folder / "manifest.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 58 and {row["file"] for row in rows} >= BAD_ODD_IMAGES.keys()
    for row in rows:
        data = (folder / row["file"]).read_bytes()
        cause = BAD_ODD_IMAGES.get(row["file"])
        if cause is None:
            image, tokens = CpuDecoder(64, token_size=48).decode(data)
            assert image.shape == (64, 64, 3) and tokens is not None and tokens.shape == (48, 48, 3)
            expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
            if row["mode"] in ("RGB", "L", "CMYK", "1") and "transparency" not in expected.info:
                assert distance(image, reference(expected, 64)) < 1.0, row["file"]
        else:
            with pytest.raises(BadImage) as caught:
                CpuDecoder(64).decode(data)
            assert caught.value.cause == cause, row["file"]
