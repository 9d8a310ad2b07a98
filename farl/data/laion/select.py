"""`python -m farl.data laion select IDS METADATA --out DIR`: LAION-Face's rows of LAION-400M's metadata."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from numpy.typing import NDArray

from farl import cli
from farl.data.laion.downloads import compute
from farl.data.laion.ids import load_ids, parse_parts, positions
from farl.progress import Progress

PROG = "farl.data laion select"
DESCRIPTION = """Joins LAION-Face's list of sample ids with LAION-400M's metadata.

Reads METADATA/part-NNNNN-*.parquet a batch at a time and writes OUT/laion_face_part_NNNNN.parquet, all columns as they
were. A part that is done is not done again. The limits save downloads; sizes in the metadata are those that LAION saw,
with width and height swapped in some rows, which does not matter for the smaller one."""
_BATCH = 1 << 16
_NEEDED = ("SAMPLE_ID", "URL", "TEXT")


@dataclass(frozen=True)
class SelectOptions:
    ids: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="IDS")]
    """laion_face_ids.pth."""
    metadata: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="METADATA")]
    """Folder of LAION-400M's parquet parts."""
    out: str
    """Folder for the parts."""
    parts: str = "all"
    """Which parts: all, 20m (the 13 parts of the 20 M subset), or numbers such as 0,2,5-7."""
    min_side: int = 0
    """Leave out images whose smaller side is below this many pixels."""
    min_caption: int = 1
    """Leave out captions with fewer characters."""
    max_caption: int = 0
    """Leave out captions with more characters; 0 for no limit."""
    drop_nsfw: str = ""
    """Tags of the NSFW column to leave out, with commas between, such as NSFW or NSFW,UNSURE."""
    min_similarity: float = 0.0
    """Leave out pairs whose CLIP similarity, as LAION measured it, is lower."""
    overwrite: bool = False
    """Make parts again that were made with other settings."""

    def __post_init__(self) -> None:
        for name in ("min_side", "min_caption", "max_caption", "min_similarity"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}: wanted 0 or more")


def select(options: SelectOptions) -> list[dict[str, Any]]:
    """Makes the parts that are missing, and returns the counts of each chosen part.

    Raises:
        ValueError: ids, metadata or settings that do not fit; FileNotFoundError: a path that is not there.
    """
    files = metadata_files(Path(options.metadata))
    limits = {name: value for name, value in asdict(options).items() if name.startswith(("min", "max", "drop"))}
    ids = load_ids(Path(options.ids))
    chosen = [part for part in parse_parts(options.parts, len(ids)) if len(ids[part])]
    if missing := [part for part in chosen if part not in files]:
        raise ValueError(
            f"{options.metadata} lacks part-{missing[0]:05d}-*.parquet: get it, or choose others with --parts"
        )
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    done, todo = {}, []
    for part in chosen:
        settings = {"limits": limits, "metadata": files[part].name, "ids": len(ids[part])}
        counts = _finished(part_path(out, part), settings)
        if counts is None or (counts["settings"] != settings and options.overwrite):
            todo.append((part, settings))
        elif counts["settings"] != settings:
            raise ValueError(
                f"{part_path(out, part)} was made with other settings: choose another --out, or add --overwrite"
            )
        else:
            done[part] = counts
    rows = sum(_open(files[part]).metadata.num_rows for part, _ in todo)
    with Progress(rows, "selecting", unit="rows") as progress:
        for part, settings in todo:
            counts = _select_part(files[part], ids[part], part_path(out, part), options, progress)
            done[part] = {**counts, "part": part, "settings": settings}
            _replace(_counts_path(part_path(out, part)), json.dumps(done[part], indent=1) + "\n")
    return [done[part] for part in chosen]


def part_path(folder: Path, part: int) -> Path:
    return folder / f"laion_face_part_{part:05d}.parquet"


def metadata_files(folder: Path) -> dict[int, Path]:
    """Number of a part -> its file, after the names `part-NNNNN-...parquet`."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: wanted that of LAION-400M's part-NNNNN-*.parquet")
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if match := re.fullmatch(r"part-(\d{5})\D.*\.parquet", path.name):
            if int(match[1]) in found:
                raise ValueError(f"{found[int(match[1])].name} and {path.name} are the same part: remove one")
            found[int(match[1])] = path
    if not found:
        raise ValueError(f"{folder} holds no part-NNNNN-*.parquet of LAION-400M's metadata")
    return found


def _select_part(
    source: Path, ids: NDArray[np.int64], target: Path, options: SelectOptions, progress: Progress
) -> dict[str, Any]:
    """Writes one part and returns its counts: ids wanted, rows found, left out by cause, kept."""
    import pyarrow
    import pyarrow.parquet

    file = _open(source)
    if missing := [name for name in _NEEDED if name not in file.schema_arrow.names]:
        raise ValueError(f"{source} has no column {missing[0]}: it is not LAION-400M's metadata")
    seen = np.zeros(len(ids), bool)
    lost: Counter[str] = Counter()
    kept = found = 0
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        with pyarrow.parquet.ParquetWriter(temporary, file.schema_arrow, compression="snappy") as writer:
            for batch in file.iter_batches(batch_size=_BATCH):
                progress.update(batch.num_rows)
                places = positions(ids, _sample_ids(batch.column("SAMPLE_ID"), source))
                rows = np.flatnonzero(places >= 0)
                found += len(rows)
                if not len(rows):
                    continue
                table = pyarrow.Table.from_batches([batch]).take(pyarrow.array(rows))
                causes = _causes(table, options, source)
                first = np.zeros(len(rows), bool)
                first[np.unique(places[rows], return_index=True)[1]] = True
                causes[(causes == "") & (seen[places[rows]] | ~first)] = "repeated_id"
                seen[places[rows]] = True
                good = causes == ""
                lost.update(causes[~good].tolist())
                kept += int(good.sum())
                writer.write_table(table.filter(pyarrow.array(good)))
        _finish(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return {"ids": len(ids), "not_found": int((~seen).sum()), "rows": found, "lost": dict(lost), "kept": kept}


def _causes(table: Any, options: SelectOptions, source: Path) -> NDArray[np.str_]:
    """Why each row is left out; "" for those that stay. The first limit that a row breaks counts."""
    pc = compute()

    causes = np.full(len(table), "", "<U16")

    def drop(cause: str, bad: Any) -> None:
        causes[(causes == "") & np.asarray(bad)] = cause

    def column(name: str) -> Any:
        if name not in table.column_names:
            raise ValueError(f"{source} has no column {name}, which a limit needs")
        return table.column(name)

    def numbers(name: str) -> NDArray[np.float64]:
        return pc.fill_null(pc.cast(column(name), "float64"), float("nan")).to_numpy()

    drop("no_url", pc.equal(pc.fill_null(pc.utf8_length(column("URL")), 0), 0))
    length = pc.fill_null(pc.utf8_length(pc.utf8_trim_whitespace(column("TEXT"))), 0).to_numpy()
    drop("short_caption", length < options.min_caption)
    if options.max_caption:
        drop("long_caption", length > options.max_caption)
    if options.min_side:
        drop("small", ~(np.minimum(numbers("WIDTH"), numbers("HEIGHT")) >= options.min_side))
    if options.min_similarity:
        drop("low_similarity", ~(numbers("similarity") >= options.min_similarity))
    if tags := nsfw_tags(options.drop_nsfw):
        drop("nsfw", np.isin(pc.fill_null(column("NSFW"), "").to_numpy(zero_copy_only=False).astype(str), tags))
    return causes


def nsfw_tags(text: str) -> list[str]:
    """The tags in "NSFW,UNSURE"."""
    return [word.strip() for word in text.split(",") if word.strip()]


def _sample_ids(column: Any, source: Path) -> NDArray[np.int64]:
    """SAMPLE_ID as int64, whether stored as whole numbers, floats or text; -1 for null."""
    import pyarrow

    pc = compute()

    try:
        if pyarrow.types.is_floating(column.type):
            column = pc.if_else(pc.is_finite(column), column, None)
        return pc.fill_null(pc.cast(column, "int64"), -1).to_numpy(zero_copy_only=False)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{source}: column SAMPLE_ID: {error}") from None


def _open(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is no parquet file: {' '.join(str(error).split())}") from None


def _finished(target: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The counts of a part that is done."""
    try:
        counts = json.loads(_counts_path(target).read_text())
        return counts if target.exists() and counts["settings"].keys() == settings.keys() else None
    except (OSError, ValueError, LookupError, AttributeError):
        return None


def _counts_path(target: Path) -> Path:
    return target.with_suffix(".json")


def _finish(temporary: Path, target: Path) -> None:
    # The old counts go first: a part without counts is made again.
    _counts_path(target).unlink(missing_ok=True)
    temporary.replace(target)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def totals(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums over parts: "parts", "ids", "kept" and "lost" by cause."""
    lost: Counter[str] = Counter()
    for part in parts:
        lost["id_not_in_metadata"] += part["not_found"]
        lost.update(part["lost"])
    sums = {name: sum(part[name] for part in parts) for name in ("ids", "kept")}
    return {"parts": len(parts), **sums, "lost": dict((+lost).most_common())}


def summary(parts: list[dict[str, Any]]) -> str:
    """What a person reads at the end."""
    total = totals(parts)
    lines = [f"{total['parts']} parts, {total['ids']:,} ids, {total['kept']:,} rows kept"]
    lines += [f"  {cause:<20} {count:>12,}" for cause, count in total["lost"].items()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int | None:
    options = cli.parse(SelectOptions, argv, prog=PROG, description=DESCRIPTION)
    print(summary(select(options)))
    return 0
