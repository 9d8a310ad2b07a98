"""`python -m farl.faces --out DIR`: draws the embedded faces into shards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from farl import cli
from farl.faces.shards import FaceSet, write_faces
from farl.faces.sheet import sample_sheet
from farl.progress import Progress


@dataclass(frozen=True)
class Options:
    out: str
    """Folder for the shards and the attribute tables; made if absent."""
    train: int = 4000
    """Faces to train on."""
    val: int = 500
    """Held-out faces; none of them is a training face, whatever --train says."""
    size: int = 96
    """Side of the images in pixels."""
    seed: int = 0
    """Another seed gives other people."""
    samples_per_shard: int = 1000
    """Faces in each shard but the last."""
    workers: int | None = None
    """Drawing processes; 0 draws in this process. Default: one a core. The files do not depend on it."""
    overwrite: bool = False
    """Replace shards that --out holds already."""
    sheet: bool = True
    """Also draw sheet.png: some faces with masks, landmarks and captions."""


def main(argv: list[str] | None = None) -> int | None:
    options = cli.parse(
        Options,
        argv,
        prog="farl.faces",
        description="Draw faces with captions, masks, landmarks and attributes, and write them as webdataset shards.",
    )
    faces = FaceSet(options.train, options.val, options.size, options.seed, options.samples_per_shard)
    with Progress(options.train + options.val, "drawing faces", unit="faces") as bar:
        new = write_faces(options.out, faces, workers=options.workers, overwrite=options.overwrite, progress=bar.update)
    if not new:
        print(f"{options.out}: already there (--overwrite draws it again)")
        return 0
    if options.sheet:
        sample_sheet(Path(options.out) / "sheet.png", 2, 6, seed=options.seed)
    print(f"{options.out}: {options.train} training and {options.val} held-out faces of {options.size} px")
    return 0


if __name__ == "__main__":
    cli.run(main, "farl.faces")
