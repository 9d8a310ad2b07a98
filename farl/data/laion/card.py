"""`python -m farl.data laion card SHARDS --out DIR`: a dataset card, as a page for people and as JSON."""

from __future__ import annotations

import datetime
import itertools
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from farl import cli
from farl.data.check import CheckOptions, check
from farl.data.laion.downloads import each_shard, read_downloads, read_stats, strings
from farl.data.laion.filter import summary_path
from farl_engine.data.exclusions import read_exclusions
from farl_engine.data.shards import expand_paths

PROG = "farl.data laion card"
DESCRIPTION = """Writes card.md and card.json: where samples were lost, what the rest is, and the fingerprint by which a
run can be told to have used it. Sizes, captions and kinds of images are those of `farl.data check`; an interrupted card
goes on where it was."""
_TOP = 12
_SIZE_EDGES = (0, 64, 128, 224, 256, 384, 512, 768, 1024, 2048)


@dataclass(frozen=True)
class CardOptions:
    shards: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="SHARDS")]
    """Tars, folders of tars, or patterns in quotes, as in training's --data."""
    out: str
    """Folder for card.md and card.json."""
    parts: str = ""
    """Folder that `laion select` wrote, for the counts of the first step."""
    face_boxes: str = ""
    """File that `laion faces` wrote, for its counts."""
    date: str = ""
    """When the images were downloaded, as the card shall say; "today" takes the clock's date."""
    title: str = "LAION-Face"
    """The card's heading."""
    workers: int = os.cpu_count() or 1
    """Threads; one a core if not given."""

    def __post_init__(self) -> None:
        if not self.shards:
            raise ValueError("missing SHARDS; see --help")
        if self.workers < 1:
            raise ValueError(f"--workers is {self.workers}: wanted 1 or more")


def make_card(options: CardOptions) -> dict[str, Any]:
    """Writes both files and returns the figures.

    Raises:
        ValueError: no such shards, or files beside them of another kind.
    """
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    shards = expand_paths(options.shards)
    checked = check(CheckOptions(options.shards, json=str(out / "check.json"), threads=options.workers))
    date = datetime.date.today().isoformat() if options.date == "today" else options.date
    card = {
        "title": options.title,
        "downloaded": date or None,
        "select": _selected(Path(options.parts)) if options.parts else None,
        "download": _downloaded(shards),
        "filter": _filtered(shards),
        **_described(shards, options.workers),
        "faces": _faces(options.face_boxes, checked) if options.face_boxes else None,
        "check": checked,
    }
    _write(out / "card.json", json.dumps(card, indent=1) + "\n")
    _write(out / "card.md", page(card))
    return card


def _selected(folder: Path) -> dict[str, Any]:
    from farl.data.laion.select import totals

    parts = []
    for path in sorted(folder.glob("laion_face_part_*.json")):
        try:
            parts.append(json.loads(path.read_text()))
            totals(parts[-1:])
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ValueError(f"{path} is not what `laion select` wrote: select that part again") from None
    if not parts:
        raise ValueError(f"{folder} holds no laion_face_part_NNNNN.json of `laion select`")
    return totals(parts)


def _downloaded(shards: list[Path]) -> dict[str, Any] | None:
    """Sums of the shards' _stats.json; None if no shard has one."""
    total: Counter[str] = Counter()
    messages: Counter[str] = Counter()
    for shard in shards:
        if (stats := read_stats(shard)) is not None:
            messages.update(stats.pop("status_dict"))
            total.update(stats)
            total["shards"] += 1
    return {**total, "status": dict(messages.most_common(_TOP))} if total else None


def _filtered(shards: list[Path]) -> dict[str, Any]:
    """What the lists beside the shards take out, by cause, and the settings if `filter` left them."""
    lost: Counter[str] = Counter()
    for shard in shards:
        lost.update(read_exclusions(shard).values())
    try:
        settings = json.loads(summary_path(shards).read_text())["settings"]
    except (OSError, ValueError, LookupError, TypeError):
        settings = None
    return {"lost": dict(lost.most_common()), "settings": settings}


def _described(shards: list[Path], workers: int) -> dict[str, Any]:
    """Licences, NSFW tags and the sizes of all images that are not filtered out, after img2dataset's own tables."""
    counters: dict[str, Counter[str]] = {"licence": Counter(), "nsfw": Counter()}
    sides = np.zeros(len(_SIZE_EDGES), np.int64)
    for licence, nsfw, counts in each_shard(_describe, shards, workers=workers, description="describing"):
        counters["licence"].update(licence)
        counters["nsfw"].update(nsfw)
        sides += counts
    labels = [f"{low}-{high - 1}" for low, high in itertools.pairwise(_SIZE_EDGES)]
    sizes = dict(zip([*labels, f"{_SIZE_EDGES[-1]} or more"], sides.tolist(), strict=True))
    return {**{name: _top(counts) for name, counts in counters.items()}, "short_side": sizes}


def _describe(shard: Path) -> tuple[Counter[str], Counter[str], Any]:
    table = read_downloads(shard, ["LICENSE", "NSFW", "width", "height"])
    out = {key.decode("utf-8", "replace") for key in read_exclusions(shard)}
    rows = [i for i, key in enumerate(strings(table, "key")) if key not in out]
    table = table.take(rows)
    names = table.column_names
    found = [Counter(strings(table, name)) if name in names else Counter() for name in ("LICENSE", "NSFW")]
    sides = np.zeros(len(_SIZE_EDGES), np.int64)
    if {"width", "height"} <= set(names):
        pairs = zip(table.column("width").to_pylist(), table.column("height").to_pylist(), strict=True)
        short = np.array([min(pair) for pair in pairs if None not in pair and min(pair) >= 0], np.int64)
        sides = np.bincount(np.searchsorted(_SIZE_EDGES, short, side="right") - 1, minlength=len(_SIZE_EDGES))
    return found[0], found[1], sides


def _top(counts: Counter[str]) -> dict[str, int]:
    """The commonest values, the rest as one."""
    top = dict(counts.most_common(_TOP))
    rest = counts.total() - sum(top.values())
    return {**top, **({"(others)": rest} if rest else {})}


def _faces(file: str, checked: dict[str, Any]) -> dict[str, Any]:
    from farl_engine.data.face_crop import read_face_boxes

    faces = read_face_boxes(file)
    if faces.meta["fingerprint"] != checked["fingerprint"]:
        raise ValueError(f"{file} holds the faces of other data: make it with `farl.data laion faces` for these shards")
    area = (faces.box[:, 2] - faces.box[:, 0]) * (faces.box[:, 3] - faces.box[:, 1])
    known = area[~np.isnan(area)]
    return {
        "counts": faces.meta.get("counts", {}),
        "min_score": faces.meta.get("min_score"),
        "share_with_face": len(known) / max(len(area), 1),
        "median_share_of_area": float(np.median(known)) if len(known) else None,
    }


def page(card: dict[str, Any]) -> str:
    """The card as markdown."""
    checked, lines = card["check"], [f"# {_cell(card['title'])}", ""]
    about = "about " if checked["sampled"] else ""
    lines += _table(
        ("", ""),
        [
            ("samples to train on", f"{checked['samples']:,}"),
            ("fingerprint", f"`{checked['fingerprint']}`"),
            ("shards", f"{checked['shards']:,} ({checked['shard_bytes'] / 1e9:,.3f} GB)"),
            ("downloaded", card["downloaded"] or "not stated"),
            ("broken", f"{about}{sum(checked['bad'].values()):,} ({checked['bad_fraction']:.2%})"),
            ("progressive", f"{checked['progressive_fraction']:.1%} of the JPEGs"),
        ],
    )
    lines += ["## Where samples were lost", "", *_table(("step", "cause", "samples"), losses(card))]
    lines += ["## Images", "", "Smaller side in pixels, of all samples that are not filtered out:", ""]
    lines += _table(("pixels", "images"), [(name, f"{count:,}") for name, count in card["short_side"].items()])
    kinds = [*checked["formats"].items(), ("turned by EXIF", checked["exif_rotated"]), ("gray", checked["gray"])]
    lines += _table(("kind", "images"), [(name, f"{about}{count:,}") for name, count in kinds])
    lines += ["## Captions", ""]
    rows = [
        (label, *(f"{value:,}" for value in checked[name].values()))
        for name, label in (("caption_characters", "characters"), ("caption_tokens", "tokens"))
    ]
    lines += _table(("", "min", "5 %", "median", "95 %", "max"), rows)
    lines += [f"{checked['distinct_captions']:,} different captions.", ""]
    if card["faces"] is not None:
        faces = card["faces"]
        lines += [
            "## Faces",
            "",
            f"{faces['share_with_face']:.1%} have a box (score {faces['min_score']} or more).",
            "",
        ]
        lines += _table(("", "samples"), [(name, f"{count:,}") for name, count in faces["counts"].items()])
    for name, heading in (("licence", "Licences"), ("nsfw", "NSFW tags")):
        lines += [f"## {heading}", "", "As LAION's metadata says, which is mostly unknown or unchecked.", ""]
        lines += _table(("tag", "samples"), [(tag or "(none)", f"{count:,}") for tag, count in card[name].items()])
    lines += ["The images and captions belong to others; see the terms of LAION-400M and LAION-Face.", ""]
    return "\n".join(lines)


def losses(card: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of step, cause and count, from the id list to training."""
    rows: list[tuple[str, str, str]] = []

    def add(step: str, counts: dict[str, int]) -> None:
        rows.extend((step, cause, f"{count:,}") for cause, count in counts.items())

    if card["select"] is not None:
        add("select", {"ids wanted": card["select"]["ids"], **_lost(card["select"]["lost"])})
    if card["download"] is not None:
        download = card["download"]
        add("download", {"urls tried": download["count"]})
        add("download", _lost({name: download[name] for name in ("failed_to_download", "failed_to_resize")}))
    add("filter", _lost(card["filter"]["lost"]))
    bad = {cause: count for cause, count in card["check"]["bad"].items() if count}
    add("check", {**_lost(bad), "samples left": card["check"]["samples"] - sum(bad.values())})
    return rows


def _lost(counts: dict[str, int]) -> dict[str, int]:
    return {f"- {cause.replace('_', ' ')}": count for cause, count in counts.items() if count}


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return [*lines, *("| " + " | ".join(map(_cell, row)) + " |" for row in rows), ""]


def _cell(text: str) -> str:
    """Text that stays in its cell, whatever stands in the data."""
    plain = " ".join(str(text).split())[:80]
    for mark in ("\\", "|", "<", "[", "*"):
        plain = plain.replace(mark, "\\" + mark)
    return plain


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8", errors="replace")
    temporary.replace(path)


def main(argv: list[str] | None = None) -> int | None:
    options = cli.parse(CardOptions, argv, prog=PROG, description=DESCRIPTION)
    card = make_card(options)
    print(f"{Path(options.out) / 'card.md'}: {card['check']['samples']:,} samples, {card['check']['fingerprint'][:12]}")
    return 0
