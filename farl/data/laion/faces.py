"""`python -m farl.data laion faces SHARDS --detections DIR --out FILE`: face boxes for `farl.train --face-boxes`."""

from __future__ import annotations

import tempfile
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro
from numpy.typing import NDArray

from farl import cli
from farl.data.laion.detections import WIDTH, Detections, load_detections
from farl.data.laion.downloads import numbers, read_downloads, strings, turned
from farl.progress import Progress
from farl_engine.data.face_crop import write_face_boxes

if TYPE_CHECKING:
    from farl_engine.data import ShardIndex

PROG = "farl.data laion faces"
DESCRIPTION = """Makes one file of face boxes, points and scores, a row a sample of SHARDS in the order of their index.

Run it after `filter`, with the same SHARDS as training's --data: the file names the data that it is of, and training
refuses it with other data. A sample without a face that can be trusted has none, and is cropped as without the file."""
_COLUMNS = ("SAMPLE_ID", "width", "height", "original_width", "original_height", "exif")
# Of a box's area; where less lies inside the image, the image is not the one in which the face was found.
_LEAST_INSIDE = 0.5


@dataclass(frozen=True)
class FacesOptions:
    shards: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SHARDS")]
    """Shards, written as in training's --data."""
    detections: str
    """Folder of LAION-Face's sample2detect_N.pth."""
    out: str
    """File to write."""
    min_score: float = 0.9
    """Faces with a lower score do not count."""
    workers: int = 1
    """Files of detections read at once, the first time; each takes about 3 GB."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"--workers is {self.workers}: wanted 1 or more")


def make_faces(options: FacesOptions) -> dict[str, Any]:
    """Writes the file and returns its counts by cause, "face" among them.

    Raises:
        ValueError: shards, files beside them, or detections that do not fit. OSError: a file cannot be written.
    """
    from farl.shards import parse_sources
    from farl_engine.data import ShardIndex

    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    detections = load_detections(Path(options.detections), options.workers)
    # As training puts its sources together.
    sources = parse_sources(options.shards)
    index = ShardIndex.concatenate([ShardIndex.build(source.patterns, progress=Progress) for source in sources])
    counts: Counter[str] = Counter()
    # Three gigabytes for 50 million samples: on disk rather than in memory.
    with tempfile.NamedTemporaryFile(dir=out.parent, prefix=f".{out.name}.", suffix=".tmp") as scratch:
        faces = np.memmap(scratch.name, np.float32, "w+", shape=(len(index), WIDTH))
        with Progress(len(index), "placing faces") as progress:
            for shard, rows in enumerate(shard_ranges(index)):
                found, causes = _shard_faces(index, shard, rows, detections, options.min_score)
                faces[rows.start : rows.stop] = found
                counts.update(causes)
                progress.update(len(rows))
        if counts["unknown_sample"] == len(index):
            raise ValueError(
                f"nothing beside the shards {options.shards} or in them tells their samples' SAMPLE_ID: "
                "download with the command of `farl.data laion command`"
            )
        result = {
            "counts": dict(counts.most_common()),
            "min_score": options.min_score,
            "ambiguous_ids": detections.ambiguous,
            "damaged_entries": detections.damaged,
        }
        plain = np.asarray(faces)
        write_face_boxes(out, plain[:, :4], plain[:, 4:14], plain[:, 14], {**result, "fingerprint": index.fingerprint})
    return {"samples": len(index), **result}


def shard_ranges(index: ShardIndex) -> list[range]:
    """The samples of each shard."""
    ids = range(len(index))
    starts = [bisect_left(ids, shard, key=index.shard_of) for shard in range(len(index.shard_names))]
    return [range(first, last) for first, last in zip(starts, [*starts[1:], len(index)], strict=True)]


def _shard_faces(
    index: ShardIndex, shard: int, rows: range, detections: Detections, min_score: float
) -> tuple[NDArray[np.float32], list[str]]:
    """Faces of a shard's samples as shares of the image, float32 [n, 15], and "face" or the cause for none of each."""
    if not rows:
        return np.empty((0, WIDTH), np.float32), []
    table = read_downloads(index.shard_paths[shard], _COLUMNS)
    if not len(table) or "SAMPLE_ID" not in table.column_names:
        return np.full((len(rows), WIDTH), np.nan, np.float32), ["unknown_sample"] * len(rows)
    place = {key: i for i, key in enumerate(strings(table, "key"))}
    order = np.fromiter((place.get(index.key(i), -1) for i in rows), np.int64, len(rows))
    ids = numbers(table, "SAMPLE_ID")[order]
    sizes = [_sizes(table, names)[order] for names in (("width", "height"), ("original_width", "original_height"))]
    return shares(detections.find(ids), sizes[0], sizes[1], turned(table)[order], order < 0, min_score)


def _sizes(table: Any, names: tuple[str, str]) -> NDArray[np.int64]:
    known = set(names) <= set(table.column_names)
    return np.stack([numbers(table, name) for name in names], 1) if known else np.full((len(table), 2), -1, np.int64)


def shares(
    faces: NDArray[np.float32],
    size: NDArray[np.int64],
    original_size: NDArray[np.int64],
    is_turned: NDArray[np.bool_],
    unknown: NDArray[np.bool_],
    min_score: float,
) -> tuple[NDArray[np.float32], list[str]]:
    """Faces in pixels of the original image as shares of the stored one.

    A sample gets no face, for the first of these causes: `unknown_sample`, `no_face` found, `low_score`,
    `unknown_size`, `turned` (EXIF turns the image; whether it did for the detector is not known), `reframed` (the
    stored image is cropped or padded), `outside` (the box is not inside the image, which is another one by now).

    Args:
        faces: float32 [n, 15] in pixels of the original image, NaN for none.
        size, original_size: int64 [n, 2], width and height of the stored image and before any resizing; -1 if unknown.
        is_turned: whether EXIF turns it. unknown: samples that nothing is known of.

    Returns:
        float32 [n, 15] with boxes inside 0..1, NaN where there is no face; and "face" or the cause of each.
    """
    original_size = np.where((original_size > 0).all(1, keepdims=True), original_size, size)
    scale = original_size.astype(np.float32)
    scaled = faces.copy()
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled[:, :14] /= np.tile(scale, 7)
        clipped = np.clip(scaled[:, :4], 0, 1)
        inside = _area(clipped) / _area(scaled[:, :4])
    off_ratio = np.abs(size[:, 0] * original_size[:, 1] - size[:, 1] * original_size[:, 0])
    causes = np.full(len(faces), "face", "<U16")
    # From the last to the first, so that the first stands.
    for cause, bad in (
        ("outside", ~(inside >= _LEAST_INSIDE)),
        # One pixel of rounding on either side is no other frame.
        ("reframed", off_ratio > original_size.sum(1)),
        ("turned", is_turned),
        ("unknown_size", (scale <= 0).any(1)),
        ("low_score", ~(faces[:, 14] >= min_score)),
        ("no_face", np.isnan(faces[:, 14])),
        ("unknown_sample", unknown),
    ):
        causes[bad] = cause
    scaled[:, :4] = clipped
    scaled[causes != "face"] = np.nan
    return scaled, causes.tolist()


def _area(box: NDArray[Any]) -> NDArray[Any]:
    return (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])


def summary(result: dict[str, Any], out: str) -> str:
    """What a person reads at the end."""
    lines = [f"{out}: {result['samples']:,} samples"]
    lines += [f"  {cause:<16} {count:>12,}" for cause, count in result["counts"].items()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int | None:
    options = cli.parse(FacesOptions, argv, prog=PROG, description=DESCRIPTION)
    print(summary(make_faces(options), options.out))
    return 0
