"""`python -m farl.data laion sample --out DIR`: drawn faces in all the formats that the steps read.

DIR then holds what the internet would give: the id list, LAION-400M's metadata, detections, and in web/ the images
behind the URLs. With --download it plays img2dataset: it "fetches" the URLs of selected parts from web/ into shards.
The faces are drawn (see farl.faces); among them are the usual faults.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from farl import cli
from farl.progress import Progress

PROG = "farl.data laion sample"
DESCRIPTION = """Draws a small sample in the formats of LAION-Face, to try the steps offline.

Without --download: ids, metadata, detections and images into OUT. With --download PARTS: shards as img2dataset makes
them into OUT, of the parts that `laion select` wrote and the images in --web."""
_PARTS = 2
_FACE_SIZE = 96
_SHARD_ROWS = 20
_URL = "https://images.example/{}.jpg"
_CANVAS = ((96, 96), (200, 120), (110, 190), (260, 130), (150, 150))


@dataclass(frozen=True)
class SampleOptions:
    out: str
    """Folder to write."""
    images: int = 96
    """Images behind URLs; the id list names about as many."""
    download: str = ""
    """Folder of parts; play img2dataset on them instead."""
    web: str = ""
    """Folder of images that stands for the web, for --download."""

    def __post_init__(self) -> None:
        if not 16 <= self.images <= 100_000:
            raise ValueError(f"--images is {self.images}: wanted 16 to 100,000")
        if bool(self.download) != bool(self.web):
            raise ValueError("--download and --web go together: give both or neither")


def write_sources(out: Path, images: int) -> None:
    """laion_face_ids.pth, laion400m-meta/, detections/ and web/ in a folder."""
    import pyarrow
    import pyarrow.parquet
    import torch

    for name in ("laion400m-meta", "detections", "web"):
        (out / name).mkdir(parents=True, exist_ok=True)
    rows: list[list[dict[str, Any]]] = [[] for _ in range(_PARTS)]
    ids: list[list[int]] = [[] for _ in range(32)]
    detections: list[dict[int, list[Any]]] = [{} for _ in range(_PARTS)]
    previous = None
    with Progress(images, "drawing", unit="images") as progress:
        for number in range(images):
            part, sample_id = number % _PARTS, 1_060_015_000_000 + 7919 * number
            image, caption, faces = _web_image(number, previous)
            previous = image, caption, faces
            if number % 12 != 5:  # the others are gone from the web
                (out / "web" / f"{number}.jpg").write_bytes(_encoded(number, image))
            width, height = image.size
            rows[part].append(_row(sample_id, _URL.format(number), caption, width, height, number))
            ids[part].append(sample_id)
            if number % 10 != 7:
                detections[part][sample_id] = faces
            # LAION-400M has many rows that are not LAION-Face's.
            rows[part].append(_row(sample_id + 1, _URL.format(f"other-{number}"), "a street", 640, 480, number))
            progress.update()
    ids[0].append(999)  # an id that the metadata lacks
    torch.save(ids, out / "laion_face_ids.pth")
    for part in range(_PARTS):
        table = pyarrow.Table.from_pylist(rows[part], _schema())
        pyarrow.parquet.write_table(table, out / "laion400m-meta" / f"part-{part:05d}-drawn-c000.snappy.parquet")
        torch.save(detections[part], out / "detections" / f"sample2detect_{part}.pth")


def write_downloads(parts: Path, web: Path, out: Path) -> int:
    """Shards, tables and statistics of each part as img2dataset leaves them; the number of images in them."""
    import pyarrow.parquet

    files = sorted(parts.glob("laion_face_part_*.parquet"))
    if not files:
        raise ValueError(f"{parts} holds no laion_face_part_NNNNN.parquet: make them with `farl.data laion select`")
    fetched = 0
    for file in files:
        folder = out / file.stem.replace("laion_face_part", "split")
        folder.mkdir(parents=True, exist_ok=True)
        rows = pyarrow.parquet.read_table(file).to_pylist()
        for shard, start in enumerate(range(0, len(rows), _SHARD_ROWS)):
            fetched += _write_shard(folder, shard, rows[start : start + _SHARD_ROWS], web)
    return fetched


def _web_image(number: int, previous: Any) -> tuple[Image.Image, str, list[Any]]:
    """The picture behind a URL, its caption, and what a detector says of it."""
    from farl.faces import draw

    if number % 9 == 8 or number % 11 == 10:  # the same picture again, from another place
        image, caption, faces = previous
        if number % 11 == 10:
            image = image.resize((image.width * 5 // 4, image.height * 5 // 4))
            faces = [(box * 5 / 4, points * 5 / 4, score) for box, points, score in faces]
        return image, caption, faces
    face = draw(number, size=_FACE_SIZE)
    width, height = _CANVAS[number % len(_CANVAS)]
    rng = np.random.default_rng(number)
    shift = np.array([rng.integers(width - _FACE_SIZE + 1), rng.integers(height - _FACE_SIZE + 1)])
    # A street behind the portrait, so that a crop may miss the face.
    noise = Image.fromarray(rng.integers(60, 200, (5, 7, 3), dtype=np.uint8))
    image = noise.resize((width, height), Image.Resampling.BICUBIC)
    image.paste(Image.fromarray(face.image), (int(shift[0]), int(shift[1])))
    points = face.landmarks + shift
    box = np.concatenate([points.min(0), points.max(0)]).astype(np.float32)
    five = [points[36:42].mean(0), points[42:48].mean(0), points[30], points[48], points[54]]
    score = np.float32(0.5 if number % 15 == 14 else 0.99)
    faces: list[Any] = [(box, np.array(five, np.float32), score)]
    if number % 8 == 3:  # a second, smaller find
        faces.append((box * np.float32(0.25), np.array(five, np.float32) / 4, np.float32(0.6)))
    caption = {6: "", 13: f"{face.caption} " * 30}.get(number % 25, face.caption)
    if number % 16 == 9:
        image = image.resize((image.width // 3, image.height // 3))
        faces = [(box / 3, points / 3, score) for box, points, score in faces]
    return image, caption, faces


def _encoded(number: int, image: Image.Image) -> bytes:
    exif = Image.Exif()
    if number % 13 == 4:
        exif[0x0112] = 6  # stored on its side: "Rotated 90 CW"
        image = image.transpose(Image.Transpose.ROTATE_90)
    buffer = io.BytesIO()
    quality = 60 if number % 11 == 10 else 90
    image.save(buffer, "JPEG", quality=quality, progressive=number % 7 == 2, exif=exif)
    return buffer.getvalue()


def _row(sample_id: int, url: str, caption: str, width: int, height: int, number: int) -> dict[str, Any]:
    if number % 6 == 1:  # swapped, as in part of LAION's rows
        width, height = height, width
    return {
        "SAMPLE_ID": sample_id,
        "URL": url,
        "TEXT": caption,
        "HEIGHT": height,
        "WIDTH": width,
        "LICENSE": "cc-by-2.0" if number % 20 == 19 else "?",
        "NSFW": "NSFW" if number % 24 == 11 else "UNSURE" if number % 24 == 15 else "UNLIKELY",
        "similarity": 0.3 + number % 10 / 100,
    }


def _schema() -> Any:
    import pyarrow

    kinds = {"SAMPLE_ID": "int64", "HEIGHT": "int32", "WIDTH": "int32", "similarity": "float64"}
    names = ("SAMPLE_ID", "URL", "TEXT", "HEIGHT", "WIDTH", "LICENSE", "NSFW", "similarity")
    return pyarrow.schema([(name, pyarrow.type_for_alias(kinds.get(name, "string"))) for name in names])


def _write_shard(folder: Path, shard: int, rows: list[dict[str, Any]], web: Path) -> int:
    import pyarrow
    import pyarrow.parquet

    facts = []
    status: dict[str, int] = {}
    with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for place, row in enumerate(rows):
            fact, image = _fetch(row, f"{shard:05d}{place:04d}", web)
            facts.append(fact)
            message = fact["error_message"] or "success"
            status[message] = status.get(message, 0) + 1
            if image is not None:
                members = {"jpg": image, "txt": fact["caption"].encode(), "json": json.dumps(fact, indent=4).encode()}
                for extension, content in members.items():
                    info = tarfile.TarInfo(f"{fact['key']}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(facts), folder / f"{shard:05d}.parquet")
    done = status.get("success", 0)
    stats = {"count": len(rows), "successes": done, "failed_to_download": len(rows) - done, "failed_to_resize": 0}
    (folder / f"{shard:05d}_stats.json").write_text(json.dumps({**stats, "duration": 1.0, "status_dict": status}))
    return done


def _fetch(row: dict[str, Any], key: str, web: Path) -> tuple[dict[str, Any], bytes | None]:
    """What img2dataset notes of one URL, and the image if it is there."""
    fact = {
        "url": row["URL"],
        "caption": row["TEXT"],
        "key": key,
        "status": "failed_to_download",
        "error_message": "HTTP Error 404: Not Found",
        **dict.fromkeys(("width", "height", "original_width", "original_height", "exif", "sha256")),
        **{name: row[name] for name in ("NSFW", "similarity", "LICENSE", "SAMPLE_ID")},
    }
    name = re.fullmatch(r"https://images\.example/(\d+\.jpg)", row["URL"])
    if name is None or not (web / name[1]).exists():
        return fact, None
    data = (web / name[1]).read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        exif = {"Image Orientation": "Rotated 90 CW"} if image.getexif().get(0x0112) == 6 else {}
    fact |= {"status": "success", "error_message": None, "exif": json.dumps(exif)}
    fact |= {"width": width, "height": height, "original_width": width, "original_height": height}
    return {**fact, "sha256": hashlib.sha256(data).hexdigest()}, data


def main(argv: list[str] | None = None) -> int | None:
    options = cli.parse(SampleOptions, argv, prog=PROG, description=DESCRIPTION)
    if options.download:
        count = write_downloads(Path(options.download), Path(options.web), Path(options.out))
        print(f"{options.out}: {count} images in shards")
    else:
        write_sources(Path(options.out), options.images)
        print(f"{options.out}: ids, metadata, detections and {options.images} images")
    return 0
