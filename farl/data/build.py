"""`python -m farl.data build SOURCE --out DIR`: pairs of images and captions become tar shards.

Images are copied as they are, never encoded again. The same source gives the same bytes, in the same order. Shards are
written in a folder of their own and move to DIR together when all are whole, so that a crash leaves nothing half done.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from farl import cli
from farl.data.keys import in_validation, sample_key
from farl.data.sources import TABLE_SUFFIXES, Files, Sample, Skipped, read_folder, read_groups, read_table
from farl.data.tars import Tars, find_tars
from farl.progress import Progress
from farl_engine.data.bad_data import one_line

PROG = "farl.data build"
DESCRIPTION = """Writes tar shards from pairs of images and captions.

SOURCE is a folder of images with a .txt of the same name beside each (searched in depth); or a .tsv, .csv or .parquet
with a column of image paths and one of captions; or the folder of tars that img2dataset (as for LAION-Face) wrote."""
VALIDATION = "val"
EXAMPLES = 3


@dataclass(frozen=True)
class BuildOptions:
    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """Folder of images, table, or folder of tars."""
    out: str
    """Folder for the shards."""
    name: str = "train"
    """First part of the shards' names: NAME-00000.tar."""
    samples_per_shard: int = 10_000
    """Samples in a full shard."""
    max_samples: int | None = None
    """Stop after this many good samples."""
    image_column: str | None = None
    """Column of the image paths; found by its name if it is a usual one (image, path, file, ...)."""
    caption_column: str | None = None
    """Column of the captions; found by its name if it is a usual one (caption, text, ...)."""
    root: str | None = None
    """Folder that image paths start from and must stay in; by default the table's own, or SOURCE."""
    val_fraction: float = 0.0
    """Share of the groups that go to val-00000.tar, ... instead; chosen by a hash of the group's name."""
    group_column: str | None = None
    """Column whose values must not be split between train and val, such as the person. Without it an image is a group
    of its own."""
    group_csv: str | None = None
    """Another table with the group column; joined by its image column."""
    overwrite: bool = False
    """Replace shards of the same name in the folder."""

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"--val-fraction is {self.val_fraction}: wanted 0 up to but not including 1")
        if self.samples_per_shard < 1:
            raise ValueError(f"--samples-per-shard is {self.samples_per_shard}: wanted 1 or more")
        if self.max_samples is not None and self.max_samples < 1:
            raise ValueError(f"--max-samples is {self.max_samples}: wanted 1 or more")
        if not self.name or set(self.name) & set('/\\*?[]"'):
            raise ValueError(f"--name is {self.name!r}: wanted a plain file name")
        if self.val_fraction > 0 and self.name == VALIDATION:
            raise ValueError(
                f"--name {VALIDATION} is the validation split's own name: choose another or no --val-fraction"
            )
        if (self.group_column or self.group_csv) and self.val_fraction == 0:
            raise ValueError("groups only matter for a split: give --val-fraction too")
        if self.group_csv and not self.group_column:
            raise ValueError("--group-csv needs --group-column, the name of its column")


@dataclass
class Split:
    """What went into one split."""

    samples: int = 0
    image_bytes: int = 0
    shards: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What a build did; stored beside the shards as NAME.build.json."""

    source: str
    splits: dict[str, Split]
    skipped: dict[str, int]
    examples: dict[str, list[str]]

    def skip(self, row: Skipped) -> None:
        self.skipped[row.cause] = self.skipped.get(row.cause, 0) + 1
        examples = self.examples.setdefault(row.cause, [])
        if len(examples) < EXAMPLES:
            examples.append(one_line(row.where))

    @property
    def samples(self) -> int:
        return sum(split.samples for split in self.splits.values())


def build(options: BuildOptions) -> Report:
    """Does what the options say. ValueError if the source cannot be understood or gives no sample."""
    source = open_source(options)
    groups = None
    if options.group_csv is not None and options.group_column is not None:
        groups = read_groups(_existing(options.group_csv), options.group_column, options.image_column)
    splits = [options.name, *([VALIDATION] if options.val_fraction > 0 else [])]
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    old = [path for name in splits for path in sorted(out.glob(f"{name}-[0-9]*.tar"))]
    if old and not options.overwrite:
        raise ValueError(f"{old[0]} exists: choose another --out or --name, or replace it with --overwrite")

    partial = out / f".{options.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a build that was killed
    partial.mkdir()
    try:
        report = _write(options, source, groups, splits, partial)
        text = json.dumps(asdict(report), indent=1, ensure_ascii=False)
        (partial / f"{options.name}.build.json").write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
        _publish(partial, out, old)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def open_source(options: BuildOptions) -> Files | Tars:
    """The source that SOURCE names. ValueError if it is none of the three kinds."""
    source = _existing(options.source)
    if source.is_file() and source.suffix.lower() in TABLE_SUFFIXES:
        group = options.group_column if options.group_csv is None else None
        rows = read_table(
            source, image_column=options.image_column, caption_column=options.caption_column, group_column=group
        )
        return Files(rows, Path(options.root) if options.root else source.parent)
    if options.group_column and options.group_csv is None:
        raise ValueError(f"--group-column without --group-csv needs a table as SOURCE, and {source} is none")
    if source.is_file() and source.suffix == ".tar":
        return Tars([source], source.parent)
    if not source.is_dir():
        raise ValueError(f"{source} is neither a folder nor a .tsv, .csv, .parquet or .tar file")
    if tars := find_tars(source, without=Path(options.out)):
        return Tars(tars, source)
    rows = read_folder(source)
    if not rows:
        raise ValueError(f"{source} holds neither images nor tars; wanted images with a .txt beside each, or tars")
    return Files(rows, source, allowed=Path(options.root) if options.root else None)


def _write(
    options: BuildOptions, source: Files | Tars, groups: dict[str, str] | None, splits: list[str], partial: Path
) -> Report:
    from farl_engine.data import ShardWriter

    report = Report(options.source, {name: Split() for name in splits}, {}, {})
    total = len(source) if isinstance(source, Files) else None
    with contextlib.ExitStack() as stack:
        writers = {
            name: stack.enter_context(ShardWriter(partial / f"{name}-%05d.tar", options.samples_per_shard))
            for name in splits
        }
        progress = stack.enter_context(Progress(total, "writing shards"))
        for row in source:
            progress.update()
            sample = row if groups is None or isinstance(row, Skipped) else _grouped(row, groups)
            if isinstance(sample, Skipped):
                report.skip(sample)
                continue
            name = VALIDATION if in_validation(sample.group, options.val_fraction) else options.name
            writers[name].write(sample.key, {sample.extension: sample.image, "txt": sample.caption, **sample.extra})
            report.splits[name].samples += 1
            report.splits[name].image_bytes += len(sample.image)
            if report.samples == options.max_samples:
                break
    for name, writer in writers.items():
        report.splits[name].shards = [path.name for path in writer.paths]
        if writer.count == 0:
            raise ValueError(_why_empty(name, options, report))
    return report


def _grouped(sample: Sample, groups: dict[str, str]) -> Sample | Skipped:
    group = groups.get(sample_key(sample.group))
    return Skipped("missing_group", sample.group) if group is None else replace(sample, group=group)


def _why_empty(name: str, options: BuildOptions, report: Report) -> str:
    if report.samples:
        return f"no group fell into {name!r}: there are too few of them for --val-fraction {options.val_fraction}"
    causes = ", ".join(f"{cause} {count:,} (as {report.examples[cause][0]})" for cause, count in report.skipped.items())
    return f"no usable sample in {options.source}: {causes or 'it has no rows'}"


def _publish(partial: Path, out: Path, old: list[Path]) -> None:
    """Moves the finished files to `out`, over old ones of the same name; until here nothing in `out` has changed."""
    files = sorted(partial.iterdir())
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    for path in files:
        path.replace(out / path.name)
    for path in set(old) - {out / path.name for path in files}:
        path.unlink()


def _existing(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    return path


def summary(report: Report, out: str) -> str:
    """What a person reads at the end."""
    lines = []
    for name, split in report.splits.items():
        shards = f"{len(split.shards)} shard{'s' if len(split.shards) > 1 else ''}"
        pattern = Path(out) / (split.shards[0] if len(split.shards) == 1 else f"{name}-*.tar")
        lines.append(
            f"{name:<6} {split.samples:>10,} samples  {split.image_bytes / 1e6:>10,.1f} MB  {shards}  {pattern}"
        )
    skipped = sum(report.skipped.values())
    lines.append(f"skipped {skipped:,} of {skipped + report.samples:,}" + (":" if skipped else ""))
    for cause, count in report.skipped.items():
        lines.append(f"  {cause:<16} {count:>8,}  such as {'; '.join(report.examples[cause])}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int | None:
    options = cli.parse(BuildOptions, argv, prog=PROG, description=DESCRIPTION)
    text = summary(build(options), options.out)
    print(text.encode("utf-8", "backslashreplace").decode())
    return 0
