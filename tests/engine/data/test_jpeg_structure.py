"""What passes the check is a picture for the CPU decoder, whatever was done to the file; ordinary files do pass."""

from __future__ import annotations

import os
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from farl_engine.data import BadImage, CpuDecoder
from farl_engine.data.jpeg_structure import plain_jpeg_size

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def exif(orientation: int | None = None) -> Image.Exif:
    tags = Image.Exif()
    tags[0x010F] = "a camera"
    if orientation is not None:
        tags[0x0112] = orientation
    return tags


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def after_start(jpeg: bytes, content: bytes) -> bytes:
    return jpeg[:2] + content + jpeg[2:]


ORDINARY = [
    {},
    {"progressive": True},
    {"subsampling": 0},
    {"subsampling": 1},
    {"optimize": True},
    {"restart_marker_blocks": 2},
    {"progressive": True, "restart_marker_rows": 1},
    {"exif": exif()},
    {"exif": exif(1)},
    {"comment": b"made by hand"},
    {"icc_profile": b"\0" * 70_000},
    {"xmp": b'<rdf:Description tiff:Orientation="1"/>'},
]


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", ORDINARY, ids=lambda options: "-".join(map(str, options)) or "plain")
def test_ordinary_jpegs_pass(encode, picture, options, mode):
    # Pillow gives gray files sampling factors, too, about which decoders may disagree.
    options = {name: value for name, value in options.items() if name != "subsampling" or mode == "RGB"}
    data = encode(picture(50, 37).convert(mode), **options)
    assert plain_jpeg_size(data) == (50, 37)
    assert plain_jpeg_size(data + b"trailing") == (50, 37)


def test_camera_metadata_in_either_byte_order(encode, picture):
    jpeg = encode(picture(40, 30))
    for order, pack in ((b"II*\0", "<"), (b"MM\0*", ">")):

        def tiff(tag: int, value: int, order: bytes = order, pack: str = pack) -> bytes:
            entry = struct.pack(pack + "HHIHH", tag, 3, 1, value, 0)
            return segment(0xE1, b"Exif\0\0" + order + struct.pack(pack + "IH", 8, 1) + entry + bytes(4))

        assert plain_jpeg_size(after_start(jpeg, tiff(0x0112, 1))) == (40, 30)
        assert plain_jpeg_size(after_start(jpeg, tiff(0x0113, 6))) == (40, 30)
        assert plain_jpeg_size(after_start(jpeg, tiff(0x0112, 6))) is None
        assert plain_jpeg_size(after_start(jpeg, tiff(0x0112, 1) + tiff(0x0112, 6))) is None


def test_what_the_cpu_decoder_has_to_see(encode, picture):
    jpeg = encode(picture(60, 50))
    frame, scan, tables = jpeg.index(b"\xff\xc0"), jpeg.index(b"\xff\xda"), jpeg.index(b"\xff\xc4")
    body = scan + 14
    left = {
        "nothing": b"",
        "text": b"<html>" * 50,
        "png": encode(picture(60, 50), "PNG"),
        "cmyk": encode(picture(60, 50).convert("CMYK")),
        "turned": encode(picture(60, 50), exif=exif(6)),
        "turned by xmp": encode(picture(60, 50), xmp=b'<rdf:Description tiff:Orientation="8"/>'),
        "broken exif": encode(picture(60, 50), exif=b"Exif\0\0MM\0*\xff\xff\xff\xffgarbage"),
        "half": jpeg[: len(jpeg) // 2],
        "no end": jpeg[:-2],
        "header alone": jpeg[:body],
        "cut in a segment": jpeg[: tables + 9],
        "12 bits": jpeg[: frame + 4] + b"\x0c" + jpeg[frame + 5 :],
        "no height": jpeg[: frame + 5] + b"\0\0" + jpeg[frame + 7 :],
        "arithmetic": jpeg.replace(b"\xff\xc0", b"\xff\xc9", 1),
        "odd sampling": jpeg[: frame + 11] + b"\x41" + jpeg[frame + 12 :],
        "RGB by its ids": jpeg.replace(b"JFIF", b"JFIX").replace(b"\x03\x01\x22\0", b"\x03R\x22\0"),
        "Adobe RGB": after_start(jpeg, segment(0xEE, b"Adobe\0\x64\0\0\0\0\0")),
        "no tables": jpeg[:tables] + jpeg[scan:],
        "no quantization": jpeg.replace(b"\xff\xdb", b"\xff\xec"),
        # Two codes of one bit, so that one of them is all ones.
        "illegal codes": jpeg[: tables + 5] + b"\2\0\4" + jpeg[tables + 8 :],
        "more after the scan": jpeg[:-2] + segment(0xFE, b"a comment") + jpeg[-2:],
        "unknown table": jpeg[: scan + 6] + b"\x33" + jpeg[scan + 7 :],
        "a marker in the data": jpeg[: body + 20] + b"\xff\x42" + jpeg[body + 20 :],
        "a restart where none belongs": jpeg[: body + 20] + b"\xff\xd0" + jpeg[body + 20 :],
        "two frames": jpeg[:scan] + jpeg[frame : frame + 19] + jpeg[scan:],
        "many scans": after_start(encode(picture(60, 50), progressive=True), segment(0xFE, b"\xff\xda" * 60)),
        "bytes between segments": jpeg[:frame] + b"\0\0" + jpeg[frame:],
    }
    assert plain_jpeg_size(jpeg) == (60, 50) and jpeg[tables + 5 : tables + 8] == b"\0\1\5"
    for name, data in left.items():
        assert plain_jpeg_size(data) is None, name


def damaged(jpeg: bytes, rng: np.random.Generator) -> bytes:
    data = bytearray(jpeg)
    kind, place = rng.integers(5), int(rng.integers(2, len(data)))
    if kind == 0:
        for position in rng.integers(2, len(data), rng.integers(1, 6)):
            data[position] = rng.integers(256)
    elif kind == 1:
        data[place] ^= 1 << int(rng.integers(8))
    elif kind == 2:
        del data[place : place + int(rng.integers(1, 40))]
    elif kind == 3:
        data[place:place] = rng.bytes(int(rng.integers(1, 40)))
    else:
        run = data[place : place + 60]
        data[place : place + 60] = rng.bytes(len(run))
    return bytes(data)


def test_what_passes_is_a_picture_for_the_cpu_decoder(encode, picture):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
    kinds = [options for options in ORDINARY[:9] if "subsampling" not in options]
    seeds = [encode(noise.convert(mode), **options) for options in kinds for mode in ("RGB", "L")]
    decoder = CpuDecoder(16)
    verdicts: Counter[str] = Counter()
    for i in range(1500):
        data = damaged(seeds[i % len(seeds)], rng)
        if plain_jpeg_size(data) is not None:
            decoder.decode(data)
            verdicts["passed"] += 1
            continue
        try:
            decoder.decode(data)
            verdicts["left, good"] += 1
        except BadImage as error:
            verdicts[error.cause] += 1
    assert verdicts["passed"] > 500 and verdicts["corrupt"] + verdicts["truncated"] > 100
    assert verdicts["left, good"] < 500


@pytest.mark.skipif(not os.environ.get("FARL_DATA"), reason="FARL_DATA names no folder of photographs")
def test_photographs_pass():
    folder = Path(os.environ["FARL_DATA"])
    for kind in ("faces", "landmarks"):
        paths = sorted((folder / kind).rglob("*.jpg"))[:100]
        assert len(paths) == 100
        for path in paths:
            with Image.open(path) as image:
                assert plain_jpeg_size(path.read_bytes()) == image.size
