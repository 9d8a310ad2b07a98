"""`python -m farl.data laion command PARTS --out DIR`: the img2dataset commands for parts made by `select`."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from farl import cli

PROG = "farl.data laion command"
DESCRIPTION = """Prints a bash script that downloads each part with img2dataset (a package of its own: pip install
img2dataset). Run again, it goes on with the shards that are missing."""

# What each option is for; they are printed above the commands.
OPTIONS: tuple[tuple[str, str, str], ...] = (
    ("input_format", "parquet", ""),
    ("url_col", "URL", ""),
    ("caption_col", "TEXT", "the caption, as .txt beside each image"),
    ("output_format", "webdataset", "tars, which training reads as they are"),
    ("number_sample_per_shard", "10000", ""),
    ("resize_mode", "no", "whole images at full size: crops and face boxes refer to them"),
    ("compute_hash", "sha256", "of the downloaded bytes; finds exact duplicates without reading the images again"),
    ("extract_exif", "True", "says which images are turned; their face boxes are not used"),
    ("save_additional_columns", '["NSFW","similarity","LICENSE","SAMPLE_ID"]', "SAMPLE_ID joins the face boxes"),
    ("timeout", "10", ""),
    ("retries", "1", ""),
    ("incremental_mode", "incremental", "a second run downloads the missing shards alone"),
)
KEEP = (
    "skip_reencode",
    "True",
    "JPEGs keep their own bytes: no second loss of quality, smaller files, and EXIF still turns those that need it. "
    "They are decoded once to see that they are images; other formats become JPEG. Some are progressive, which the "
    "GPU's hardware decoder leaves to slower ones; `farl.data check` tells how many",
)
REENCODE = (
    "encode_quality",
    "95",
    "every image is encoded again as a baseline JPEG, which the GPU's hardware decoder takes; costs quality and disk, "
    "and images that EXIF turns stay on their side, because the tag is lost",
)


@dataclass(frozen=True)
class CommandOptions:
    parts: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PARTS")]
    """Folder of laion_face_part_NNNNN.parquet."""
    out: str
    """Folder for the shards: OUT/split_NNNNN/NNNNN.tar."""
    processes: int = 16
    """Processes, one a core."""
    threads: int = 128
    """Downloads at once in each process; fewer if the success rate falls."""
    reencode: bool = False
    """Let img2dataset encode every image again, as LAION-Face's own download.sh does."""

    def __post_init__(self) -> None:
        for name in ("processes", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}: wanted 1 or more")


def script(options: CommandOptions) -> str:
    """The bash script. ValueError if the folder holds no parts."""
    folder = Path(options.parts)
    names = sorted(path.name for path in folder.glob("laion_face_part_*.parquet"))
    parts = [match[1] for name in names if (match := re.fullmatch(r"laion_face_part_(\d{5})\.parquet", name))]
    if not parts:
        raise ValueError(f"{folder} holds no laion_face_part_NNNNN.parquet: make them with `farl.data laion select`")
    chosen = [*OPTIONS, REENCODE if options.reencode else KEEP]
    chosen += [
        ("processes_count", str(options.processes), ""),
        ("thread_count", str(options.threads), "needs a DNS resolver that keeps up, such as a local bind9 or knot"),
    ]
    lines = ["#!/bin/bash", "set -e"]
    lines += [f"# --{name}: {why}" for name, _, why in chosen if why]
    lines += ["options=(", *(f"    --{name} {shlex.quote(value)}" for name, value, _ in chosen), ")"]
    lines.append(f"mkdir -p {shlex.quote(options.out)}")
    for part in parts:
        source, target = folder / f"laion_face_part_{part}.parquet", Path(options.out) / f"split_{part}"
        lines.append(
            f"img2dataset --url_list {shlex.quote(str(source))} --output_folder {shlex.quote(str(target))} "
            '"${options[@]}"'
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int | None:
    print(script(cli.parse(CommandOptions, argv, prog=PROG, description=DESCRIPTION)))
    return 0
