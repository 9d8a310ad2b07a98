"""The sets of a study, made once into its run folder: drawn faces, or links to and shards of real photographs."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from pathlib import Path

from farl.data.keys import in_validation
from farl.faces.shards import FaceSet, write_faces
from farl.progress import Progress
from farl.study.plans import Plan
from farl_engine import stop

# Held-out persons among the photographs with captions: out of pre-training, and the test set for attributes.
PERSON_SHARE = 0.1
# Held-out photographs with landmarks, by the number of the photograph that several faces may come from.
PHOTO_SHARE = 0.2
# FASSEG: two of the seven people photographed in many poses, and five of the twenty photographed from the front once.
PARSING_TEST = ("personne06", "personne07")
FRONTAL, FRONTAL_TEST = "frontal02_train_", range(16, 21)
PARSING_CLASSES = ("background", "skin", "nose", "eyes", "mouth", "hair")


def make_data(plan: Plan, folder: Path, photographs: Path | None, workers: int) -> None:
    """Make what is not there yet: pretrain/ and the tasks' sets.

    Args:
        folder: of the study's data. photographs: for a plan without drawn faces. workers: processes that draw.

    Raises:
        ValueError: no photographs where the plan needs them, or other data in `folder`. OSError: it cannot be written.
    """
    if plan.faces is not None:
        for name, faces in zip(("pretrain", "tasks"), plan.faces, strict=True):
            _draw(folder / name, faces, workers)
        return
    source = check_photographs(photographs)
    _pretraining_shards(source / "faces", folder / "pretrain")
    split_attributes(source / "faces", folder / "attributes")
    split_landmarks(source / "landmarks", folder / "alignment")
    split_parsing(source / "parsing", folder / "parsing")


def check_photographs(folder: Path | None) -> Path:
    """The folder. ValueError where it is not given or lacks a part."""
    if folder is None:
        raise ValueError("this plan needs real photographs: name their folder with --photographs, or set FARL_DATA")
    for part in ("faces/pairs.tsv", "faces/attributes.csv", "landmarks", "parsing/images", "parsing/masks"):
        if not (folder / part).exists():
            raise ValueError(f"{folder} has no {part}: --photographs is a folder laid out as docs/study.md says")
    return folder.resolve()


def split_attributes(source: Path, out: Path) -> None:
    """attributes.csv with a column "split": the persons that the pre-training shards hold out are the test set."""
    rows = _read_rows(source / "attributes.csv")
    header, body = rows[0], rows[1:]
    person = header.index("person")
    parts = ["test" if in_validation(row[person], PERSON_SHARE) else "train" for row in body]
    out.mkdir(parents=True, exist_ok=True)
    _link(out / "images", source / "images")
    temporary = out / ".attributes.csv.tmp"
    with temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*header, "split"])
        writer.writerows([*row, part] for row, part in zip(body, parts, strict=True))
    temporary.replace(out / "attributes.csv")


def split_landmarks(source: Path, out: Path) -> None:
    """Links to images and .pts files in train/ and test/; faces of one photograph stay together."""

    def part(stem: str) -> str:
        return "test" if in_validation(stem.rsplit("_", 1)[0], PHOTO_SHARE) else "train"

    _link_parts(source, out, part, lambda split: out / split)


def split_parsing(source: Path, out: Path) -> None:
    """Links to images and masks in train/ and test/; nobody is in both."""

    def part(stem: str) -> str:
        if stem.startswith(FRONTAL):
            return "test" if int(stem.removeprefix(FRONTAL)) in FRONTAL_TEST else "train"
        return "test" if any(name in stem for name in PARSING_TEST) else "train"

    for kind in ("images", "masks"):
        _link_parts(source / kind, out, part, lambda split, kind=kind: out / split / kind)
    for split in ("train", "test"):
        (out / split / "classes.txt").write_text("\n".join(PARSING_CLASSES) + "\n")


def _draw(out: Path, faces: FaceSet, workers: int) -> None:
    with Progress(faces.train + faces.val, f"drawing faces of {out.name}", unit="faces") as bar:

        def advance(count: int) -> None:
            # The handler of signals only notes them; half a set is drawn anew.
            if stop.requested():
                raise KeyboardInterrupt
            bar.update(count)

        write_faces(out, faces, workers=workers, progress=advance)


def _pretraining_shards(source: Path, out: Path) -> None:
    # The report is published last, so where it is the shards are whole.
    if (out / "train.build.json").is_file():
        return
    from farl.data.build import BuildOptions, build

    build(
        BuildOptions(
            source=str(source / "pairs.tsv"),
            out=str(out),
            val_fraction=PERSON_SHARE,
            group_csv=str(source / "attributes.csv"),
            group_column="person",
            overwrite=True,
        )
    )


def _link_parts(source: Path, out: Path, part: Callable[[str], str], home: Callable[[str], Path]) -> None:
    """Link every file of `source` into its part."""
    files = [path for path in sorted(source.iterdir()) if path.is_file() and not path.name.startswith(".")]
    parts = [part(path.stem) for path in files]
    if missing := {"train", "test"} - set(parts):
        raise ValueError(f"{source}: no file falls into the {missing.pop()} part")
    for split in ("train", "test"):
        home(split).mkdir(parents=True, exist_ok=True)
    for path, split in zip(files, parts, strict=True):
        _link(home(split) / path.name, path)


def _link(link: Path, target: Path) -> None:
    if not link.is_symlink():
        link.symlink_to(target)


def _read_rows(file: Path) -> list[list[str]]:
    with file.open(newline="", encoding="utf-8-sig") as lines:
        rows: Iterable[list[str]] = csv.reader(lines)
        return [row for row in rows if row]
