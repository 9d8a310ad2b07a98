"""Which JPEGs a decoder of whole batches may take: a walk over their markers that decodes nothing.

A file passes when libjpeg has no reason left to give up on it: header, tables and scans are complete and legal, the
compressed data holds no marker but restarts, and the end marker is there. What is then still wrong can only be in the
compressed bits, where libjpeg goes on with a warning, so that the CPU decoder's verdict is known to be "a picture".
That Pillow, which gets such files there, opens their headers too is tested on damaged files, not proven.
Everything rare is left to the CPU decoder as well: it need not be bad, only unusual.
"""

from __future__ import annotations

import re
from functools import lru_cache

# Compressed data holds FF 00 for FF, runs of FF as padding, and restart markers.
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_NEXT_MARKER_NO_RESTARTS = re.compile(rb"\xff[^\x00\xff]")

_SOF_BASELINE, _SOF_EXTENDED, _SOF_PROGRESSIVE = 0xC0, 0xC1, 0xC2
_DHT, _EOI, _SOS, _DQT, _DRI = 0xC4, 0xD9, 0xDA, 0xDB, 0xDD
_APP0, _APP1, _APP14, _COM = 0xE0, 0xE1, 0xEE, 0xFE
# Other applications' segments and comments.
_SKIPPED = frozenset({*range(0xE2, 0xEE), 0xEF, _COM})
# Encoders write about ten scans; each costs a decoder a pass over all pixels, so more are for the CPU decoder to judge.
_MAX_SCANS = 50

# Luma's sampling factors where chroma's are 1 x 1: 4:4:4, 4:2:2, 4:2:0 and 4:4:0.
_LUMA_SAMPLINGS = frozenset({0x11, 0x21, 0x22, 0x12})
_ORIENTATION_TAG = {b"II": b"\x12\x01", b"MM": b"\x01\x12"}
_UPRIGHT = {b"II": b"\x12\x01\x03\x00\x01\x00\x00\x00\x01\x00", b"MM": b"\x01\x12\x00\x03\x00\x00\x00\x01\x00\x01"}


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG that is safe to hand on; None for all other bytes.

    Such a file is 8-bit gray or YCbCr in a common sampling, baseline (one scan) or progressive, upright by its EXIF
    and XMP, and sound as the module says.
    """
    if data[:2] != b"\xff\xd8":
        return None
    try:
        return _walk(data)
    # Segments that end early: struct-like reads past the end of the data.
    except IndexError:
        return None


def fills(data: bytes, width: int, height: int) -> bool:
    """Whether a Huffman-coded JPEG has the bytes that its size needs at least: a bit for each block of 8 x 8 pixels."""
    return len(data) * 8 * 64 >= width * height


def _walk(data: bytes) -> tuple[int, int] | None:
    size = None
    progressive = scanned = jfif = exif = False
    restarts = 0
    components: dict[int, int] = {}
    quantization: set[int] = set()
    huffman: set[int] = set()
    position = 2
    while True:
        if data[position] != 0xFF:
            return None
        marker = data[position + 1]
        if marker == _EOI:
            many = progressive and data.count(b"\xff\xda") > _MAX_SCANS
            return size if scanned and not many and size and fills(data, *size) else None
        start, end = position + 4, position + 2 + (data[position + 2] << 8 | data[position + 3])
        if end < start or end >= len(data):
            return None
        position = end
        if marker in _SKIPPED:
            continue
        segment = data[start:end]
        if marker == _DQT:
            tables = _quantization_tables(segment)
            if tables is None:
                return None
            quantization |= tables
        elif marker == _DHT:
            tables = _huffman_tables(segment)
            if tables is None:
                return None
            huffman |= tables
        elif marker == _APP0:
            jfif |= segment.startswith(b"JFIF\0") and len(segment) >= 14
        elif marker == _APP1:
            if not _upright(segment) or (exif and segment.startswith(b"Exif")):
                return None
            exif |= segment.startswith(b"Exif")
        elif marker == _APP14:
            # Transform 0 means RGB, or nothing where JFIF says otherwise; decoders disagree.
            if segment.startswith(b"Adobe") and (len(segment) < 12 or segment[11] != 1):
                return None
        elif marker in (_SOF_BASELINE, _SOF_EXTENDED, _SOF_PROGRESSIVE):
            if size is not None or not _frame(segment, components):
                return None
            progressive = marker == _SOF_PROGRESSIVE
            size = segment[3] << 8 | segment[4], segment[1] << 8 | segment[2]
            # Without JFIF, the ids tell YCbCr from RGB.
            if not size[0] or not size[1] or (len(components) == 3 and not jfif and [*components] != [1, 2, 3]):
                return None
        elif marker == _DRI:
            if len(segment) != 2:
                return None
            restarts = segment[0] << 8 | segment[1]
        elif marker == _SOS:
            # Of sequential files, only those with one scan.
            if (scanned and not progressive) or not _scan(segment, components, progressive, quantization, huffman):
                return None
            scanned = True
            found = (_NEXT_MARKER if restarts else _NEXT_MARKER_NO_RESTARTS).search(data, position)
            if found is None:
                return None
            position = found.start()
            if not progressive and data[position + 1] != _EOI:
                return None
        else:
            return None


def _frame(segment: bytes, components: dict[int, int]) -> bool:
    """Whether decoders agree about such a frame; fills {component id: number of its quantization table}."""
    count = segment[5]
    if segment[0] != 8 or count not in (1, 3) or len(segment) != 6 + 3 * count:
        return False
    for i in range(6, len(segment), 3):
        components[segment[i]] = segment[i + 2]
    if count == 1:
        return segment[7] == 0x11
    return len(components) == 3 and segment[7] in _LUMA_SAMPLINGS and segment[10] == segment[13] == 0x11


def _scan(
    segment: bytes, components: dict[int, int], progressive: bool, quantization: set[int], huffman: set[int]
) -> bool:
    """Whether libjpeg starts on such a scan: its components and tables exist, its parameters are legal."""
    count = segment[0]
    if not 1 <= count <= 3 or len(segment) != 4 + 2 * count:
        return False
    selectors = {segment[i]: segment[i + 1] for i in range(1, 1 + 2 * count, 2)}
    first, last, high, low = segment[-3], segment[-2], segment[-1] >> 4, segment[-1] & 15
    if progressive:
        if (high and low != high - 1) or low > 13:
            return False
        if first == 0:
            needs_dc, needs_ac = high == 0, False
            legal = last == 0
        else:
            needs_dc, needs_ac = False, True
            legal = first <= last <= 63 and count == 1
    else:
        needs_dc = needs_ac = True
        legal = count == len(components) and (first, last, high, low) == (0, 63, 0, 0)
    return (
        legal
        and len(selectors) == count
        and all(
            component in components
            and components[component] in quantization
            and (not needs_dc or tables >> 4 in huffman)
            and (not needs_ac or 0x10 | (tables & 15) in huffman)
            for component, tables in selectors.items()
        )
    )


@lru_cache(maxsize=256)
def _quantization_tables(segment: bytes) -> frozenset[int] | None:
    """Numbers of the tables in a DQT segment; None if it is broken."""
    tables, position = set(), 0
    while position < len(segment):
        wide, number = divmod(segment[position], 16)
        position += 1 + (64 << wide if wide < 2 else len(segment))
        if number > 3:
            return None
        tables.add(number)
    return frozenset(tables) if position == len(segment) else None


# Most files hold the standard tables.
@lru_cache(maxsize=256)
def _huffman_tables(segment: bytes) -> frozenset[int] | None:
    """Numbers of the tables in a DHT segment (AC tables + 16); None if it is broken, by the rules of libjpeg."""
    tables, position = set(), 0
    while position < len(segment):
        number, counts = segment[position], segment[position + 1 : position + 17]
        symbols = segment[position + 17 : position + 17 + sum(counts)]
        if number & 0xEF > 3 or len(counts) < 16 or len(symbols) != sum(counts) or len(symbols) > 256:
            return None
        code = 0
        for length, count in enumerate(counts, 1):
            code += count
            # A code of ones alone is not allowed.
            if code >= 1 << length:
                return None
            code <<= 1
        if number < 16 and symbols and max(symbols) > 15:
            return None
        tables.add(number)
        position += 17 + len(symbols)
    return frozenset(tables)


def _upright(segment: bytes) -> bool:
    """Whether an APP1 segment leaves no doubt that the picture is stored upright."""
    if segment.startswith(b"Exif\0\0"):
        order = segment[6:8]
        if order not in _ORIENTATION_TAG:
            return False
        byte_order = "little" if order == b"II" else "big"
        directory = 6 + int.from_bytes(segment[10:14], byte_order)
        first = directory + 2
        end = first + 12 * int.from_bytes(segment[directory:first], byte_order)
        if directory < 14 or end > len(segment):
            return False
        tag = _ORIENTATION_TAG[order]
        for entry in range(first, end, 12):
            if segment[entry : entry + 2] == tag:
                return segment[entry : entry + 10] == _UPRIGHT[order]
        return True
    found = segment.find(b"tiff:Orientation")
    return found < 0 or segment[found + 16 : found + 19] in (b'="1', b">1<")
